"""The tensors of an unfinished training: what is kept of it, and whether what was kept fits the training that goes on from it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lbllm_cli.runtime.backend import on_device

if TYPE_CHECKING:
    from lbllm_cli.training.running_mean import RunningMean

Parameters = dict[str, nn.Parameter]


def kept_tensors(
    parameters: Parameters, optimizer: torch.optim.Optimizer, mean: "RunningMean | None", best: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """What a resumed run needs, by owner and name: parameters with AdamW's moments and their running mean, and the best epoch's
    tensors."""
    tensors = {f"best/{name}": tensor for name, tensor in (best or {}).items()}
    for name, parameter in parameters.items():
        tensors[f"{name}/value"] = parameter.detach()
        tensors |= {f"{name}/{key}": moment for key, moment in optimizer.state[parameter].items()}
        if mean is not None:
            tensors[f"{name}/mean"] = mean.means[parameter]
    return tensors


def by_owner(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What `kept_tensors` gave, where it is."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.partition("/")
        found.setdefault(owner, {})[name] = tensor
    return found


@torch.no_grad()
def put_back(
    found: dict[str, dict[str, Tensor]], parameters: Parameters, optimizer: torch.optim.Optimizer, mean: "RunningMean | None"
) -> None:
    """Goes on from what `check_kept` has found right, in RAM.

    It comes to the device one by one, and what is there already in its place: whole it would need a gigabyte more than the steps
    of a 7B's block do, and a run that was stopped could not go on.
    """
    for name, parameter in parameters.items():
        parameter.copy_(on_device(found[name].pop("value"), parameter.device))
        if mean is not None:
            mean.means[parameter].copy_(on_device(found[name].pop("mean"), parameter.device))
        optimizer.state[parameter].update({key: on_device(moment, parameter.device) for key, moment in found.pop(name).items()})


def check_kept(found: dict[str, dict[str, Tensor]], parameters: Parameters, whole: dict[str, Tensor], averaged: bool) -> None:
    """Whether the tensors that were kept are those of a training.

    found: by owner and name. parameters: in training, by owner. whole: what a best epoch has. averaged: whether there
    is a running mean. Raises ValueError naming the first that is absent, of another shape, or nobody's.
    """
    expected: dict[str, Tensor] = {f"{name}/value": parameter for name, parameter in parameters.items()}
    if averaged:
        expected |= {f"{name}/mean": parameter for name, parameter in parameters.items()}
    if "best" in found:
        expected |= {f"best/{name}": tensor for name, tensor in whole.items()}
    for name, parameter in parameters.items():
        # Of a parameter that no step has moved there are none.
        if found.get(name, {}).keys() & {"exp_avg", "exp_avg_sq"}:
            expected |= {f"{name}/exp_avg": parameter, f"{name}/exp_avg_sq": parameter, f"{name}/step": parameter.new_zeros(())}
    kept = {f"{owner}/{name}": tensor for owner, tensors in found.items() for name, tensor in tensors.items()}
    if odd := sorted(kept.keys() ^ expected.keys()):
        raise ValueError(f"{odd[0]} is {'missing' if odd[0] in expected else 'of no training'}")
    for key, tensor in expected.items():
        if kept[key].shape != tensor.shape or (kept[key].dtype != tensor.dtype and not key.endswith("/step")):
            raise ValueError(f"{key} is {kept[key].dtype} {list(kept[key].shape)}, expected {tensor.dtype} {list(tensor.shape)}")
