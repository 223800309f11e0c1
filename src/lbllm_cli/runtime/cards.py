"""What the makers of some cards say of them: memory, its bandwidth, and operations a second without sparsity."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A kind of GPU, or whatever else computes. name: as people say it. marks: texts of which a driver's name holds one.

    memory: bytes. bandwidth: of it, bytes a second. bf16: FLOP a second of matrix products, float32 sums. fp32: FLOP a second.
    int8: operations a second of matrix products, int32 sums. reached, passed: shares of operations and of bandwidth that programs
    reach; an assumption, but for what was measured on the spot. launch: seconds that a kernel takes whatever it does.
    """

    name: str
    marks: tuple[str, ...]
    memory: float
    bandwidth: float
    bf16: float
    fp32: float
    int8: float
    reached: float = 0.6
    passed: float = 0.8
    launch: float = 2.5e-6


CARDS = {
    key: Card(name, marks, memory * 1e9, bandwidth * 1e12, bf16 * 1e12, fp32 * 1e12, int8 * 1e12)
    for key, name, marks, memory, bandwidth, bf16, fp32, int8 in (
        ("h200", "H200", ("H200",), 141, 4.8, 989, 67, 1979),
        ("h100", "H100", ("H100",), 80, 3.35, 989, 67, 1979),
        ("a100", "A100 80 GB", ("A100",), 80, 2.04, 312, 19.5, 624),
        ("4090", "RTX 4090", ("4090",), 24, 1.01, 165, 82.6, 661),
        ("3090", "RTX 3090", ("3090",), 24, 0.94, 71, 35.6, 284),
        ("l4", "L4", ("L4",), 24, 0.3, 121, 30.3, 242),
    )
}


def card_of(name: str) -> Card | None:
    """The card that a driver calls so: "NVIDIA H100 80GB HBM3" -> H100."""
    words = name.replace("-", " ").split()
    return next((card for card in CARDS.values() if any(mark in words for mark in card.marks)), None)


def probed(device: torch.device, seconds: float = 0.5) -> Card:
    """What a device without a maker's figures reaches: products in float32 and a copy, measured in about so many seconds."""
    size = 1024
    a, b = torch.randn(2, size, size, device=device)
    whole = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    other = torch.empty_like(whole)

    def rate(work: Callable[[], object], each: float) -> float:
        work()
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds / 2:
            work()
            count += 1
        return count * each / (time.perf_counter() - began)

    products = rate(lambda: torch.mm(a, b), 2.0 * size**3)
    bandwidth = rate(lambda: other.copy_(whole), 2.0 * len(whole))
    return Card("this machine", (), 0.0, bandwidth, products, products, products, reached=1.0, passed=1.0, launch=0.0)
