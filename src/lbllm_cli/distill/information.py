"""The Fisher information of all blocks: a pass of the full-precision model over some sequences, and one on the way back.

Block by block, as everything else: what enters each block is kept on the way there, so that never more than one is in memory.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lbllm_cli.core import files, interrupt
from lbllm_cli.core.own_folders import remove_own
from lbllm_cli.core.splits import data_seed, spread_rows
from lbllm_cli.distill.fisher import add_information, last_slopes, slopes_before
from lbllm_cli.pipeline.folders import INFORMATION
from lbllm_cli.pipeline.streams import HiddenStream, advance, embed_stream, fetched, row_slices, sink
from lbllm_cli.pipeline.work import StageRun

_MATRIX = "information"


class Information:
    """Matrices of all blocks of a stage's model, in files of a folder that is there as long as the stage is unfinished.

    count: sequences of all ranks that they are of, spread over those of the stage; every rank takes as many of its own.
    """

    def __init__(self, run: StageRun, count: int):
        self.run, self.model, self.group = run, run.plan.model, run.plan.group
        self.folder = run.writer.path / "information"
        own = run.tokens[self.group.share(len(run.tokens)).slice]
        self.tokens = own[spread_rows(len(own), min(-(-count // self.group.size), len(own)))]
        place = run.need.place
        self._on_disk, self._device = place == "disk", self.model.device if place == "device" else None
        self._tail = "" if self.group.size == 1 else f".rank{self.group.rank:03d}"

    def block(self, index: int) -> Tensor:
        """Of block `index`, float32 [hidden, hidden] on the device."""
        return load_file(self._file(index))[_MATRIX].to(self.model.device)

    def _file(self, index: int) -> Path:
        return self.folder / f"block_{index:03d}.safetensors"

    def make(self) -> None:
        """Finds them, where the stage has not done so before it was stopped."""
        # The last one that is written is that of the first block.
        if self.group.told(self._file(0).exists):
            return
        if self.group.first:
            self.folder.mkdir(exist_ok=True)
        self.group.meet()
        entering = self._forward()
        slopes = self._last_slopes(entering[-1])
        for index in reversed(range(self.model.blocks)):
            outputs = entering.pop()
            self.run.reporter.tick(f"what predictions hang on, block {index + 1}/{self.model.blocks}")
            self._add(index, outputs, slopes)
            outputs.remove()
            if index:
                self._back(index, entering[-1], slopes)
        for stream in (*entering, slopes):
            stream.remove()
        self.group.meet()

    def remove(self) -> None:
        """Once all blocks are done."""
        if self.group.first:
            remove_own(self.folder, INFORMATION)

    def _path(self, name: str) -> Path | None:
        return self.folder / f"{name}{self._tail}.bin" if self._on_disk else None

    def _forward(self) -> list[HiddenStream]:
        """What enters each block, and what leaves the last."""
        model, size = self.model, self.run.plan.recipe.runtime.batch_size
        found = [embed_stream(model, self.tokens, self._path("entering_000"), size, self._device)]
        for index in range(model.blocks):
            interrupt.check()
            self.run.reporter.tick(f"what predictions hang on, the way there, block {index + 1}/{model.blocks}")
            found.append(found[-1].like(self._path(f"entering_{index + 1:03d}")))
            advance(model.block(index), found[-2], found[-1], model.device, size)
        return found

    def _last_slopes(self, states: HiddenStream) -> HiddenStream:
        """Gradients by the last block's outputs."""
        whole: Any = self.model.head()
        norm, head = whole
        slopes, device = states.like(self._path("slopes")), self.model.device
        seed = (data_seed(self.run.plan.recipe.runtime.seed, 0) << 10) + self.group.rank
        chance = torch.rand(self.tokens.shape, generator=torch.Generator().manual_seed(seed))
        pieces = row_slices(states.rows, 1)
        with sink(slopes, device) as out:
            for rows, (hidden,) in zip(pieces, fetched((states,), pieces, device), strict=True):
                interrupt.check()
                out.put(rows, last_slopes(hidden, norm, head, chance[rows].to(device)))
        return slopes

    def _add(self, index: int, outputs: HiddenStream, slopes: HiddenStream) -> None:
        """The matrix of block `index` to its file."""
        hidden, device = outputs.shape[2], self.model.device
        total = torch.zeros(hidden, hidden, device=device)
        for found in fetched((outputs, slopes), row_slices(outputs.rows, 1), device):
            add_information(total, *found)
        self.group.add(total)
        if self.group.first:
            files.write_atomic(self._file(index), partial(save_file, {_MATRIX: total.cpu()}))

    def _back(self, index: int, inputs: HiddenStream, slopes: HiddenStream) -> None:
        """Gradients by the inputs of block `index`, in the place of those by its outputs."""
        block, device = self.model.block(index), self.model.device
        pieces = row_slices(inputs.rows, 1)
        with sink(slopes, device) as out:
            for rows, found in zip(pieces, fetched((inputs, slopes), pieces, device), strict=True):
                interrupt.check()
                out.put(rows, slopes_before(block, *found))
