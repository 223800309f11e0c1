#!/usr/bin/env python3
"""One decoder block of a large model's shape through `lbllm ptq`, random weights: seconds and peak memory.

    python scripts/bench_block.py --shape llama2-7b --sequences 128 --length 2048 --device cuda

Prints one JSON object. Memory is set against the forecast that `lbllm validate` gives for the same folder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

SHAPES = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "llama2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}
VOCABULARY = 256


def make_model(folder: Path, shape: str) -> None:
    """A one-block Llama with random bfloat16 weights, and random tokens in place of text."""
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=1, vocab_size=VOCABULARY, max_position_embeddings=4096)
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def make_tokenizer(folder: Path) -> None:
    """A tokenizer that nothing is tokenized with; the recipe's data are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(index): index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)


def lbllm(*arguments: str) -> str:
    """Standard output of one command."""
    return subprocess.run([sys.executable, "-m", "lbllm_cli", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Reads the arguments, runs the block, prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", arguments.shape)
        make_tokenizer(folder / "model")
        ids = torch.randint(VOCABULARY, (arguments.sequences, arguments.length), dtype=torch.int64)
        save_file({"input_ids": ids}, folder / "tokens.safetensors")
        tokens = {"source": str(folder / "tokens.safetensors"), "length": arguments.length}
        recipe = {
            "model": {"path": str(folder / "model")},
            "output": {"dir": str(folder / "run")},
            "runtime": {"device": arguments.device},
            "data": {
                "calibration": {**tokens, "sequences": arguments.sequences},
                "evaluation": [{**tokens, "name": "tokens", "segments": 1}],
            },
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        forecast = json.loads(lbllm("validate", "--recipe", str(folder / "recipe.yaml"), "--json"))["forecast_bytes"]["ptq"]
        lbllm("ptq", "--recipe", str(folder / "recipe.yaml"))
        event = json.loads((folder / "run" / "ptq" / "events.jsonl").read_text(encoding="utf-8"))
    measured = {key: event[key] for key in ("seconds", "peak_ram_bytes", "peak_device_bytes")}
    print(json.dumps({**vars(arguments), **measured, "forecast": forecast}))


if __name__ == "__main__":
    main()
