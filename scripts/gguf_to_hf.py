#!/usr/bin/env python3
"""Convert a GGUF file to a plain Hugging Face model folder.

The folder holds safetensors weights, the model and generation configurations, the tokenizer and, where the
GGUF carries one, the chat template. It needs the packages torch, transformers, gguf and accelerate.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Vocabularies whose merges were learned on text cut at every digit before the GPT-2 rule.
DIGIT_SPLIT_PRE_TOKENIZERS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}

SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class ConversionError(Exception):
    """A conversion that cannot be done, with a message for the user."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file, without the long arrays of scores and merges."""
    skipped = {"tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as a GGUF file: {error}") from error
    return {name: field.contents() for name, field in reader.fields.items() if name not in skipped}


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the GGUF's weights, dequantized, into a model that knows nothing of the GGUF."""
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases leave the weights packed when a kernel is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, **options)

    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    if getattr(config, "rms_norm_eps", None) is not None:
        # GGUF stores it in 32 bits: 1e-05 comes back as 9.99999975e-06.
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {name: tensor.to(dtype) for name, tensor in loaded.state_dict().items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(loaded.generation_config)
    return model


def load_tokenizer(path: Path, metadata: dict[str, Any], max_length: int | None) -> PreTrainedTokenizerBase:
    """Load the GGUF's tokenizer and put back what the loader leaves out."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = metadata["tokenizer.ggml.tokens"]
    for name, key in SPECIAL_TOKENS.items():
        if key in metadata and getattr(tokenizer, name) != tokens[metadata[key]]:
            setattr(tokenizer, name, tokens[metadata[key]])
    if "tokenizer.chat_template" in metadata:
        tokenizer.chat_template = metadata["tokenizer.chat_template"]
    if max_length is not None:
        tokenizer.model_max_length = max_length

    backend = tokenizer.backend_tokenizer
    byte_level = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    if byte_level and metadata.get("tokenizer.ggml.pre") in DIGIT_SPLIT_PRE_TOKENIZERS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    return tokenizer


def tidy(folder: Path) -> None:
    """Take traces of the conversion out of a saved folder."""
    for name, dropped in (
        ("config.json", ("_model_name_or_path",)),
        ("tokenizer_config.json", ("is_local", "local_files_only")),
    ):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in dropped:
            content.pop(key, None)
        if content.get("tokenizer_class") == "TokenizersBackend":
            # The older name is understood by every release, this one only from version 5.
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        # Some releases of safetensors make the file readable by its owner alone.
        path.chmod(mode)


def convert(gguf: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the GGUF file as a Hugging Face folder, whole or not at all."""
    gguf, out = gguf.absolute(), out.absolute()
    if not gguf.is_file():
        raise ConversionError(f"{gguf} is not a file")
    if out.exists():
        raise ConversionError(f"{out} already exists; remove it or name another folder")
    metadata = read_metadata(gguf)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise ConversionError(f"{partial} exists, from another or an interrupted conversion") from error
    try:
        model = load_model(gguf, dtype)
        max_length = getattr(model.config, "max_position_embeddings", None)
        tokenizer = load_tokenizer(gguf, metadata, max_length)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        tidy(partial)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Convert a GGUF file to a Hugging Face model folder.")
    parser.add_argument("gguf", type=Path, metavar="GGUF", help="the GGUF file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make; it must not exist")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of the weights")
    args = parser.parse_args(argv)
    try:
        convert(args.gguf, args.out, DTYPES[args.dtype])
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.gguf} could not be converted: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
