"""Sections `model` and `floor` of bench_kernels.py: whole models, the memory of loading one, where a decode step's time goes."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from kernel_harness import CHUNK, TABLES, WEIGHT_RMS, Bench, Record, medians
from kernel_linears import random_packed, stored_bytes
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

import lbllm_cli.hf  # noqa: F401  registers the packed format
from lbllm_cli.core import files
from lbllm_cli.format.activations import ActivationFormat
from lbllm_cli.format.group_sizes import GroupSizes
from lbllm_cli.format.settings import quantization_config
from lbllm_cli.models.block import block_units
from lbllm_cli.runtime.attachments import Arguments
from lbllm_cli.runtime.linear import PackedLinear
from lbllm_cli.runtime.quantizer import ActQuantizer, quantizer_widths
from lbllm_cli.training.knees import tables_of

WORK = ("prefill", "decode", "generate")
# Tokens of a prefill, of the prompt before a decode, and decoded.
PREFILL, PROMPT, NEW = 128, 32, 64
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# SIZES, and the group size. All have tied embeddings.
MODELS = {"tiny": (64, 128, 2, 2, 1, 256, 32), "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, 128)}
LOADING = """
import json, sys
from pathlib import Path
import torch, transformers, lbllm_cli.hf
def status(field):
    return int(Path("/proc/self/status").read_text(encoding="ascii").split(field + ":")[1].split()[0]) * 1024
before = status("VmRSS")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(json.dumps({"imports_bytes": before, "loaded_bytes": status("VmRSS"), "peak_bytes": status("VmHWM")}))
"""


def write_random(folder: Path, name: str) -> None:
    """A packed folder of a Llama with random weights."""
    *sizes, group_size = MODELS[name]
    config = LlamaConfig(**dict(zip(SIZES, sizes, strict=True)), tie_word_embeddings=True)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    layout = ActivationFormat(4, 4, "group", "knee", "knee", len(TABLES), group_size)
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    units = block_units(config)
    linears = tuple(name for unit in units for name in unit)
    stored["quantization_config"] = quantization_config(GroupSizes(group_size), 8, "act-calib", linears, layout)
    files.write_json(folder / "config.json", stored)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for key, like in model.state_dict().items():
        owner = key.removesuffix(".weight")
        if owner.endswith(linears):
            parts = random_packed(like.shape[1], like.shape[0], group_size)
            tensors |= {f"{owner}.{part}": tensor for part, tensor in parts.items()}
        elif owner != "lm_head":
            tensors[key] = torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, WEIGHT_RMS).add_(like.ndim == 1)
    for index, layer in enumerate(model.model.layers):
        for own, width in quantizer_widths(layer, units).items():
            parts = ActQuantizer(tables_of(TABLES), layout.size(own, width)).state_dict()
            tensors |= {f"model.layers.{index}.{own}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Subject:
    """A packed model and its dense counterpart, loaded when first needed. scratch: folder for a random one."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        self.arguments, self.scratch = arguments, scratch
        self.name = arguments.model.as_posix() if arguments.model else f"random {arguments.random}"

    @cached_property
    def folder(self) -> Path:
        """The packed model's."""
        if not self.arguments.model:
            write_random(self.scratch, self.arguments.random)
        return Path(self.arguments.model or self.scratch)

    @cached_property
    def packed(self) -> Any:
        """With compiled kernels."""
        return prepared(AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16))

    @cached_property
    def dense(self) -> Any:
        """In bfloat16, with the base's weights or random ones."""
        if self.arguments.base:
            return prepared(AutoModelForCausalLM.from_pretrained(self.arguments.base, dtype=torch.bfloat16))
        config = AutoConfig.from_pretrained(self.folder)
        del config.quantization_config
        return prepared(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))

    def prompt(self, length: int) -> Tensor:
        """Random tokens [1, length]."""
        return torch.randint(self.packed.config.vocab_size, (1, length))


def prepared(model: Any) -> Any:
    """Ready for `generate` to make as many tokens as it is asked for."""
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.no_grad()
def prefill(model: Any, prompt: Tensor) -> float:
    """Seconds per token of a pass into a new cache, with the logits of the last token, as `generate` begins."""
    began = perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return (perf_counter() - began) / prompt.shape[1]


@torch.no_grad()
def decode(model: Any, prompt: Tensor) -> float:
    """Seconds per greedy token after the prompt, in a plain loop."""
    kept = {Arguments(model).name: DynamicCache(config=model.config)}
    out = model(prompt, use_cache=True, logits_to_keep=1, **kept)
    began = perf_counter()
    for _ in range(NEW):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, use_cache=True, **kept)
    return (perf_counter() - began) / NEW


def generate(model: Any, prompt: Tensor) -> float:
    """Seconds per new token of `generate`, with the prompt's."""
    began = perf_counter()
    model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    return (perf_counter() - began) / NEW


def measure_model(bench: Bench, subject: Subject, threads: int) -> Record:
    """Tokens per second of the packed and of the dense model."""
    torch.set_num_threads(threads)
    long, short = subject.prompt(PREFILL), subject.prompt(PROMPT)
    candidates: dict[Any, Callable[[], float]] = {}
    for kind, model in (("packed", subject.packed), ("dense", subject.dense)):
        works = partial(prefill, model, long), partial(decode, model, short), partial(generate, model, short)
        candidates |= {(kind, name): work for name, work in zip(WORK, works, strict=True)}
    seconds = medians(candidates, bench.arguments.rounds)
    speeds: Record = {kind: {work: 1 / seconds[kind, work] for work in WORK} for kind in ("packed", "dense")}
    ratio = {work: speeds["packed"][work] / speeds["dense"][work] for work in WORK}
    return {"rounds": bench.arguments.rounds, "tokens_per_second": speeds, "ratio": ratio}


def measure_memory(subject: Subject) -> Record:
    """Resident memory of a fresh process that loads the packed model."""
    result = subprocess.run([sys.executable, "-c", LOADING, str(subject.folder)], check=True, stdout=subprocess.PIPE, text=True)
    record: Record = json.loads(result.stdout)
    record["files_bytes"] = sum(path.stat().st_size for path in subject.folder.glob("*.safetensors"))
    return {**record, "peak_ratio": record["peak_bytes"] / (record["files_bytes"] + record["imports_bytes"])}


@contextmanager
def without(model: Any, blocks: bool, head: bool) -> Iterator[None]:
    """Decode steps that cost nothing in the blocks (they only count the new token in the cache) or in the head."""
    layers, output = list(model.get_decoder().layers), model.get_output_embeddings()
    steps = [layer.forward for layer in layers]
    logits = torch.zeros(1, 1, output.out_features, dtype=torch.bfloat16)

    arguments = [Arguments(layer) for layer in layers]

    def skipping(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
        if hidden_states.shape[1] > 1:
            return steps[index](*args, **kwargs)
        arguments[index].cache(args, kwargs).layers[index].grown(1)
        return hidden_states

    try:
        if blocks:
            for index, layer in enumerate(layers):
                layer.forward = partial(skipping, index)
        if head:
            output.forward = lambda hidden: logits
        yield
    finally:
        for layer, step in zip(layers, steps, strict=True):
            layer.forward = step
        output.__dict__.pop("forward", None)


def measure_floor(bench: Bench, subject: Subject, threads: int) -> Record:
    """A decode step whole and without its parts, and what it has to read."""
    torch.set_num_threads(threads)
    model, rounds = subject.packed, bench.arguments.rounds
    prompt = subject.prompt(PROMPT)

    def step(blocks: bool, head: bool) -> float:
        with without(model, blocks, head):
            return decode(model, prompt)

    parts = {"whole": (False, False), "no_blocks": (True, False), "no_head": (False, True), "neither": (True, True)}
    candidates: dict[str, Callable[[], float]] = {name: partial(step, *wanted) for name, wanted in parts.items()}
    seconds = medians({**candidates, "read": bench.reading(threads)}, rounds)
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    sizes = {
        "linears_bytes": int(sum(stored_bytes(x.in_features, x.out_features, x.group_size, x.level_bits) for x in linears)),
        "head_bytes": model.get_output_embeddings().weight.nbytes,
    }
    bandwidth = CHUNK / seconds["read"]
    speeds = {name: 1 / seconds[name] for name in parts} | {"reading": bandwidth / sum(sizes.values())}
    record = {"rounds": rounds, "tokens_per_second": speeds, "read_gb_s": bandwidth / 1e9, **sizes}
    return {**record, "times_floor": speeds["reading"] / speeds["whole"]}
