"""What a run tells: a bar or one plain line per block on stderr, one JSON record per block in events.jsonl."""

import json
import resource
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lbllm_cli.core import files
from lbllm_cli.core.console import GIB, clock, console
from lbllm_cli.models.model import SourceModel
from lbllm_cli.parallel.group import ALONE, Group

ETA_WINDOW = 8


def peak_ram() -> int:
    """Largest resident memory of this process so far, bytes."""
    try:
        # getrusage also counts the process that started this one: Linux carries its maximum across exec.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Progress of one stage over the blocks of a model.

    events: file that gets one JSON record per block, or None. group: of ranks, of which the first one writes. On a terminal a
    bar shows how far it is; elsewhere only the lines remain, so that a batch log holds one line per block.
    """

    def __init__(self, stage: str, model: SourceModel, events: Path | None = None, group: Group = ALONE):
        self.stage, self.group = stage, group
        self.model, self.blocks = model, model.blocks
        self.events = events
        self.console = console()
        self._times: deque[float] = deque(maxlen=ETA_WINDOW)
        self._began = self._start = time.monotonic()
        self._stepped = 0.0
        self._traffic = group.traffic.copy()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self._bar.add_task(stage, total=self.blocks)

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """One line of log."""
        self.console.print(f"{self.stage}: {text}", markup=False)

    def begin_block(self, index: int) -> None:
        """Starts a block's clock."""
        self._began = time.monotonic()
        self._bar.update(self._task, completed=index)

    def total(self, steps: int) -> None:
        """For work that does not go through the blocks: how many steps it has."""
        self._bar.update(self._task, total=steps)

    def tick(self, text: str) -> None:
        """Where the work on a block is, beside the bar of a terminal."""
        self._bar.update(self._task, description=f"{self.stage}: {text}")

    def memory(self) -> dict[str, int | None]:
        """Peak memory so far, bytes."""
        return {"peak_ram_bytes": peak_ram(), "peak_device_bytes": self._peak_device()}

    def _peak_device(self) -> int | None:
        return self.model.backend.peak_memory(self.model.device)

    def step(self, index: int) -> None:
        """A block is done, without a line of its own."""
        self._bar.update(self._task, completed=index + 1)

    def end_block(self, index: int, facts: dict[str, Any]) -> None:
        """One aligned line and one record. facts: `error`, `error_ordinary` and whatever the stage measured."""
        seconds = time.monotonic() - self._began
        self._times.append(seconds)
        line = f"{self.stage} {index + 1:3d}/{self.blocks}"
        if "error" in facts:
            line += f"  error {facts['error']:.4f}  ordinary {facts['error_ordinary']:.4f}"
        line += f"  {seconds:6.1f} s  ram {peak_ram() / GIB:.1f} GiB"
        device = self._peak_device()
        line += f"  gpu {device / GIB:.1f} GiB" if device is not None else ""
        if facts.get("epochs") and not facts["best_epoch"]:
            line += "  no epoch was better"
        if starved := facts.get("starved"):
            line += f"  {len(starved)} experts short of tokens"
        if index + 1 < self.blocks:
            line += f"  eta {clock((self.blocks - index - 1) * sum(self._times) / len(self._times))}"
        self.console.print(line, markup=False)
        self._bar.update(self._task, completed=index + 1, description=self.stage)
        self._write({"block": index, "seconds": round(seconds, 3), **self.memory(), **facts, **self._ranks(seconds)})

    def end_steps(self, step: int, steps: int, covered: int, seconds: float, facts: dict[str, Any]) -> None:
        """One line and one record of `covered` steps of a training without blocks.

        facts: `loss`, None where no step was finite, and whatever else is known.
        """
        self._stepped += seconds
        self._times.append(seconds / covered)
        left = (steps - step) * sum(self._times) / len(self._times)
        loss = "not finite" if facts["loss"] is None else f"{facts['loss']:.4f}"
        line = f"{self.stage} step {step}/{steps}  loss {loss}  {seconds:6.1f} s  ram {peak_ram() / GIB:.1f} GiB"
        device = self._peak_device()
        line += f"  gpu {device / GIB:.1f} GiB" if device is not None else ""
        self.console.print(line + (f"  eta {clock(left)}" if step < steps else ""), markup=False)
        self._bar.update(self._task, completed=step, total=steps)
        self._write({"step": step, "seconds": round(seconds, 3), **self.memory(), **facts, **self._ranks(seconds)})

    def besides_steps(self) -> float:
        """Seconds that went into other things than steps so far; of a run that was resumed, since then."""
        return max(time.monotonic() - self._start - self._stepped, 0.0)

    def record(self, facts: dict[str, Any]) -> None:
        """One record without a line."""
        self._write(facts)

    def _ranks(self, seconds: float) -> dict[str, Any]:
        """Of several ranks what each was busy for since the last record, in seconds, and what it handed over, in bytes."""
        since = self.group.traffic - self._traffic
        self._traffic = self.group.traffic.copy()
        ranks = self.group.facts({"busy": round(seconds - since.waited, 3), "bytes": since.bytes})
        return {"ranks": ranks} if len(ranks) > 1 else {}

    def _write(self, facts: dict[str, Any]) -> None:
        if self.events is not None and self.group.first:
            with files.naming(self.events), self.events.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"stage": self.stage, **facts}) + "\n")

    def used(self) -> str:
        """Time and memory so far, for the last line of a stage."""
        device = self._peak_device()
        gpu = f", {device / GIB:.2f} GiB of device memory" if device is not None else ""
        return f"{clock(time.monotonic() - self._start)} min:s, {peak_ram() / GIB:.2f} GiB of RAM at the peak{gpu}"
