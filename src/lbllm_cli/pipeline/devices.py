"""Whether several ranks can work on the devices that they have."""

import platform

import torch
import torch.distributed as dist

from lbllm_cli.core.errors import UsageError
from lbllm_cli.parallel.group import Group
from lbllm_cli.runtime.backend import backend_of


def check_devices(group: Group, device: torch.device) -> None:
    """Raises UsageError where ranks cannot talk by way of their devices, or two of them have the same one."""
    if group.size == 1 or (own := backend_of(device).identity(device)) is None:
        return
    if not dist.is_nccl_available():
        raise UsageError(f"{group.size} ranks on GPUs need NCCL, which this torch is built without; set runtime.device: cpu")
    taken = group.facts((platform.node(), own))
    for rank, place in enumerate(taken):
        if (other := taken.index(place)) != rank:
            raise UsageError(f"ranks {other} and {rank} have the same GPU of {place[0]}; start one rank for each GPU")
