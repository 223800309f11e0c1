#!/usr/bin/env python3
"""One checkpoint's exports in every engine: perplexity of the same tokens, and the tokens that each writes greedily.

The table of docs/serving.md, of `make demo`; engines live in the environment of `make serve-test`:

    for form in packed compressed-tensors gguf; do
        lbllm export --recipe recipes/demo.yaml export.format=$form
        mkdir -p runs/engines/$form && cp -r runs/demo/export runs/engines/$form/
    done
    engines() { "$1" scripts/engines.py "${@:2}"; }
    engines python text runs/engines/packed/export --out runs/engines/text.json
    engines python float32 runs/engines/gguf/export runs/engines/gguf-float32/export
    row() { engines $1 run $2 runs/engines/$3/export ${@:4} --text runs/engines/text.json --out runs/engines; }
    row python transformers compressed-tensors
    row python transformers packed --full
    row .venv-vllm/bin/python vllm packed --full
    row .venv-vllm/bin/python llama.cpp gguf-float32
    row .venv-vllm/bin/python llama.cpp gguf
    row .venv-vllm/bin/python vllm compressed-tensors    # refused where vLLM has no kernel for 8 bits
    row python transformers packed
    row .venv-vllm/bin/python vllm packed
    engines python table --text runs/engines/text.json --out runs/engines

`text` cuts 12 segments of 1,024 tokens out of the bundled novels, and takes a prompt; --bos where the recipe's texts begin so, as
Gemma's do. `run` needs its engine alone. Engines: transformers (reads what the folder holds: packed, dense, compressed-tensors,
model.gguf), vllm, llama.cpp (model.gguf). `float32` copies a GGUF export with its weights decoded: llama.cpp then does not round
activations to 8 bits. --full leaves activations, keys and values in full precision. A measurement that is there already is not
repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "The sea was calm, and"
WRITTEN = 64
# Where in a segment differences are looked at by themselves.
_LATER = ((10, 20), (100, 1 << 30))


def write_text(args: argparse.Namespace) -> None:
    """Tokens of the segments and the prompt, by the export's own tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    import lbllm_cli.hf  # noqa: F401 - registers the packed format
    from lbllm_cli.data.tokens import evaluation_tokens
    from lbllm_cli.recipe.text import EvaluationSet

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    vocab = AutoConfig.from_pretrained(args.folder).get_text_config().vocab_size
    wanted = {"length": args.length, "segments": args.segments, "bos": args.bos}
    novels = EvaluationSet.model_validate({"name": "novels", "source": "builtin:evaluation/novels", **wanted})
    rows = evaluation_tokens(novels, tokenizer, vocab)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"prompt": tokenizer(PROMPT)["input_ids"], "segments": rows.tolist()}))


class Transformers:
    """transformers, with the plugin where there is one: other formats need none."""

    def __init__(self, folder: Path, full: bool):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM

        self.torch, self.version = torch, transformers.__version__
        packed, options = False, {"gguf_file": "model.gguf"}
        if not (folder / "model.gguf").exists():
            settings = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
            packed, options = settings.get("quant_method") == "lbllm", {}
        if packed:
            from lbllm_cli.hf import quantize_activations
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        if packed:
            quantize_activations(self.model, not full)

    def losses(self, segment: list[int]) -> list[float]:
        """Of each token but the first, in nats."""
        tokens = self.torch.tensor([segment])
        with self.torch.no_grad():
            logits = self.model(tokens, use_cache=False).logits[0, :-1].float()
        return self.torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").tolist()

    def greedy(self, prompt: list[int]) -> list[int]:
        """What follows the prompt."""
        tokens = self.torch.tensor([prompt])
        options: dict[str, Any] = {"max_new_tokens": WRITTEN, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return self.model.generate(tokens, **options)[0, len(prompt) :].tolist()


class Vllm:
    """vLLM on a CPU, in this process."""

    def __init__(self, folder: Path, full: bool):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm

        self.vllm, self.version = vllm, vllm.__version__
        more = {"additional_config": {"lbllm_activations": "full"}} if full else {}
        self.engine = vllm.LLM(
            str(folder), dtype="float32", max_model_len=2048, enforce_eager=True, kv_cache_memory_bytes=1 << 29, **more
        )

    def losses(self, segment: list[int]) -> list[float]:
        """Of each token but the first, in nats."""
        asked = self.vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
        found = self.engine.generate([{"prompt_token_ids": segment}], asked, use_tqdm=False)[0].prompt_logprobs
        return [-row[token].logprob for row, token in zip(found[1:], segment[1:], strict=True)]

    def greedy(self, prompt: list[int]) -> list[int]:
        """What follows the prompt."""
        asked = self.vllm.SamplingParams(max_tokens=WRITTEN, temperature=0, ignore_eos=True)
        return list(self.engine.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)[0].outputs[0].token_ids)


class LlamaCpp:
    """llama.cpp by its Python binding, keys and values in float32."""

    def __init__(self, folder: Path, full: bool):
        import llama_cpp

        self.version = llama_cpp.__version__
        self.model = llama_cpp.Llama(
            str(folder / "model.gguf"), n_ctx=2048, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, logits_all=True,
            verbose=False,
        )  # fmt: skip

    def losses(self, segment: list[int]) -> list[float]:
        """Of each token but the first, in nats."""
        import numpy as np

        self.model.reset()
        self.model.eval(segment)
        logits = self.model.scores[: len(segment) - 1].astype(np.float64)
        top = logits.max(1)
        return (np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[range(len(logits)), segment[1:]]).tolist()

    def greedy(self, prompt: list[int]) -> list[int]:
        """What follows the prompt."""
        self.model.reset()
        written = []
        for token in self.model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            written.append(int(token))
            if len(written) == WRITTEN:
                return written
        return written


ENGINES = {"transformers": Transformers, "vllm": Vllm, "llama.cpp": LlamaCpp}


def in_float32(folder: Path, target: Path) -> Path:
    """A folder with a copy of model.gguf whose tensors are float32: the same numbers."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize

    target.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(folder / "model.gguf")
    writer = GGUFWriter(target / "model.gguf", reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        plain = tensor.tensor_type == GGMLQuantizationType.F32
        values = tensor.data if plain else dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def run(args: argparse.Namespace) -> None:
    """One engine's measurement, into a file of its own."""
    name = f"{args.engine}{' full' if args.full else ''} {args.name or args.folder.parent.name}"
    result = args.out / f"{name.replace(' ', '-')}.json"
    if result.exists():
        print(f"{result} is there already")
        return
    text = json.loads(args.text.read_text())
    engine = ENGINES[args.engine](args.folder, args.full)
    losses, begun = [], time.monotonic()
    for number, segment in enumerate(text["segments"], 1):
        losses += engine.losses(segment)
        print(f"{name}: {number} of {len(text['segments'])}, perplexity {math.exp(sum(losses) / len(losses)):.4f}", flush=True)
    seconds, greedy = time.monotonic() - begun, engine.greedy(text["prompt"])
    found = {"name": name, "version": engine.version, "seconds": seconds, "losses": losses, "greedy": greedy}
    args.out.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(found))


def table(args: argparse.Namespace) -> None:
    """All measurements of a folder, and how far each is from the first; the last columns are of these places in a segment."""
    found = [json.loads(file.read_text()) for file in sorted(args.out.glob("*.json")) if file.name != args.text.name]
    found = sorted(found, key=lambda one: (args.first not in one["name"], one["name"]))
    print("| engine | version | perplexity | mean difference of a token's loss | largest | the same of 64 | 10 to 20 | 100 on |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    places = [place for segment in json.loads(args.text.read_text())["segments"] for place in range(len(segment) - 1)]
    first = found[0]
    for one in found:
        apart = [abs(a - b) for a, b in zip(one["losses"], first["losses"], strict=True)]
        same = next((i for i, (a, b) in enumerate(zip(one["greedy"], first["greedy"], strict=True)) if a != b), WRITTEN)
        perplexity = math.exp(sum(one["losses"]) / len(one["losses"]))
        later = [[a for a, place in zip(apart, places, strict=True) if low <= place < high] for low, high in _LATER]
        mean, *means = (f"{sum(some) / len(some):.3g}" if some else "" for some in (apart, *later))
        row = (one["name"], one["version"], f"{perplexity:.4f}", mean, f"{max(apart):.2g}", str(same), *means)
        print(f"| {' | '.join(row)} |")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("text")
    one.add_argument("folder", type=Path)
    one.add_argument("--length", type=int, default=1024)
    one.add_argument("--segments", type=int, default=12)
    one.add_argument("--bos", action="store_true", help="segments begin with it")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(do=write_text)
    one = commands.add_parser("run")
    one.add_argument("engine", choices=ENGINES)
    one.add_argument("folder", type=Path)
    one.add_argument("--text", type=Path, required=True)
    one.add_argument("--full", action="store_true")
    one.add_argument("--name", help="of the export in the table; default: of the run's folder")
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(do=run)
    one = commands.add_parser("float32")
    one.add_argument("folder", type=Path)
    one.add_argument("target", type=Path)
    one.set_defaults(do=lambda args: in_float32(args.folder, args.target))
    one = commands.add_parser("table")
    one.add_argument("--first", default="transformers", help="part of the name of what the others are compared with")
    one.add_argument("--text", type=Path, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(do=table)
    args = parser.parse_args()
    args.do(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
