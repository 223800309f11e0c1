"""Makes this process one with a GPU: before the package under test is imported."""

import torch
from simulated_gpu.accounting import Rates
from simulated_gpu.device import Device
from simulated_gpu.patches import patch
from simulated_gpu.regions import Regions, share_inputs

from lbllm_cli.runtime.cards import CARDS, Card

Installed = tuple[Device, Regions]


def become(device: Device, card: Card) -> None:
    """Lets a device have the memory and the rates of a card, as its maker says."""
    device.accounts.rates = Rates(card.bandwidth, {"bf16": card.bf16, "fp32": card.fp32, "int8": card.int8})
    device.total = int(card.memory)


def install(shape: bool = False) -> Installed:
    """The device of this process, an H100 until it becomes another. shape: large tensors have no values."""
    torch.set_num_threads(1)
    device = Device(shape)
    become(device, CARDS["h100"])
    device.install()
    patch(device)
    regions = Regions(device)
    regions.install()
    share_inputs()
    return device, regions
