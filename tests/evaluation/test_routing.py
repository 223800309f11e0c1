"""Agreement of choices, by hand."""

import torch

from lbllm_cli.evaluation.routing import agreements


def test_order_does_not_count():
    teacher = [torch.tensor([[0, 3], [1, 2]], dtype=torch.int16), torch.tensor([[5, 4]], dtype=torch.int16)]
    student = [torch.tensor([[3, 1], [2, 1]], dtype=torch.int16), torch.tensor([[0, 1]], dtype=torch.int16)]
    assert agreements(teacher, student) == (3, 6)
    assert agreements(teacher, teacher) == (6, 6)
