"""Shared fixtures: toy models of every family, the trained toy, and the command line in this process."""

import json
import os
import runpy
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from shared import shared
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from lbllm_cli.data.sources import builtin_records

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "tests" / "assets"
TOY = ASSETS / "toy"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# Hidden and intermediate widths differ and neither is a multiple of the group (32), so swapped axes and ragged tails show.
SMALL = {
    "vocab_size": 1024, "hidden_size": 80, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# Every file in tests/families is a toy: what its configuration has beside SMALL.
FAMILIES = {
    file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "tests" / "families").glob("*.json"))
}

if not torch.cuda.is_available():
    # Kernels for GPUs are interpreted. It has to be there before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
# One thread: equal runs give equal bytes, and a child of fork() may use torch.
torch.set_num_threads(1)


def save_toy(folder: Path, name: str = "llama-tied", dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes) -> Path:
    """A random toy of a family, biases and norms not trivial, with the trained toy's tokenizer."""
    settings = {**SMALL, **FAMILIES[name], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                if key.endswith("bias"):
                    tensor.normal_(0, 0.1)
                elif "norm" in key:
                    tensor.uniform_(0.5, 1.5)
                else:
                    tensor.mul_(4)  # the default 0.02 makes a model whose blocks do next to nothing
    model.save_pretrained(folder, max_shard_size=shard)
    for file in TOKENIZER_FILES:
        shutil.copyfile(TOY / file, folder / file)
    return folder


def write_recipe(path: Path, model: Path, output: Path, **sections) -> Path:
    """A small recipe: 6 x 32 tokens of a novel's chapter, one evaluation set of 4 x 32, group 32."""
    # Not builtin:calibration: tokenizing its three megabytes is most of a toy's run.
    text = path.parent / "chapter.txt"
    if not text.exists():
        text.write_text(next(builtin_records("calibration", "novels"))["text"][:20_000], encoding="utf-8")
    recipe = {
        "model": {"path": str(model)},
        "output": {"dir": str(output)},
        "runtime": {"device": "cpu", "batch_size": 2},
        "data": {
            "calibration": {"source": str(text), "sequences": 6, "length": 32},
            "training": {"source": str(text), "sequences": 9, "length": 32},
            "evaluation": [{"name": "novels", "source": "builtin:evaluation/novels", "length": 32, "segments": 4}],
        },
        "ptq": {"group_size": 32, "rounds": 1},
    }
    for section, values in sections.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Random tied Llama."""
    return save_toy(tmp_path / "model")


@pytest.fixture
def recipe(tmp_path: Path, toy: Path) -> Path:
    """A recipe for `toy` that writes to tmp_path / "run"."""
    return write_recipe(tmp_path / "recipe.yaml", toy, tmp_path / "run")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` need one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


def give_tables(patch: pytest.MonkeyPatch) -> None:
    """Knee tables of 4 bits are given: the search for them is most of a toy's act-calib."""
    from lbllm_cli.act_calib.search import Sample, fit_knees
    from lbllm_cli.training.knees import Shape

    shapes = [Shape(3, 4, 4, 4, 5, 6), Shape(5, 6, 2, 2, 3, 3)]

    def fit(samples: list[Sample]) -> list[list[Shape]]:
        return [shapes[: sample.tables] if sample.bits == 4 else fit_knees([sample])[0] for sample in samples]

    patch.setattr("lbllm_cli.act_calib.fit.fit_knees", fit)


@pytest.fixture
def given_tables(monkeypatch) -> None:
    """See `give_tables`."""
    give_tables(monkeypatch)


@pytest.fixture
def little_text(monkeypatch) -> None:
    """Bundled texts end after 200,000 characters each: tokenizing megabytes is most of what a toy does with them."""

    def beginning(part: str, style: str) -> Iterator[dict[str, str]]:
        left = 200_000
        for record in builtin_records(part, style):
            yield {**record, "text": record["text"][:left]}
            left -= len(record["text"])
            if left <= 0:
                return

    monkeypatch.setattr("lbllm_cli.data.sources.builtin_records", beginning)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable:
    """once(name, make): what `make(folder)` gives, made once for all processes of a test run. Tests copy what they change."""
    return partial(shared, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def finished(once) -> Callable[..., tuple[Path, Path]]:
    """finished(*stages, family=...): a toy, and an output folder that holds these stages, each trained for one epoch."""
    from lbllm_cli.cli.app import app

    def run(*stages: str, family: str = "llama-tied") -> tuple[Path, Path]:
        def make(folder: Path) -> tuple[Path, Path]:
            if stages[:-1]:
                toy, before = run(*stages[:-1], family=family)
                shutil.copytree(before, folder / "run")
            else:
                toy = save_toy(folder / "model", family)
            recipe = write_recipe(folder / "r.yaml", toy, folder / "run", distill={"epochs": 1}, act_calib={"epochs": 1})
            with pytest.MonkeyPatch.context() as patch:
                give_tables(patch)
                result = CliRunner().invoke(app, [stages[-1], "--recipe", str(recipe)], catch_exceptions=False)
            assert result.exit_code == 0, result.stderr
            return toy, folder / "run"

        return once("-".join((family, *stages)), make)

    return run


@pytest.fixture(scope="session")
def export_of(once) -> Callable[[str], Path]:
    """export_of(family): its exported W(1+1)A4KV4 toy."""
    from packed_models import exported

    def of(family: str) -> Path:
        return once(f"export-{family}", lambda folder: exported(folder, save_toy(folder / "model", family), ptq={"rounds": 0}))

    return of


@pytest.fixture
def lbllm():
    """Runs the command line in this process: lbllm("ptq", "--recipe", path) -> result with exit_code, stdout, stderr."""
    from lbllm_cli.cli.app import app

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return run


@pytest.fixture
def ok(lbllm):
    """`lbllm`, expecting exit code 0."""

    def run(*arguments):
        result = lbllm(*arguments)
        assert result.exit_code == 0, result.stderr
        return result

    return run


class Ran(NamedTuple):
    """How a script ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., Ran]:
    """`python scripts/<name>.py ...` in this process: importing the libraries is most of what a short one takes."""

    def run(name: str, *arguments: object) -> Ran:
        path = str(ROOT / "scripts" / f"{name}.py")
        monkeypatch.setattr("sys.argv", [path, *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(path, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def in_torch(monkeypatch) -> Iterator[None]:
    """Packed models run in plain torch: bit for bit what the decoded weights give."""
    from lbllm_cli.engine.abi import library

    monkeypatch.setenv("LBLLM_KERNELS", "off")
    library.cache_clear()
    yield
    library.cache_clear()
