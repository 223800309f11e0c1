"""What lies between GPUs: bytes a second of one direction, as makers say."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A kind of connection. bandwidth: bytes a second, in each direction. latency: seconds until an operation's first byte is
    there; an assumption, as is `reached`, the share of the bandwidth that large operations get. cards: that a machine has of it.
    """

    name: str
    bandwidth: float
    latency: float
    reached: float = 0.8
    cards: int = 1

    def seconds(self, size: float, operations: float = 1) -> float:
        """For `size` bytes in some operations."""
        return size / (self.reached * self.bandwidth) + operations * self.latency


# Of a GPU, to the others of its machine.
NVLINK = Link("NVLink", 450e9, 15e-6)
PCIE = Link("PCIe 5 x16", 64e9, 25e-6)
# Of a machine, to the others.
FAST = Link("400 Gb/s", 50e9, 40e-6)
SLOW = Link("100 Gb/s", 12.5e9, 40e-6)
INSIDE, BETWEEN = (NVLINK, PCIE), (FAST, SLOW)
