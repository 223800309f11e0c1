"""How far a training is."""

import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any


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
