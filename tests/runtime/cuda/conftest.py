"""Where kernels run: on a GPU, or interpreted."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """cuda, or the CPU, where Triton interprets (see tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
