"""Which text a stage reads beside the others."""

import pytest

from lbllm_cli.data import encode
from lbllm_cli.pipeline.plan import _divided, prepare
from lbllm_cli.recipe.load import load_recipe
from lbllm_cli.recipe.stages import STAGES, TABLE

RECORDS = 3000


@pytest.fixture
def streamed(monkeypatch):
    """Every dataset of the hub holds numbered records."""
    texts = [" ".join(f"{number:04d}{place}" for place in range(9)) for number in range(RECORDS)]
    monkeypatch.setattr("datasets.load_dataset", lambda *of, **more: iter([{"text": text} for text in texts]))
    monkeypatch.setattr(encode, "BATCH", 64)


def records_of(plan, name: str) -> set[str]:
    """The numbers of the records that a stage's text holds something of."""
    rows = plan.stage_tokens(STAGES[name])
    return {word[:4] for row in rows for word in plan.tokenizer.decode(row).split() if len(word) == 5}


@pytest.mark.parametrize("skip", ["null", "9", "14", "20", "40"])
def test_fresh_text_of_the_hub_is_fresh_whatever_number_says_so(recipe, streamed, skip):
    overrides = [
        "data.training.source=hub:some/data", "distill={end_to_end: {sequences: 5}}",
        f"act_calib={{end_to_end: {{sequences: 7, skip: {skip}}}}}",
    ]  # fmt: skip
    plan = prepare(load_recipe(recipe, overrides), stages=TABLE)
    training, first, second = (records_of(plan, name) for name in ("distill", "distill-e2e", "act-calib-e2e"))
    assert min(map(len, (training, first, second))) > 4
    assert not training & first
    assert not training & second
    # A number that leaves out the training text alone reads the first phase's once more.
    assert bool(first & second) == (skip == "9")


def test_fresh_text_is_fresh_where_its_passages_come_again(recipe, streamed):
    fresh = "{sequences: 5, source: {source: 'hub:some/data', repeats: 1}}"
    overrides = ["data.training.source=hub:some/data", f"distill={{end_to_end: {fresh}}}"]
    plan = prepare(load_recipe(recipe, overrides), stages=TABLE)
    training, phase = (records_of(plan, name) for name in ("distill", "distill-e2e"))
    assert phase
    assert not training & phase


def test_fresh_text_is_fresh_wherever_phases_list_it(recipe, tmp_path):
    """A text that data.training lacks has one order in both phases."""
    for name in "ab":
        # Each word of its own, so that windows are.
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{number}" for number in range(1000)), encoding="utf-8")
    a, b = (str(tmp_path / f"{name}.txt") for name in "ab")
    phases = [f"distill={{end_to_end: {{sequences: 40, source: ['{a}', '{b}']}}}}",
              f"act_calib={{end_to_end: {{sequences: 40, source: '{b}'}}}}"]  # fmt: skip
    plan = prepare(load_recipe(recipe, ["data.training.length=16", *phases]), stages=TABLE)
    read = (plan.stage_tokens(STAGES[name]).tolist() for name in ("distill-e2e", "act-calib-e2e"))
    first, second = (set(map(tuple, rows)) for rows in read)
    assert (len(first), len(second)) == (40, 40)
    assert not first & second


@pytest.mark.parametrize(
    ("skip", "sets", "expected"),
    [
        (9, (9,), (9,)), (14, (9, 5), (9, 5)), (20, (9, 5), (9, 5, 6)), (4, (9, 5), (4,)), (11, (9, 5), (9, 2)),
        (7, (), (7,)), (0, (9,), ()),
    ],
)  # fmt: skip
def test_a_number_is_divided_as_the_sets_are(skip, sets, expected):
    assert _divided(skip, sets) == expected
    assert sum(expected) == skip
