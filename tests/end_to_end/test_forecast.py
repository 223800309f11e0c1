"""What an end-to-end phase is going to need."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from phases import student_of
from stages import refused

import lbllm_cli.hf  # noqa: F401 - packed folders
from lbllm_cli.training.forecast import KEPT_DEPLOYED, KEPT_SOFT


@pytest.mark.parametrize(("knees", "tensors"), [([], KEPT_DEPLOYED), (["knees"], KEPT_SOFT)])
def test_forecast_covers_what_quantizing_keeps(made, knees, tensors):
    student = student_of(made, "act-calib", train=["clip_factors", *knees])
    quantizer = next(iter(student.blocks[0].quantizers.values()))
    quantizer.temperature = 0.5
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.randn(512, quantizer.size * 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = quantizer.values(inputs)
    found = sum(kept.values()) / inputs.nbytes
    assert output.shape == inputs.shape
    assert 0.8 * tensors < found < 1.05 * tensors


def test_validate_forecasts_the_phases_that_the_recipe_has(ok, run):
    found = [json.loads(ok("validate", "--recipe", recipe, "--json").stdout) for recipe in (run(), run("both", {}, {}))]
    stages = [set(facts["forecast_bytes"]) for facts in found]
    assert stages[1] - stages[0] == {"distill-e2e", "act-calib-e2e"}
    need = found[1]["forecast_bytes"]
    assert need["act-calib-e2e"]["device"] > need["distill-e2e"]["device"]
    # The teacher's last hidden states, float32.
    states = 24 * 32 * 80 * 4
    assert need["distill-e2e"]["streams"] == states
    elsewhere = json.loads(ok("validate", "--recipe", run("kept", {"teacher": "kept"}), "--json").stdout)["forecast_bytes"]
    assert need["distill-e2e"]["teacher"] == 0
    # While the teacher runs, a block's inputs lie beside its outputs.
    assert elsewhere["distill-e2e"]["teacher"] == 2 * states
    assert elsewhere["distill-e2e"]["disk"] <= need["distill-e2e"]["disk"] - states


def test_disk_of_the_teacher_s_folder(ok, lbllm, run, tmp_path, other_disk, monkeypatch):
    """The states are asked for where they are to lie, and not again once they do."""
    kept, usage = other_disk / "kept", namedtuple("usage", "total used free")
    free = {True: 10**5, False: 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**10, 0, free[other_disk in (folder, *folder.parents)]))
    kept.mkdir()
    command = ("distill", "--recipe", run(distill={"teacher": str(kept)}), "--only", "end-to-end")
    message = refused(lbllm, tmp_path / "run", *command)
    assert f"GiB of disk in {kept}" in message
    assert "choose another end_to_end.teacher" in message
    free[True] = 10**6
    ok(*command)
    free[True] = 0
    ok(*command, "--force")
