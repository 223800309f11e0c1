"""A packed export in the compiled library alone: opened in tenths of a second, torch is not imported."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lbllm_cli.engine.config import Unfit, read_configuration
from lbllm_cli.engine.model import Model, Sampling
from lbllm_cli.engine.rope import known_positions
from lbllm_cli.engine.threads import usual_threads
from lbllm_cli.models.generation_settings import read_values
from lbllm_cli.models.tokenizer import read_tokenizer

Engine = Literal["auto", "native", "transformers"]
# What transformers draws from where a folder does not say.
_USUAL_TOP_K = 50
_KNOWN = {"bos_token_id", "eos_token_id", "pad_token_id", "top_k", "top_p", "min_p", "repetition_penalty"}
# Of NVIDIA, of AMD, and of either behind Windows.
_DRIVERS = "/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg"
# Values of other settings that change nothing.
_IDLE = {"no_repeat_ngram_size": 0, "typical_p": 1.0}


@dataclass(frozen=True)
class Native:
    """A model whose weights are yet to be read. ends: tokens that end a text. limit: positions of the model."""

    folder: Path
    threads: int
    tokenizer: Any
    sampling: Sampling
    ends: frozenset[int]
    limit: int
    vocab: int

    def load(self) -> Model:
        """Reads the weights. Raises Unfit where they are none that the library runs, UsageError for damaged files."""
        return Model(self.folder, self.threads)


def has_gpu() -> bool:
    """Whether there are a driver of a GPU and a torch that was built for one: then torch says what `--device auto` takes."""
    if not any(Path(driver).exists() for driver in _DRIVERS):
        return False
    found = find_spec("torch")
    folders = [Path(folder, "lib") for folder in (found.submodule_search_locations or ())] if found else []
    return any(file.stem in ("libtorch_cuda", "libtorch_hip") for folder in folders for file in folder.glob("libtorch_*"))


def open_native(folder: Path, device: str, temperature: float, threads: int | None) -> Native:
    """What a folder says of its model, for a CPU. device: as `--device` names it. Raises Unfit where transformers has to run it.

    Raises UsageError for a tokenizer or settings that cannot be used.
    """
    if device not in ("auto", "cpu") or (device == "auto" and has_gpu()):
        raise Unfit(f"the native engine runs on a CPU (--device {device})")
    config = read_configuration(folder)
    values = read_values(folder)
    sampling = sampling_of(values or {}, temperature)
    tokenizer = read_tokenizer(folder, trust_remote_code=False, light=True)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise Unfit("its tokenizer is none of the library tokenizers")
    found = config.eos_token_id if values is None else values.get("eos_token_id")
    ends = frozenset([found] if isinstance(found, int) else found or ())
    limit = known_positions(config.max_position_embeddings, config.rope)
    return Native(folder, threads or usual_threads(), tokenizer, sampling, ends, limit, config.vocab_size)


def sampling_of(values: dict[str, Any], temperature: float) -> Sampling:
    """Settings of a generation_config.json as the library draws by them. Raises Unfit for one that it does not have."""
    other = [key for key, value in values.items() if key not in _KNOWN and _IDLE.get(key) != value]
    if other:
        raise Unfit(f"generation_config.json: {', '.join(other)}")
    return Sampling(
        temperature, int(values.get("top_k", _USUAL_TOP_K)), float(values.get("top_p", 1.0)), float(values.get("min_p", 0.0)),
        float(values.get("repetition_penalty", 1.0)),
    )  # fmt: skip
