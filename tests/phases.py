"""What tests of end-to-end phases share."""

from pathlib import Path

import torch
from stages import events

from lbllm_cli.end_to_end.student import WholeStudent
from lbllm_cli.models.model import open_model
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.recipe.schema import Model
from lbllm_cli.recipe.training import ActEndToEnd, DistillEndToEnd

PHASE = {"sequences": 24, "epochs": 1, "batch_size": 2}
STAGES = ("ptq", "distill", "act-calib")
CPU = torch.device("cpu")


def phase(folder: Path) -> dict:
    """What is recorded of the phase as a whole."""
    return next(record for record in events(folder) if "phase" in record)


def student_of(made, stage: str, **settings) -> WholeStudent:
    toy, output = made
    kind = ActEndToEnd if stage == "act-calib" else DistillEndToEnd
    return WholeStudent(open_model(Model(path=str(toy)), CPU), Checkpoint(output, stage), kind(**PHASE, **settings))
