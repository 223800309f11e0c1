"""What a stage takes of its sequences."""

from types import SimpleNamespace

import torch

from lbllm_cli.parallel.group import ALONE
from lbllm_cli.pipeline import block_loop
from lbllm_cli.pipeline.block_loop import BlockTask


def test_a_sample_is_of_every_source(monkeypatch):
    """Of 64 sequences, of which three sources have every third; at equal distances all eight were of one."""
    monkeypatch.setattr(block_loop, "fetched", lambda streams, rows, device: [(rows[0].float().view(-1, 1, 1),)])
    task = SimpleNamespace(share=ALONE.share(64), group=ALONE, device=torch.device("cpu"))
    taken = BlockTask.sample(task, None, 8).flatten().long()
    assert taken.tolist() == taken.unique().tolist()
    assert torch.bincount(taken % 3).tolist() == [2, 3, 3]
    assert torch.equal(BlockTask.sample(task, None, 100).flatten(), torch.arange(64.0))
