"""Fingerprints: every key of the schema changes those of the stages that read it, or is said not to matter."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import save_toy, write_recipe
from pydantic import BaseModel

from lbllm_cli.pipeline.lineage import stage_inputs
from lbllm_cli.pipeline.plan import Plan, prepare
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.stages import NOT_IN_FINGERPRINT, TABLE

TOKENS = torch.zeros(2, 8, dtype=torch.int64)
# Another valid value where adding to the present one, or the other of two, gives none.
OTHERS = {
    "model.dtype": "bfloat16",
    "ptq.group_size": 64,
    "ptq.group_sizes": {"layers.*.self_attn.o_proj": 64},
    "ptq.levels": "quantile",
    "ptq.importance": "hessian_diagonal",
    "ptq.asymmetric": 0.5,
    "distill.ema_decay": 0.9,
    "distill.parametrisation": "bitmap",
    "distill.polarise_beta": [2.0, 3.0],
    "act_calib.parent": "ptq",
    "act_calib.sequences": 5,
    "act_calib.granularity": "token",
    "act_calib.group_size": 64,
    "act_calib.form": "uniform",
    "act_calib.kv_form": "uniform",
    "act_calib.tables": 1,
    "act_calib.key_centre": "mean",
    "act_calib.temperature": [1.0, 0.1],
    "act_calib.end_to_end.soft_knee": [1.0, 0.1],
    **{f"{section}.loss": "plain" for section in ("distill", "act_calib")},
    **{f"{section}.channel_cap": 30.0 for section in ("distill", "act_calib")},
    **{f"{section}.train": ["levels"] for section in ("distill", "act_calib", "distill.end_to_end", "act_calib.end_to_end")},
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    folder = tmp_path_factory.mktemp("lineage")
    last = {"sequences": 4}
    path = write_recipe(
        folder / "r.yaml",
        save_toy(folder / "model"),
        folder / "run",
        distill={"end_to_end": last},
        act_calib={"end_to_end": last},
    )
    return prepare(load_recipe(path), stages=TABLE)


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe that is no section of its own, with its value."""
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def other(key: str, value: Any) -> Any:
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.7 * value + 0.0137


def changed(recipe: Recipe, key: str, value: Any) -> Recipe:
    """The recipe with another value, unchecked: whether values fit together is not what is asked here."""
    head, _, rest = key.partition(".")
    inner = changed(getattr(recipe, head), rest, value) if rest else value
    return recipe.model_copy(update={head: inner})


def matters(key: str) -> bool:
    parts = key.split(".")
    return not any(".".join(parts[:count]) in NOT_IN_FINGERPRINT for count in range(1, len(parts) + 1))


def inputs(plan: Plan, recipe: Recipe) -> dict[str, dict[str, Any]]:
    now = Plan(recipe, plan.output, plan.model, plan.tokenizer)
    return {spec.name: stage_inputs(now, spec, TOKENS) for spec in TABLE}


def test_every_key_that_matters_changes_the_stages_that_read_it(plan):
    before, seen = inputs(plan, plan.recipe), 0
    for key, value in leaves(plan.recipe):
        if not matters(key):
            continue
        after = inputs(plan, changed(plan.recipe, key, other(key, value)))
        section = key.rpartition(".")[0]
        readers = {spec.name for spec in TABLE if spec.section == section} or {spec.name for spec in TABLE}
        assert {name for name in before if before[name] != after[name]} == readers, key
        seen += 1
    assert seen > 70


def test_no_key_that_does_not_matter_changes_any(plan):
    before = inputs(plan, plan.recipe)
    spare = {
        "model.path": "elsewhere", "model.revision": "v2", "output.dir": "elsewhere", "runtime.device": "cuda",
        "runtime.streams": "disk", "distill.end_to_end.source": None, "distill.end_to_end.skip": 7,
        "distill.end_to_end.recompute": "never", "distill.end_to_end.teacher": "elsewhere",
        "act_calib.end_to_end.skip": 7, "act_calib.end_to_end.recompute": "never", "act_calib.end_to_end.teacher": "elsewhere",
    }  # fmt: skip
    for key, value in leaves(plan.recipe):
        if matters(key):
            continue
        again = spare.get(key, other(key, value) if isinstance(value, int | float) else value)
        assert inputs(plan, changed(plan.recipe, key, again)) == before, key


def test_the_tokens_count_and_not_where_they_come_from(plan):
    for spec in TABLE:
        first, second = (stage_inputs(plan, spec, tokens) for tokens in (TOKENS, TOKENS + 1))
        assert {key for key in first if first[key] != second[key]} == {f"{spec.text}.tokens"}
