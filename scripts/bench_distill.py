#!/usr/bin/env python3
"""One training step of a decoder block in `lbllm distill` against the same step with ordinary linears: time and peak memory.

    python scripts/bench_distill.py --shape llama2-7b --dtype bfloat16 --device cuda --rows 4 --length 2048 --steps 20
    python scripts/bench_distill.py --shape smollm2-135m --dtype float32 --device cpu --rows 4 --length 512 --threads 2

The trainer itself takes every step: weights into the block, forward, loss, backward, norm and clipping, fused AdamW, constraints.
Weights, inputs and targets are random and lie on the device; reading the streams, held-out scores and saves are not timed. The
dense variant trains float32 masters of the same linears, cast to the block's dtype in every step; in float32 these are the
block's own weights, without a copy. Variants take turns, so that whatever else the machine does meets all of them.

Peak memory is what the second step adds to a process that holds inputs and targets: the block with its full-precision weights,
as in a run, what is trained, gradients, moments, activations. Every variant is measured alone, on a CPU in a process of its own.

One JSON object on stdout, a table on stderr. Needs torch, transformers and safetensors; lbllm need not be installed.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lbllm_cli.core.errors import UsageError
from lbllm_cli.distill.fit import BinarizedStudent
from lbllm_cli.format import weights as binarize
from lbllm_cli.format.levels import level_values, project_levels
from lbllm_cli.models.block import Block, block_prefix
from lbllm_cli.parallel.group import ALONE
from lbllm_cli.pipeline.block_loop import BlockTask
from lbllm_cli.pipeline.streams import HiddenStream, row_slices
from lbllm_cli.ptq.em import quantile_levels
from lbllm_cli.runtime.backend import choose_device
from lbllm_cli.training.block import block_loop
from lbllm_cli.training.interfaces import ParameterGroup
from lbllm_cli.training.ste import nearest_ranks

SHAPES = {
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DENSE = "dense"
TRAINED = {DENSE: ("weights",), "nearest": ("weights", "levels"), "bitmap": ("weights", "levels", "bitmap")}
WARM_UP = 2
# LBLLM's training data, and the blocks of the model that the projection is for.
PAPER_TOKENS, PAPER_SHAPE, PAPER_BLOCKS = 8192 * 2048, "llama2-7b", 32
MIB = 1 << 20
_M_MMAP_THRESHOLD = -3


@dataclass
class Settings:
    """What the trainer reads of the recipe's `distill`, which itself would need pydantic; rates and margin change no step's cost.

    epochs: steps of the whole schedule, for here every step is an epoch. clip: below 1, so that every step but the first clips,
    which at the recipe's default few do: none in a run costs more.
    """

    parametrisation: str
    trained: tuple[str, ...]
    batch_size: int
    micro_batch_size: int
    epochs: int
    lr_weights: float = 2e-2
    lr_levels: float = 1e-2
    lr_bitmap: float = 1e-2
    warmup: float = 0.05
    clip: float = 0.5
    loss: str = "robust"
    channel_cap: float | None = None
    polarise: float = 0.01
    polarise_beta: tuple[float, ...] = (2.0, 2.0)
    latent_margin: float = 0.2
    dampening: float = 0.003
    held_out: float = 0.0625
    max_skipped: int = 10


class DenseStudent:
    """The same linears as ordinary weights in mixed precision. A `Student` of lbllm_cli.training."""

    def __init__(self, teacher: Block, settings: Settings):
        self.block = teacher.sharing()
        self.rate = settings.lr_weights
        self.masters: dict[str, nn.Parameter] = {}
        for name in teacher.linears:
            weight = teacher.linear(name).weight
            master = nn.Parameter(weight.detach().to(torch.float32, copy=True))
            self.masters[name] = master
            own = weight.dtype == master.dtype
            self.block.linear(name).weight = master if own else nn.Parameter(torch.empty_like(weight))

    def groups(self) -> list[ParameterGroup]:
        """One AdamW group per linear, as for binarized ones."""
        scales = [(master, float(master.detach().square().mean().sqrt())) for master in self.masters.values()]
        return [ParameterGroup([master], "weights", self.rate * rms, rms) for master, rms in scales]

    @torch.no_grad()
    def begin(self, progress: float) -> None:
        """Masters into the block's dtype."""
        for name, master in self.masters.items():
            weight = self.block.linear(name).weight
            if weight is not master:
                weight.copy_(master)

    def settle(self) -> None:
        """Nothing comes from elsewhere."""

    def backward(self) -> None:
        """Gradients to the masters."""
        for name, master in self.masters.items():
            weight = self.block.linear(name).weight
            if weight is not master:
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None

    def own_steps(self) -> list[Any]:
        """AdamW moves all of it."""
        return []

    def constrain(self) -> None:
        """Nothing to do."""

    def resumed(self) -> None:
        """Never asked for."""

    def snapshot(self) -> dict[str, Tensor]:
        """Never asked for: no epoch is scored here."""
        return {}

    def facts(self) -> dict[str, float]:
        """Never asked for."""
        return {}


@dataclass(frozen=True)
class Case:
    """What all variants have in common. rounds: steps of the schedule."""

    shape: str
    dtype: torch.dtype
    device: torch.device
    rows: int
    length: int
    group_size: int
    rounds: int

    def streams(self) -> tuple[HiddenStream, HiddenStream]:
        """Random inputs and targets, with one sequence more than a step takes: the trainer holds one out."""
        hidden = SHAPES[self.shape]["hidden_size"]
        streams = tuple(HiddenStream((self.rows + 1, self.length, hidden), self.dtype) for _ in range(2))
        for stream in streams:
            stream.data.normal_()
        return streams[0], streams[1]

    def teacher(self) -> Block:
        """A block with random weights that bfloat16 holds."""
        sizes = {"num_hidden_layers": 1, "vocab_size": 256, "max_position_embeddings": max(4096, self.length)}
        config = LlamaConfig(**SHAPES[self.shape], **sizes)
        with torch.device("meta"):
            stored = LlamaForCausalLM(config).state_dict()
        tensors = {}
        for name, like in stored.items():
            if name.startswith(block_prefix(0)):
                values = torch.ones(like.shape, device=self.device)
                tensors[name] = (values.normal_(0, 0.02) if like.ndim > 1 else values).bfloat16()
        return Block(config, 0, tensors, self.dtype)

    def start(self, teacher: Block) -> dict[str, Tensor]:
        """Packed tensors of the block in RAM: levels at each group's quantiles, the nearest one for every weight."""
        tensors: dict[str, Tensor] = {}
        for name in teacher.linears:
            weight = teacher.linear(name).weight.detach().float()
            source = binarize.grouped(weight, self.group_size)
            fitted = quantile_levels(source.flatten(0, 1)).view(*source.shape[:2], binarize.LEVELS)
            levels, scale = project_levels(fitted)
            ranks = nearest_ranks(source, level_values(levels, scale)).flatten(1)[:, : weight.shape[1]]
            packed = binarize.PackedWeight.of_ranks(ranks, levels, scale, self.group_size)
            tensors |= packed.moved(Tensor.cpu).to_tensors(teacher.prefix + name)
        return tensors


class Data:
    """Streams of a case, and the batch of every step on the device."""

    def __init__(self, case: Case):
        self.streams = case.streams()
        self.batch = tuple(stream.data[1:].to(case.device) for stream in self.streams)


class Runner:
    """One variant, ready to take steps."""

    def __init__(self, name: str, case: Case, data: Data, teacher: Block):
        settings = Settings(name, TRAINED[name], case.rows, case.rows, case.rounds)
        inputs, targets = data.streams
        start = {} if name == DENSE else case.start(teacher)
        nobody: Any = None
        share, pieces = ALONE.share(inputs.rows), row_slices(inputs.rows, case.rows)
        task = BlockTask(0, teacher, inputs, inputs, targets, case.device, pieces, start, nobody, nobody, ALONE, share)
        student: Any = DenseStudent(teacher, settings) if name == DENSE else BinarizedStudent(teacher, start, settings)
        self.task, self.device = task, case.device
        self.trainer = block_loop(task, student, settings, "distill", 0)  # type: ignore[arg-type]
        self.trainer.measure_start()
        self.rows, self.feed = torch.tensor(self.trainer.order.rows), repeat(data.batch)

    def step(self) -> float:
        """Seconds of one optimizer step."""
        synchronize(self.device)
        began = time.perf_counter()
        self.trainer.step(self.rows, self.feed, len(self.rows))
        synchronize(self.device)
        seconds = time.perf_counter() - began
        if self.trainer.progress.skipped:
            raise SystemExit("a step was not finite and left out its update; nothing was measured")
        self.trainer.progress.epoch += 1
        return seconds


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def status(field: str) -> int:
    """Bytes that /proc/self/status says: VmRSS is resident memory, VmHWM its peak."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").split(f"{field}:")[1].split()[0]) * 1024


def memory(device: torch.device) -> int:
    """Bytes in use: allocated on a GPU, resident on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Forgets the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def return_freed_memory() -> None:
    """From here on glibc gives every larger tensor back when it is freed: what setting up left behind is not the step's."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def measure_peak(name: str, case: Case) -> int:
    """Bytes that a step of one variant needs at most, beside inputs and targets."""
    if case.device.type == "cpu":
        return_freed_memory()
    # Code, kernels' workspaces and thread pools are not the variant's.
    small = replace(case, shape="toy", rows=1, length=16)
    Runner(name, small, Data(small), small.teacher()).step()
    data = Data(case)
    gc.collect()
    before = memory(case.device)
    runner = Runner(name, case, data, case.teacher())
    runner.step()  # AdamW makes its moments in here, after activations are gone
    reset_peak(case.device)
    runner.step()
    return peak_memory(case.device) - before


def peaks(names: list[str], case: Case) -> dict[str, int]:
    """`measure_peak` of every variant; on a CPU in a child process each."""
    if case.device.type == "cuda":
        return {name: measure_peak(name, case) for name in names}
    found = {}
    for name in names:
        # A fork spares the imports; the parent has computed nothing yet, so that it has no threads that a fork would lose.
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            found[name] = pool.submit(measure_peak, name, case).result()
    return found


def timings(names: list[str], case: Case, steps: int) -> dict[str, list[float]]:
    """Seconds of `steps` steps of every variant, one of each in a round; who begins changes from round to round."""
    data, teacher = Data(case), case.teacher()
    runners = {name: Runner(name, case, data, teacher) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + steps):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = runners[name].step()
            if turn >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def summary(case: Case, seconds: dict[str, list[float]], peak: dict[str, int], epochs: int) -> dict[str, dict[str, Any]]:
    """Record of every variant."""
    records = {}
    for name, own in seconds.items():
        median = statistics.median(own)
        ratios = [one / dense for one, dense in zip(own, seconds[DENSE], strict=True)]
        speed = case.rows * case.length / median
        records[name] = {
            "trained": TRAINED[name],
            "seconds": median,
            "ratio": median / statistics.median(seconds[DENSE]),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "tokens_per_second": speed,
            "peak_bytes": peak[name],
            "peak_ratio": peak[name] / peak[DENSE],
            "rounds": [round(one, 6) for one in own],
        }
        if case.shape == PAPER_SHAPE:
            records[name]["projected_hours"] = PAPER_TOKENS * epochs * PAPER_BLOCKS / speed / 3600
    return records


def table(report: dict[str, Any]) -> str:
    """The report as markdown."""
    projected = report["shape"] == PAPER_SHAPE
    head = ["variant", "s / step", "ratio", "ratio per round", "tokens / s", "peak MiB", "peak ratio"]
    lines = [head + (["hours"] if projected else []), ["---"] * (len(head) + projected)]
    for name, record in report["variants"].items():
        cells = [
            name,
            f"{record['seconds']:.4g}",
            f"{record['ratio']:.3f}",
            f"{record['ratio_min']:.3f} to {record['ratio_max']:.3f}",
            f"{record['tokens_per_second']:.0f}",
            f"{record['peak_bytes'] / MIB:.0f}",
            f"{record['peak_ratio']:.3f}",
        ]
        lines.append(cells + ([f"{record['projected_hours']:.2f}"] if projected else []))
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\nhours: {report['projection']}" if projected else text


def read_arguments() -> tuple[argparse.Namespace, Case]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = [name for name in TRAINED if name != DENSE]
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rows", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help=f"timed rounds, after {WARM_UP} that are not")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's")
    parser.add_argument("--parametrisations", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--epochs", type=int, default=2, help=f"of the projection for {PAPER_SHAPE}")
    arguments = parser.parse_args()
    for name in ("rows", "length", "steps", "epochs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: at least 1, got {getattr(arguments, name)}")
    if arguments.group_size < 16 or arguments.group_size % 16:
        parser.error(f"--group-size: a multiple of 16, got {arguments.group_size}")
    try:
        device = choose_device(arguments.device)
    except UsageError as error:
        parser.error(str(error))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = arguments.rows, arguments.length, arguments.group_size, WARM_UP + arguments.steps
    return arguments, Case(arguments.shape, DTYPES[arguments.dtype], device, *sizes)


def main() -> None:
    """Measures memory, then time, and prints both."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arguments, case = read_arguments()
    torch.manual_seed(0)
    names = [DENSE, *dict.fromkeys(arguments.parametrisations)]
    peak = peaks(names, case)
    seconds = timings(names, case, arguments.steps)
    report = {
        **vars(arguments),
        "device": torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": {field.name: field.default for field in fields(Settings) if field.default is not MISSING},
        "variants": summary(case, seconds, peak, arguments.epochs),
    }
    if case.shape == PAPER_SHAPE:
        report["projection"] = (
            f"{PAPER_TOKENS} tokens x {arguments.epochs} epochs x {PAPER_BLOCKS} blocks at the measured tokens per second; "
            "training steps only, without streams, held-out scores and saves"
        )
    print(table(report), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
