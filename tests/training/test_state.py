"""The kept state of a training."""

import torch

from lbllm_cli.pipeline.training_state import TrainingState


def test_training_state_of_another_block_counts_as_nothing(tmp_path):
    state = TrainingState(tmp_path, minutes=1)
    state.save({"a": torch.ones(2)}, {"block": 4, "loss": 0.1 + 0.2})
    assert state.load(5) is None
    tensors, facts = state.load(4)
    assert facts == {"block": 4, "loss": 0.1 + 0.2}
    assert torch.equal(tensors["a"], torch.ones(2))
    state.clear()
    assert state.load(4) is None
