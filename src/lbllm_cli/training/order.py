"""Which sequences are held out, and which of the others each step reads, of every rank."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lbllm_cli.core.splits import held_out_rows, spread_rows
from lbllm_cli.parallel.group import Group
from lbllm_cli.parallel.shares import Share, share_of, step_rows

if TYPE_CHECKING:
    from lbllm_cli.recipe.training import Schedule


class Order:
    """The order of a training's sequences.

    share: this rank's part of them. group: of ranks. settings: of the recipe. seed: of 22 bits. held: rows that judge;
    rows: those that are trained on; both numbered within the share. every: how many are trained on, of all ranks. steps: of an
    epoch.
    """

    def __init__(self, share: Share, group: Group, settings: "Schedule", seed: int):
        self.rank, self.batch, self.micro, self.seed = group.rank, settings.batch_size, settings.micro_batch_size, seed
        looked = spread_rows(share.rows, held_out_rows(share.rows, settings.held_out))
        trained = sorted(set(range(share.rows)) - set(looked))
        self.every = len(trained)
        self.held, self.rows = share.own(looked), share.own(trained)
        self._owned = [len(share_of(share.rows, rank, group.size).own(trained)) for rank in range(group.size)]
        self.steps = -(-self.every // self.batch)

    def batches(self, epoch: int) -> list[Tensor]:
        """This rank's rows of each step of an epoch, which has an order of its own."""
        generator = torch.Generator().manual_seed((self.seed << 10) + epoch)
        # Each rank has an order of its own, the first one that of a process by itself.
        orders = [torch.randperm(len(self.rows), generator=generator) for _ in range(self.rank + 1)]
        order, own = torch.tensor(self.rows)[orders[-1]], len(self.rows)
        return [order[slice(*step_rows(step, self.batch, own, self.every))] for step in range(self.steps)]

    def whole(self, step: int) -> int:
        """Rows of a step of an epoch, of all ranks."""
        return sum(last - first for first, last in (step_rows(step, self.batch, own, self.every) for own in self._owned))

    def read(self, epoch: int, step: int) -> int:
        """Rows of all ranks that are trained on by the end of a step, those of epochs before it too."""
        return epoch * self.every + min((step + 1) * self.batch, self.every)

    def pieces(self, batch: Tensor) -> list[Tensor]:
        """Micro-batches of a step's rows; of a rank that has none in it, none."""
        return list(batch.split(self.micro)) if len(batch) else []
