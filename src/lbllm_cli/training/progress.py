"""How far a training is, and whether what was kept of one fits the training that goes on from it."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass
class Progress:
    """How far a training is: everything a resumed run needs beside the tensors.

    recent, recent_seconds: losses of the steps that are not yet in a record, and what these took.
    """

    block: int
    epoch: int = 0
    step: int = 0
    skipped: int = 0
    taken: int = 0
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    norm_max: float = 0.0
    usual_norm: float = 0.0
    seconds: float = 0.0
    best: int = 0
    best_loss: float = 1.0
    recent: list[float] = field(default_factory=list)
    recent_seconds: float = 0.0
    start: dict[str, float] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)


def kept_progress(facts: dict[str, Any], epochs: int, steps: int, errors: Collection[str]) -> Progress:
    """Progress out of what was kept of it. epochs, steps of each: of the training. errors: names of held-out errors.

    Raises ValueError with the reason where it is that of no such training.
    """
    # Here alone: a training step is measured where there is no pydantic.
    from pydantic import TypeAdapter, ValidationError

    from lbllm_cli.core.validation import describe

    try:
        TypeAdapter(Progress).validate_json(json.dumps(facts), strict=True)
    except ValidationError as error:
        raise ValueError(describe(error)) from None
    if unknown := facts.keys() - {item.name for item in fields(Progress)}:
        raise ValueError(f"{sorted(unknown)[0]} is of no training")
    found = Progress(**facts)
    if not (0 <= found.epoch <= epochs and 0 <= found.step <= steps and 0 <= found.best <= found.epoch):
        raise ValueError(f"epoch {found.epoch}, step {found.step}, best epoch {found.best} of {epochs} epochs of {steps} steps")
    if not found.start.keys() >= set(errors):
        raise ValueError(f"the errors of its start are {', '.join(found.start) or 'missing'}; expected {', '.join(errors)}")
    if len(found.epochs) != found.epoch or any(not isinstance(epoch.get("held_out"), dict) for epoch in found.epochs):
        raise ValueError(f"{len(found.epochs)} records of {found.epoch} epochs")
    return found


def check_kept(found: dict[str, dict[str, Tensor]], parameters: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Whether the tensors that were kept are those of a training.

    found: by owner and name. parameters: in training, by owner. whole: what a best epoch has. Raises ValueError naming
    the first that is absent, of another shape, or nobody's.
    """
    expected = {f"{name}/value": parameter for name, parameter in parameters.items()}
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
