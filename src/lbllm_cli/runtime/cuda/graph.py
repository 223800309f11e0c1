"""Captured work: a function of tensors that stay where they are, replayed as one CUDA graph."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given")


def capturable(tensor: Tensor) -> bool:
    """Whether work on such tensors can be captured: on a GPU, and not on what stands for one in tests."""
    return tensor.is_cuda and type(tensor) is Tensor


class Replayed(Generic[Given]):
    """`work`, which does the same to the same tensors in every call, and once as well as twice.

    captures: whether it is captured in the first call, after one in which kernels are compiled; else every call is one of `work`.
    What `work` is given is not kept: it has to lie where it lay in the first call.
    """

    def __init__(self, work: Callable[[Given], None], device: torch.device, captures: bool):
        self._work, self._device, self._captures = work, device, captures
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, given: Given) -> None:
        if not self._captures:
            self._work(given)
            return
        if self._graph is None:
            self._graph = self._captured(given)
        self._graph.replay()

    def _captured(self, given: Given) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self._device):
            # Not on the stream that others wait for: what is set up in a first call cannot be captured there.
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self._work(given)
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating: what they do is not captured.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                self._work(given)
        return graph
