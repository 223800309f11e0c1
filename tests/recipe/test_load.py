"""Reading a recipe: strict YAML, every mistake at once, variables, overrides, defaults."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from conftest import ROOT
from pydantic import BaseModel, ValidationError

import lbllm_cli
from lbllm_cli.core.errors import UsageError
from lbllm_cli.recipe.load import dump_recipe, load_recipe
from lbllm_cli.recipe.schema import Recipe
from lbllm_cli.recipe.text import EvaluationSet, Source

BASE = "model: {path: some/model}\noutput: {dir: runs/a}\n"


@pytest.fixture
def load(tmp_path):
    """load(text, *overrides): the recipe of a file with the two keys that have no default, and `text` below them."""

    def read(text: str = "", *overrides: str, base: str = BASE) -> Recipe:
        file = tmp_path / "recipe.yaml"
        file.write_text(base + text, encoding="utf-8")
        return load_recipe(file, list(overrides))

    return read


@pytest.fixture
def mistakes(load):
    """mistakes(text, *overrides): the lines below the headline of the refusal."""

    def lines(text: str = "", *overrides: str, base: str = BASE) -> list[str]:
        with pytest.raises(UsageError) as caught:
            load(text, *overrides, base=base)
        head, *found = str(caught.value).splitlines()
        assert head.endswith(f": {len(found)} mistake{'s' if len(found) > 1 else ''}"), head
        return [line.removeprefix("  ") for line in found]

    return lines


def test_only_model_path_and_output_dir_have_no_default(load, mistakes):
    recipe = load()
    assert (recipe.model.path, recipe.output.dir) == ("some/model", "runs/a")
    assert recipe.recipe_version == 1
    assert (recipe.ptq.group_size, recipe.ptq.asymmetric, recipe.runtime.device) == (128, "auto", "auto")
    assert [item.source for item in recipe.data.calibration.source] == ["builtin:calibration"]
    assert [item.name for item in recipe.data.evaluation] == ["novels", "technical", "modern"]
    assert mistakes(base="recipe_version: 1\n") == [
        "model: missing; this key has no default",
        "output: missing; this key has no default",
    ]
    assert mistakes(base="model: {}\noutput: {}\n") == [
        "model.path: missing; this key has no default",
        "output.dir: missing; this key has no default",
    ]


def test_all_mistakes_are_reported_at_once(mistakes):
    found = mistakes(
        """
runtme: {}
runtime: {device: gpu, batch_size: 0, sede: 3}
data:
  calibration: {sequences: "32", lenght: 512, source: [{source: a.txt, weigth: 2}, {source: b.txt, weight: 0}]}
  evaluation:
    - {name: a, source: a.txt}
    - {name: "b c", source: [{source: b.txt, text_kye: t}], length: 4}
ptq: {group_size: 100, damping: 0, em_iterations: 1.5, compensation: 1, levels: kmeans, zzz: 1}
eval: {checkpoints: [base, pqt]}
export: {shard_gb: -1, format: 3}
"""
    )
    assert set(found) == {
        "runtme: unknown key; did you mean `runtime`?",
        "runtime.device: string should match pattern '^(auto|cpu|cuda(:\\d+)?)$', got 'gpu'",
        "runtime.batch_size: input should be greater than or equal to 1, got 0",
        "runtime.sede: unknown key; did you mean `seed`?",
        "data.calibration.sequences: input should be a valid integer, got '32'",
        "data.calibration.lenght: unknown key; did you mean `length`?",
        "data.calibration.source[0].weigth: unknown key; did you mean `weight`?",
        "data.calibration.source[1].weight: input should be greater than or equal to 0.000000001, got 0",
        "data.evaluation[1].name: string should match pattern '^[A-Za-z0-9._-]+$', got 'b c'",
        "data.evaluation[1].source[0].text_kye: unknown key; did you mean `text_key`?",
        "data.evaluation[1].length: input should be greater than or equal to 8, got 4",
        "ptq.group_size: input should be a multiple of 16, got 100",
        "ptq.damping: input should be greater than 0, got 0",
        "ptq.em_iterations: input should be a valid integer, got 1.5",
        "ptq.compensation: input should be a valid boolean, got 1",
        "ptq.levels: input should be 'em' or 'quantile', got 'kmeans'",
        "ptq.zzz: unknown key; valid: asymmetric, code_descent, compensation, damping, em_iterations, group_size, group_sizes, "
        "held_out, importance, level_bits, levels, refit, rounds, sequential",
        "eval.checkpoints[1]: input should be 'base', 'ptq', 'distill', 'distill-e2e', 'act-calib', "
        "'act-calib-e2e' or 'export', got 'pqt'",
        "export.shard_gb: input should be greater than or equal to 0.000001, got -1",
        "export.format: input should be 'packed', 'compressed-tensors', 'dense' or 'gguf', got 3",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("recipe_version: 2", "recipe_version: input should be 1, got 2"),
        ("ptq: {group_size: 8}", "ptq.group_size: input should be a multiple of 16, got 8"),
        ("ptq: {group_size: 8192}", "ptq.group_size: input should be less than or equal to 4096, got 8192"),
        ("ptq: {group_size: 128.0}", "ptq.group_size: input should be a valid integer, got 128.0"),
        ("ptq: {held_out: 1}", "ptq.held_out: input should be less than 1, got 1"),
        ("data: {evaluation: []}", "data.evaluation: list should have at least 1 item"),
        ("data: {calibration: {source: []}}", "data.calibration.source: value should have at least 1 item"),
        ("data: {calibration: {source: 5}}", "data.calibration.source[0]: input should be a valid dictionary"),
        ("data: {calibration: {source: [{weight: 2}]}}", "data.calibration.source[0].source: missing"),
        ("data: {calibration: {sequences: 1}}", "data.calibration.sequences: `ptq.asymmetric: auto` holds sequences out"),
        ("ptq: 5", "ptq: input should be a valid dictionary"),
    ],
)
def test_values_out_of_range_or_of_the_wrong_kind(mistakes, text, expected):
    (found,) = mistakes(text)
    assert found.startswith(expected)


def test_evaluation_names_must_differ(mistakes):
    assert mistakes("data: {evaluation: [{name: a, source: x}, {name: a, source: y}]}") == [
        "data.evaluation: evaluation names must differ, got a, a"
    ]


def test_a_mistake_in_a_union_counts_once(mistakes):
    for value in ("2.0", "off", "none"):
        (found,) = mistakes(f"ptq: {{asymmetric: {value}}}")
        assert found.startswith("ptq.asymmetric: input should be 'auto', got ")


@pytest.mark.parametrize(("value", "expected"), [("auto", "auto"), ("0", 0), ("0.5", 0.5), ("1", 1)])
def test_asymmetric_is_auto_or_a_share(load, value, expected):
    assert load(f"ptq: {{asymmetric: {value}}}").ptq.asymmetric == expected


def test_levels_out_of_a_table_have_defaults_of_their_own(load):
    phases = "distill: {end_to_end: {}}\nact_calib: {end_to_end: {}}\n"
    four = load(phases, "ptq.level_bits=4")
    assert (four.ptq.rounds, four.step_group) == (1, 128)
    assert four.distill.end_to_end.train == ["levels", "norms"]
    found = load(phases, "ptq.level_bits=2", "ptq.group_size=16")
    assert (found.ptq.rounds, found.step_group) == (6, 32)
    assert found.distill.end_to_end.train == ["scales", "norms"]
    assert found.act_calib.end_to_end.train == ["scales", "norms", "clip_factors"]
    assert (found.distill.end_to_end.lr_levels, found.act_calib.end_to_end.lr_levels) == (0.006, 0.004)
    # What is said counts.
    said = ("ptq.rounds=1", "distill.end_to_end.train=[levels]", "act_calib.group_size=32")
    other = load(phases, "ptq.level_bits=2", *said)
    assert (other.ptq.rounds, other.step_group) == (1, 32)
    assert other.distill.end_to_end.train == ["levels"]
    assert other.distill.end_to_end.lr_levels == 0.001
    assert other.act_calib.end_to_end.train == ["scales", "norms", "clip_factors"]
    assert load("", "ptq.level_bits=2").distill.end_to_end is None


def test_one_sequence_is_enough_without_held_out_ones(load):
    assert load("data: {calibration: {sequences: 1}}\nptq: {asymmetric: 0}").data.calibration.sequences == 1


@pytest.mark.parametrize(("text", "expected"), [("1e-5", 1e-5), ("1e-05", 1e-5), ("2.5E-1", 0.25), ("+1e0", 1.0), ("0.25", 0.25)])
def test_numbers_with_an_exponent_are_numbers(load, text, expected):
    assert load(f"ptq: {{damping: {text}}}").ptq.damping == expected


@pytest.mark.parametrize(("text", "expected"), [("yes", True), ("on", True), ("off", False), ("no", False), ("true", True)])
def test_yaml_booleans_only_count_as_booleans(load, mistakes, text, expected):
    assert load(f"ptq: {{refit: {text}}}").ptq.refit is expected
    assert mistakes(f"model: {{path: {text}}}", base="output: {dir: a}\n") == [
        f"model.path: input should be a valid string, got {expected}"
    ]


def test_duplicate_keys_name_both_lines(load):
    with pytest.raises(UsageError, match=r"recipe\.yaml: line 6: duplicate key `rounds`, first on line 4; remove one"):
        load("ptq:\n  rounds: 1\n  refit: true\n  rounds: 2\n")
    with pytest.raises(UsageError, match=r"line 3: duplicate key `model`, first on line 1"):
        load("model: {path: b}\n")


@pytest.mark.parametrize(
    ("text", "key"), [("1: 2", "key 1 is read as int"), ("yes: 2", "key True is read as bool"), ("? [a]\n: 2", "as list")]
)
def test_keys_must_be_text(load, text, key):
    with pytest.raises(UsageError, match=f"line 3: .*{key}.*quotes"):
        load(text)


@pytest.mark.parametrize(
    "text",
    [
        "ptq: {",
        "\tptq: 1",
        "ptq: [1",
        "a: \x00",
        "ptq: {rounds: 2020-13-45}",
        "ptq: {rounds: 0x_}",
        "--- \na: 1",
        "a: !!python/name:os.getcwd",
    ],
)
def test_malformed_yaml_is_refused(load, text):
    with pytest.raises(UsageError, match=r"recipe\.yaml is not valid YAML: "):
        load(text)


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("# nothing\n", "NoneType"), ("- a\n", "list"), ("abc", "str")])
def test_a_file_that_is_not_a_mapping_is_refused(load, text, kind):
    with pytest.raises(UsageError, match=f"expected a mapping with recipe_version, model, output, got {kind}"):
        load(base=text)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"recipe .*nowhere\.yaml does not exist"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="is a folder; expected a file"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: \xe9}\n")
    with pytest.raises(UsageError, match=r"latin\.yaml is not UTF-8 text: byte 14 cannot be decoded"):
        load_recipe(tmp_path / "latin.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match=r"pipe\.yaml is a pipe; expected a file"):
        load_recipe(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match=r"latin\.yaml/r\.yaml cannot be read: Not a directory"):
        load_recipe(tmp_path / "latin.yaml" / "r.yaml")
    with pytest.raises(UsageError, match=r"--recipe 'a{80}\.\.\. \(9000 characters\)' is not a path: File name too long"):
        load_recipe(Path("a" * 9000))
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UsageError, match=r"large\.yaml has 1,073,741,824 bytes; at most 1,048,576 are read"):
        load_recipe(tmp_path / "large.yaml")


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(BASE, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.yaml").model.path == "some/model"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ptq: " + "[" * 33, "line 3: nested more than 32 levels deep"),
        ("ptq: " + "[" * 100_000, "line 3: nested more than 32 levels deep"),
        ("ptq: " + "{a: " * 600 + "}" * 600, "line 3: nested more than 32 levels deep"),
        ("ptq:\n" + "".join(" " * i + "- \n" for i in range(1, 600)), "nested more than 32 levels"),
        ("ptq: [" + "1," * 30_000 + "]", "line 3: more than 10,000 values, aliases unfolded"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)), "than 10,000 values"),
        ("a: &a [*a]", "line 3: the alias *a stands within what it names"),
        ("a: &a {b: {c: *a}}", "line 3: the alias *a stands within what it names"),
        ("a: *nothing", "found undefined alias 'nothing'"),
        ("a: &x {rounds: 1}\nptq: {<<: *x}", "line 4: merge keys (<<) are not read; write the keys out"),
        ("--- {}\n--- {}", "is not valid YAML: expected a single document"),
        ("a: !!bool 7", "'7' is read as bool and is none; put quotes around text"),
        ("a: !!timestamp ''", "'' is read as timestamp and is none"),
        ("a: !!int x", "'x' is read as int and is none"),
        ("a: !!int ''", "'' is read as int and is none"),
        ("a: !!float x", "'x' is read as float and is none"),
        ("a: !!binary é", "failed to convert base64"),
        ("a: !!map 7", "'7' is read as map and is none"),
        ("a: !!seq 7", "expected a sequence node"),
        ("a: !!omap [1]", "expected a mapping of length 1"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: " + "9" * 5000, "is read as int and is none"),
        ("!!binary YQ==: 1", "line 3: key b'a' is read as bytes; put quotes around it"),
        ("? {a: 1}\n: 2", "line 3: key {'a': 1} is read as dict"),
        ("a: \x07", "special characters are not allowed"),
    ],
)
def test_yaml_that_no_recipe_is(load, text, expected):
    with pytest.raises(UsageError) as caught:
        load(text)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 600
    for override in ("model=" + text.partition(": ")[2], "model=&a [*a]"):
        if "\n" not in text:
            with pytest.raises(UsageError):
                load("", override)


def test_an_alias_stands_for_what_it_names(load):
    recipe = load("data:\n  calibration: {source: &mix [a.txt, {source: b.txt, weight: 2}]}\n  training: {source: *mix}")
    assert recipe.data.training.source == recipe.data.calibration.source


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_are_finite(mistakes, value):
    for section in _sections(Recipe):
        for key, field in section.model_fields.items():
            if float in (field.annotation, *get_args(field.annotation)):
                with pytest.raises(ValidationError, match="finite number"):
                    section.model_validate({key: yaml.safe_load(value) if "e9" not in value else float(value)})
    for key in ("runtime.save_minutes", "ptq.damping", "distill.clip"):
        (found,) = mistakes("", f"{key}={value}")
        assert "input should be a finite number" in found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"runtime.seed={2**63}", "runtime.seed: integers of at most 64 bits are read, got one of 65 bits"),
        ("runtime.seed=0x" + "f" * 6000, "runtime.seed: integers of at most 64 bits are read, got one of 24001 bits"),
        (f"ptq=[{10**100}]", "ptq[0]: integers of at most 64 bits"),
        ("data.evaluation=[{name: a, source: a, segments: 100000000000000000000000000000}]", "segments: integers of at most 64"),
        ("data.evaluation=[{name: a, source: a, segments: 1e29}]", "segments: input should be a valid integer, got 1e+29"),
        (f"data.training.sequences={10**18}", "training.sequences: input should be less than or equal to 2147483647"),
        (f"data.training.length={10**18}", "training.length: input should be less than or equal to 16777216"),
        ("data.training={sequences: 1000000000, length: 1000}", "data.training: sequences: 1000000000 of 1000 tokens are"),
        ("data.evaluation=[{name: a, source: a, segments: 9999999, length: 9999}]", "evaluation[0]: segments: 9999999 of 9999"),
        ("distill.end_to_end={sequences: 2000000000}", "distill.end_to_end.sequences: 2000000000 of 512 tokens are 1,024,000,"),
        ("data.training.source={source: a, weight: 5e-324}", "weight: input should be greater than or equal to 0.000000001"),
        ("data.training.source={source: a, weight: 1e308}", "weight: input should be less than or equal to 1000000000"),
        ("data.training.source={source: 'generate:', temperature: 5e-324}", "temperature: input should be greater than or"),
        ("export.shard_gb=1e300", "export.shard_gb: input should be less than or equal to 1000000"),
        (f"data.evaluation=[{{name: {'a' * 300}, source: a}}]", "name: string should have at most 100 characters"),
        ('model.path="\\ud800"', "model.path: the text is no Unicode text: character 0 is half a pair"),
        (f"model.path={'a' * 99_990}", "override `model.path=aaa"),
        (f"ptq={'a' * 5000}", "ptq: input should be a valid dictionary"),
    ],
)
def test_numbers_and_text_beyond_all_bounds(load, override, expected):
    with pytest.raises(UsageError) as caught:
        load("", override)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_largest_seed(load):
    seed = load("", f"runtime.seed={2**63 - 1}").runtime.seed
    for index in (0, 1, 1000, 2 << 20):
        assert torch.Generator().manual_seed(seed + index).initial_seed() == seed + index


def test_variables_of_any_size_and_kind(load, mistakes, monkeypatch):
    monkeypatch.setenv("LONG", "a" * 60_000)
    monkeypatch.setenv("BOMB", "[" * 1000)
    monkeypatch.setenv("NUMBER", "9" * 30)
    monkeypatch.setenv("BYTES", os.fsdecode(b"caf\xe9"))
    (found,) = mistakes("model: {path: '" + "${env:LONG}" * 1000 + "'}", base="output: {dir: a}\n")
    assert found.startswith("model.path: text of at most 100,000 characters is read, got ")
    assert load("model: {path: '${env:BOMB}'}", base="output: {dir: a}\n").model.path == "[" * 1000
    (found,) = mistakes("runtime: {seed: '${env:NUMBER}'}")
    assert found == "runtime.seed: integers of at most 64 bits are read, got one of 101 bits"
    assert len(mistakes("data: {evaluation: '" + "${env:GONE}" * 900 + "'}")[0]) < 200
    (found,) = mistakes("model: {path: '${env:BYTES}'}", base="output: {dir: a}\n")
    assert found.startswith("model.path: the text is no Unicode text: character 3")


def test_a_message_of_a_thousand_mistakes_has_an_end(load):
    with pytest.raises(UsageError) as caught:
        load("ptq:\n" + "".join(f"  key{number}: 1\n" for number in range(1000)) + f"  {'k' * 900}: 1\n")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(": 1001 mistakes")
    assert lines[-1] == "  and 951 more"
    assert len(lines) == 52


def test_environment_variables(load, monkeypatch):
    monkeypatch.setenv("HERE", "/data/x")
    monkeypatch.setenv("SIZE", "64")
    monkeypatch.setenv("SMALL", "1e-3")
    monkeypatch.setenv("SWITCH", "false")
    monkeypatch.delenv("ABSENT", raising=False)
    recipe = load(
        """
model: {path: "${env:HERE}/${env:ABSENT:-small}", revision: "${env:ABSENT:-}"}
ptq: {group_size: "${env:SIZE}", damping: "${env:SMALL}", refit: "${env:SWITCH}", rounds: "${env:ABSENT:-3}"}
data: {calibration: {source: ["${env:HERE}.txt", {source: "${env:HERE:-no}"}]}}
""",
        base="output: {dir: 'run_${env:SIZE}'}\n",
    )
    assert (recipe.model.path, recipe.model.revision, recipe.output.dir) == ("/data/x/small", None, "run_64")
    assert (recipe.ptq.group_size, recipe.ptq.damping, recipe.ptq.refit, recipe.ptq.rounds) == (64, 1e-3, False, 3)
    assert [item.source for item in recipe.data.calibration.source] == ["/data/x.txt", "/data/x"]


@pytest.mark.parametrize("value", ["/data/run #1", "@home", "a: [", "%x", "'quoted'"])
def test_text_of_a_variable_stays_as_it_is(load, monkeypatch, value):
    monkeypatch.setenv("SOME", value)
    assert load("output: {dir: '${env:SOME}'}", base="model: {path: m}\n").output.dir == value


def test_unset_variables_name_their_keys(mistakes, monkeypatch):
    for name in ("GONE_A", "GONE_B", "GONE_C"):
        monkeypatch.delenv(name, raising=False)
    found = mistakes(
        "ptq: {rounds: '${env:GONE_A}', zz: 1}\ndata: {evaluation: [{name: a, source: '${env:GONE_B}/${env:GONE_C}'}]}"
    )
    assert len(found) == 3
    assert "ptq.rounds: environment variable GONE_A is not set; set it or write ${env:GONE_A:-default}" in found
    (both,) = (line for line in found if line.startswith("data.evaluation[0].source: "))
    assert "GONE_B is not set" in both
    assert "GONE_C is not set" in both


@pytest.mark.parametrize(
    "found",
    ["${HOME}", "${ENV:HOME}", "${env HOME}", "${env:1X}", "${env:}", "${recipedir}", "${recipe_dir", "${env:HOME", "${}",
     "${env:GONE:-${env:HOME}"],
)  # fmt: skip
def test_variables_that_are_none_are_refused(mistakes, found):
    known = "${env:NAME}, ${env:NAME:-default} and ${recipe_dir}"
    assert mistakes(f"output: {{dir: 'run/{found}'}}", base="model: {path: m}\n") == [
        f"output.dir: {found} is no variable; there are {known}, and none within another"
    ]


def test_dollars_and_what_a_variable_holds_are_text(load, monkeypatch):
    monkeypatch.setenv("SOME", "${HOME}")
    assert load("output: {dir: '$5 {a} ${env:SOME} $'}", base="model: {path: m}\n").output.dir == "$5 {a} ${HOME} $"


@pytest.mark.parametrize("section", ["data", "ptq", "distill", "act_calib", "eval", "export", "runtime"])
def test_an_empty_section_has_its_defaults(load, section):
    assert load(f"{section}:\n") == load() == load("", f"{section}=")


def test_empty_sections_within_sections(load, mistakes):
    assert load("data: {training: }").data.training.sequences == load().data.training.sequences == 256
    assert load("data: {training: {length: 64}, calibration: {length: 64}}").data.training.sequences == 256
    assert load("data: {calibration: {length: 64}}").data.calibration.sequences == 32
    assert load("distill:\n  end_to_end:\n").distill.end_to_end is None
    assert load("distill:\n  end_to_end: {}\n").distill.end_to_end.sequences == 128
    assert mistakes(base="model:\noutput: {dir: a}\n") == ["model: missing; this key has no default"]


def test_a_parent_that_the_recipe_does_not_make_is_refused(load, mistakes):
    expected = (
        "act_calib.parent: distill-e2e is what distill.end_to_end makes, which the recipe does not have; add distill.end_to_end, "
        "for example distill.end_to_end.sequences=128, or name another parent"
    )
    assert mistakes("", "act_calib.parent=distill-e2e") == [expected]
    assert mistakes("distill: {end_to_end: {}}", "distill.end_to_end=null", "act_calib.parent=distill-e2e") == [expected]
    assert load("distill: {end_to_end: {}}\nact_calib: {parent: distill-e2e}").act_calib.parent == "distill-e2e"
    for parent in ("ptq", "distill"):
        assert load("", f"act_calib.parent={parent}").act_calib.parent == parent


def test_recipe_dir_is_the_folder_of_the_file(load, tmp_path):
    recipe = load("data: {calibration: {source: '${recipe_dir}/text.txt'}}", "output.dir=${recipe_dir}/out")
    assert recipe.data.calibration.source[0].source == str(tmp_path.resolve() / "text.txt")
    assert recipe.output.dir == str(tmp_path.resolve() / "out")


def test_overrides(load):
    recipe = load(
        "data: {evaluation: [{name: a, source: x}, {name: b, source: y}]}\nptq: {rounds: 1}",
        "ptq.group_size=64",
        "ptq.rounds=5",
        "data.calibration.length=1024",
        "output.dir=a=b",
        "eval.checkpoints=[base]",
        "data.evaluation=[{name: c, source: [p, {source: q, weight: 2}]}]",
        "ptq.damping=1e-4",
        "model.revision=null",
    )
    assert (recipe.ptq.group_size, recipe.ptq.rounds, recipe.ptq.damping) == (64, 5, 1e-4)
    assert recipe.data.calibration.length == 1024
    assert recipe.data.calibration.sequences == 32
    assert recipe.output.dir == "a=b"
    assert recipe.eval.checkpoints == ["base"]
    mixture = [Source(source="p"), Source(source="q", weight=2.0)]
    assert recipe.data.evaluation == [EvaluationSet(name="c", source=mixture)]


@pytest.mark.parametrize("text", ["generate:", '"generate:"', "[generate:]"])
def test_the_source_that_is_sampled_needs_no_quotes_on_a_command_line(load, text):
    assert load("", f"data.training.source={text}").data.training.source == [Source(source="generate:")]


def test_it_needs_none_below_a_mapping_either(load):
    assert load("", "data.training.source.source=generate:").data.training.source == [Source(source="generate:")]


def test_the_source_that_is_sampled_needs_no_quotes_in_a_list(load):
    sources = load("data: {training: {source: [generate:, p]}}").data.training.source
    assert sources == [Source(source="generate:"), Source(source="p")]


def test_the_last_override_of_a_key_wins(load):
    assert load("", "ptq.rounds=5", "ptq.rounds=7").ptq.rounds == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ptq.group_sise=64", "ptq.group_sise: unknown key; did you mean `group_size`?"),
        ("data.calibraton.length=64", "data.calibraton: unknown key; did you mean `calibration`?"),
        ("ptq.group_size=abc", "ptq.group_size: input should be a valid integer, got 'abc'"),
        ("model.path=", "model.path: input should be a valid string, got None"),
    ],
)
def test_overrides_are_checked_as_the_file_is(mistakes, override, expected):
    assert mistakes("", override) == [expected]


@pytest.mark.parametrize(
    "override",
    ["ptq.rounds", "=3", "", "ptq..rounds=3", "ptq.=3", ".ptq=3", "ptq rounds=3", "ptq[0]=3", "--ptq=3", "a" + ".a" * 13 + "=1"],
)
def test_malformed_overrides_are_refused(load, override):
    with pytest.raises(UsageError) as caught:
        load("", override)
    assert str(caught.value) == f"override `{override}`: expected key.sub=value, for example ptq.group_size=64"


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        ("", "ptq.rounds=[1", "override `ptq.rounds=[1` is not valid YAML"),
        ("data: {evaluation: [{name: a, source: x}]}", "data.evaluation.name=b", "`evaluation` is a list, replace it whole"),
        ("ptq: 5", "ptq.rounds=1", "`ptq` is a int, replace it whole"),
        ("ptq: abc", "ptq.rounds=1", "`ptq` is a str, replace it whole"),
    ],
)
def test_overrides_that_do_not_fit_the_file(load, text, override, expected):
    with pytest.raises(UsageError) as caught:
        load(text, override)
    assert expected in str(caught.value)


def test_an_override_below_a_source_that_is_a_plain_name(load):
    recipe = load(
        "data: {calibration: {source: a.jsonl}}", "data.calibration.source.text_key=body", "data.calibration.source.split=dev"
    )
    assert recipe.data.calibration.source == [Source(source="a.jsonl", text_key="body", split="dev")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data: {calibration: {source: [a, {source: b, weight: 1e-3, messages_key: m}], bos: yes}}\nptq: {asymmetric: 0.125}",
        "model: {path: m, revision: '1e-5'}",
        "model: {path: m, revision: '12e4567'}",
        "model: {path: 'on', revision: '0123'}",
        "model: {path: \"a\\nb: #c é 模型\", revision: '2020-01-01'}",
        "eval: {checkpoints: [ptq, base]}\nexport: {format: dense, shard_gb: 1}",
    ],
)
def test_a_dumped_recipe_loads_as_the_same_recipe(load, tmp_path, text):
    recipe = load(text, base="output: {dir: o}\n" if text.startswith("model") else BASE)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(dumped)
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)
    written = yaml.safe_load(dump_recipe(load()))
    assert set(written["ptq"]) == set(type(recipe.ptq).model_fields)


def test_recipes_do_not_change_later(load):
    recipe = load()
    source = recipe.data.calibration.source[0]
    for section, key, value in ((recipe, "model", None), (recipe.ptq, "rounds", 9), (source, "weight", 2.0)):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, value)


def test_shipped_recipes_load():
    shipped = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(shipped) > 0
    for file in shipped:
        assert isinstance(load_recipe(file), Recipe), file


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _sections(field.annotation)
    for inner in get_args(annotation):
        yield from _sections(inner)


def test_every_recipe_key_is_read_by_the_program():
    sections = set(_sections(Recipe))
    assert {section.__name__ for section in sections} >= {"Recipe", "Ptq", "Source", "EvaluationSet", "Export"}
    package = Path(lbllm_cli.__file__).parent
    read: set[str] = set()
    for file in package.rglob("*.py"):
        if file.parent.name != "recipe":
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    unread = {f"{section.__name__}.{key}" for section in sections for key in section.model_fields if key not in read}
    # The version is checked by its type alone; `train` is read as `trained`, with its default filled in.
    assert unread <= {"Recipe.recipe_version", "Distill.train"}, "other keys do nothing"
    assert "trained" in read
