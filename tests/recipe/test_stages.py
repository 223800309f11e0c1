"""The table of stages: what the schema, the packages and the commands make of it."""

import importlib

import pytest
from conftest import write_recipe

from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.stages import COMMANDS, NOT_IN_FINGERPRINT, STAGES, TABLE


@pytest.fixture
def loaded(tmp_path):
    last = {"sequences": 4}
    recipe = write_recipe(
        tmp_path / "r.yaml", tmp_path, tmp_path / "run", distill={"end_to_end": last}, act_calib={"end_to_end": last}
    )
    return load_recipe(recipe)


def test_every_key_of_a_stage_is_read_or_said_not_to_matter(loaded):
    """A key that is added to a section and put nowhere would leave the fingerprint, or enter it, without a word."""
    for spec in TABLE:
        keys = set(type(loaded.section(spec.section)).model_fields)
        assert set(spec.reads) <= keys, spec
        nested = {other.section.rpartition(".")[2] for other in TABLE if other.section.startswith(f"{spec.section}.")}
        silent = {key for key in keys - set(spec.reads) - nested if f"{spec.section}.{key}" not in NOT_IN_FINGERPRINT}
        assert not silent, f"{spec}: {silent} is neither in its `reads` nor in NOT_IN_FINGERPRINT"


def test_what_is_said_not_to_matter_are_keys_and_sections(loaded):
    for key in NOT_IN_FINGERPRINT:
        owner, _, last = key.rpartition(".")
        section = loaded.section(owner) if owner else loaded
        assert last in type(section).model_fields, key
        spec = next((spec for spec in TABLE if spec.section == owner), None)
        assert spec is None or last not in spec.reads, key


def test_parents_come_before_and_names_are_folders(loaded):
    names = list(STAGES)
    for spec in TABLE:
        assert all(names.index(parent) < names.index(spec.name) for parent in spec.parents)
        assert (spec.parents == ()) == (spec is TABLE[0])
        assert spec.command in COMMANDS
        assert loaded.section(spec.section) is not None
    assert loaded.parent(STAGES["act-calib"]) is STAGES["distill-e2e"]


def test_every_stage_has_its_work():
    for spec in TABLE:
        module = importlib.import_module(f"lbllm_cli.{spec.package}.stage")
        assert all(callable(getattr(module, name)) for name in ("check", "need", "activations", "run")), spec


def test_the_printed_table_is_what_make_reads(lbllm, tmp_path):
    plain = write_recipe(tmp_path / "r.yaml", tmp_path, tmp_path / "run")
    lines = lbllm("config", "--stages", "--recipe", plain).stdout.splitlines()
    assert [line.split("\t") for line in lines] == [
        ["ptq", "-", "lbllm ptq"],
        ["distill", "ptq", "lbllm distill --only blocks"],
        ["act-calib", "distill", "lbllm act-calib --only blocks"],
    ]
    other = lbllm("config", "--stages", "--recipe", plain, "act_calib.parent=ptq").stdout.splitlines()
    assert other[2].split("\t")[1] == "ptq"
