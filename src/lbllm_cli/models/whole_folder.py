"""A model folder that is loaded as a whole, by transformers: what is checked before its weights are read, and after."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lbllm_cli.core import model_folder
from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.model_folder import code_hint
from lbllm_cli.core.tensor_files import finite
from lbllm_cli.format.settings import METHOD, check_settings
from lbllm_cli.models.config import read_configuration, understood
from lbllm_cli.models.families import FAMILIES
from lbllm_cli.models.inner import KEY_MAPPING
from lbllm_cli.models.model import SourceModel, read_entries
from lbllm_cli.runtime.checks import refusing


def check_folder(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Configuration of a packed or dense folder of any family, compared with its files; no weight is read.

    trust_remote_code: whether code that the folder brings may run. Raises UsageError for what cannot be loaded. In the families
    that lbllm supports every tensor must be there; a packed folder's are compared as it is loaded.
    """
    values = model_folder.read_config(folder)
    config = read_configuration(folder, trust_remote_code)
    model_folder.read_folder(folder)
    quantized = values.get("quantization_config")
    if quantized:
        _check_quantization(folder, quantized)
    else:
        with understood(folder / "config.json", code_hint(values, trust_remote_code)), torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        if values.get("model_type") in FAMILIES and not (trust_remote_code and values.get("auto_map")):
            named = read_entries(folder, config)
            SourceModel(folder, config, named, torch.device("cpu"), torch.float32).check_tensors()
    return config


def _check_quantization(folder: Path, values: dict[str, Any]) -> None:
    import lbllm_cli.hf  # noqa: F401 - registers the packed format

    method = values.get("quant_method")
    if method == METHOD:
        with refusing(folder):
            check_settings(values)
    # transformers would load whatever fits and leave the rest at random.
    elif str(method) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UsageError(f"{folder / 'config.json'}: quant_method: this transformers knows no {str(method)[:40]!r}")


def load_folder(folder: Path, config: PretrainedConfig, trust_remote_code: bool, **options: Any) -> Any:
    """The model of a folder in evaluation mode. config: as `check_folder` gives it. options: for from_pretrained.

    Raises UsageError where a tensor is absent, which transformers fills with random values, or holds NaN or infinity.
    """
    import lbllm_cli.hf  # noqa: F401 - registers the packed format

    if config.model_type != model_folder.read_config(folder).get("model_type"):
        options = {**options, "key_mapping": KEY_MAPPING}
    with refusing(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, trust_remote_code=trust_remote_code, **options
        )
    if missing := sorted(found["missing_keys"]):
        raise UsageError(f"{folder}: lacks {len(missing)} tensors, first {missing[0]}; download the model again")
    check_loaded(folder, model)
    return model.eval()


def check_loaded(folder: Path, model: Any) -> None:
    """Raises UsageError naming the first weight with NaN or infinity."""
    for name, tensor in model.named_parameters():
        if not finite(tensor):
            raise UsageError(f"{folder}: {name} holds NaN or infinity; download the model again")
