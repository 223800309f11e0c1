"""What a refusal lists where a stage was made from other inputs: keys of the recipe, and of hashes the first digits."""

import pytest

from lbllm_cli.core.fingerprint import changes
from lbllm_cli.pipeline.inputs import differences, text_entry, text_key
from lbllm_cli.recipe.stages import STAGES

FIRST, SECOND = "a" * 64, "b" * 64
SHORT = "9 x 32, aaaaaaaaaaaa -> 9 x 32, bbbbbbbbbbbb"


def inputs(stage: str, shape: tuple[int, int] = (9, 32), digest: str | None = FIRST, seed: int = 0, **own) -> dict:
    spec = STAGES[stage]
    keys = {f"{spec.section}.{key}": value for key, value in own.items()}
    return {"stage": stage, "runtime.seed": seed, **keys, text_key(spec): text_entry(shape, digest)}


def lines(stage: str, made: dict, now: dict) -> list[str]:
    found = differences(STAGES[stage], inputs(stage, **made), inputs(stage, **now)).splitlines()
    return [line.removeprefix("  ") for line in found]


def test_hashes_are_short():
    assert changes({"a": f"9 x 32, {FIRST}", "b": 1}, {"a": SECOND, "b": 1}) == "  a: 9 x 32, aaaaaaaaaaaa -> bbbbbbbbbbbb"


def test_the_same_is_no_difference():
    assert lines("ptq", {}, {}) == []
    # Text that is still to be sampled is known by its shape.
    assert lines("ptq", {}, {"digest": None}) == []
    assert lines("ptq", {"rounds": 1}, {"digest": None, "rounds": 2}) == ["ptq.rounds: 1 -> 2"]


def test_numbers_of_a_text_are_told_by_their_keys():
    fewer = {"shape": (4, 16), "digest": SECOND}
    assert lines("ptq", {}, fewer) == ["data.calibration.length: 32 -> 16", "data.calibration.sequences: 9 -> 4"]
    assert lines("distill", {}, {"shape": (4, 32), "digest": None}) == ["data.training.sequences: 9 -> 4"]
    assert lines("act-calib-e2e", {"sequences": 9}, {**fewer, "sequences": 4}) == [
        "act_calib.end_to_end.sequences: 9 -> 4", "data.training.length: 32 -> 16"
    ]  # fmt: skip
    # Where a part of them is read, the key of that part.
    assert lines("act-calib", {"sequences": None}, {**fewer, "sequences": 4}) == [
        "act_calib.sequences: None -> 4", "data.training.length: 32 -> 16"
    ]  # fmt: skip
    assert lines("act-calib", {"sequences": None}, {"shape": (4, 32), "digest": SECOND, "sequences": None}) == [
        "data.training.sequences: 9 -> 4"
    ]


@pytest.mark.parametrize(
    ("stage", "own", "keys"),
    [
        ("ptq", {}, "data.calibration.source, data.calibration.bos or the tokenizer"),
        ("distill", {}, "data.training.source, data.training.bos or the tokenizer"),
        ("act-calib", {"sequences": 9}, "data.training.source, data.training.sequences, data.training.bos or the tokenizer"),
        ("distill-e2e", {"sequences": 9},
         "distill.end_to_end.source, distill.end_to_end.skip, data.training or the tokenizer"),
    ],
)  # fmt: skip
def test_another_text_is_told_by_what_chooses_it(stage, own, keys):
    assert lines(stage, own, {"digest": SECOND, **own}) == [f"{keys}: {SHORT}"]
    # The seed chooses it too, and says so itself.
    assert lines(stage, own, {"digest": SECOND, "seed": 1, **own}) == ["runtime.seed: 0 -> 1"]


def test_a_record_of_no_text_is_told_as_it_is():
    made = {**inputs("ptq"), "data.calibration.tokens": "none"}
    assert differences(STAGES["ptq"], made, inputs("ptq")) == "  data.calibration.tokens: none -> 9 x 32, aaaaaaaaaaaa"
    del made["data.calibration.tokens"]
    assert differences(STAGES["ptq"], made, inputs("ptq")) == "  data.calibration.tokens: absent -> 9 x 32, aaaaaaaaaaaa"
