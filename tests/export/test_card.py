"""The card of an export: what the Hub reads of it, and where the source comes from."""

import json

import pytest
import torch
from conftest import save_toy, write_recipe
from huggingface_hub import metadata_load

from lbllm_cli.export.base import Form
from lbllm_cli.export.card import Described, model_card
from lbllm_cli.export.formats import exporter
from lbllm_cli.models.model import open_model
from lbllm_cli.pipeline.checkpoint import Checkpoint
from lbllm_cli.recipe.schema import Model

CARD = "---\nlicense: other\nlicense_name: toy\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [theirs]\n---\n# Theirs\n"
FIXED = {"pipeline_tag": "text-generation", "library_name": "transformers", "tags": ["lbllm", "2-bit"]}


@pytest.fixture
def card(ok, tmp_path):
    """card(text of the source's card or None, path): front matter and text of an export's."""

    def make(source_card: str | None, path: str | None = None) -> tuple[dict, str]:
        source = save_toy(tmp_path / "toy")
        if source_card is not None:
            (source / "README.md").write_text(source_card)
        ok("ptq", "--recipe", write_recipe(tmp_path / "r.yaml", source, tmp_path / "run"), "ptq.rounds=0")
        model = open_model(Model(path=str(source)), torch.device("cpu"))
        form, about = Form("packed", 10**9), Described(path or str(source))
        text = model_card(model, Checkpoint(tmp_path / "run", "ptq"), exporter("packed"), form, about)
        (tmp_path / "README.md").write_text(text)
        return metadata_load(tmp_path / "README.md"), text.split("---\n", 2)[2]

    return make


def test_a_model_of_the_hub_is_named_as_there_and_its_licence_is_carried_over(card):
    front, text = card(CARD, "org/Toy-1B")
    carried = {"license": "other", "license_name": "toy", "license_link": "LICENSE", "language": ["en", "de"]}
    assert front == {"base_model": "org/Toy-1B", "base_model_relation": "quantized", **carried, **FIXED}
    assert text.startswith("\n# org/Toy-1B, W(1+1), ptq\n")


def test_a_file_for_llama_cpp_says_so(ok, tmp_path):
    source = save_toy(tmp_path / "toy", hidden_size=128, intermediate_size=160, head_dim=32)
    recipe = write_recipe(tmp_path / "r.yaml", source, tmp_path / "run", ptq={"rounds": 0})
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe, "export.format=gguf")
    card = tmp_path / "run" / "export" / "README.md"
    assert metadata_load(card)["library_name"] == "llama.cpp"
    assert card.read_text().endswith("\n\n```sh\nllama-cli --model model.gguf\n```\n")


@pytest.mark.parametrize("theirs", [None, "# no front matter\n", "---\n- a list\n---\n", "---\n{\n---\n"])
def test_a_folder_has_no_id_and_nothing_to_carry_over(card, theirs):
    front, text = card(theirs)
    assert front == FIXED
    assert text.startswith("\n# toy, W(1+1), ptq\n")


def test_what_was_measured_is_in_the_card_of_these_weights(ok, tmp_path):
    source = save_toy(tmp_path / "toy")
    recipe = write_recipe(tmp_path / "r.yaml", source, tmp_path / "run", ptq={"rounds": 0})
    card = tmp_path / "run" / "export" / "README.md"
    ok("ptq", "--recipe", recipe)
    ok("export", "--recipe", recipe)
    assert "perplexity" not in card.read_text()
    found = json.loads(ok("eval", "--recipe", recipe, "--json").stdout)
    base, ptq = (found[name]["perplexity"]["novels"] for name in ("base", "ptq"))
    ok("export", "--recipe", recipe)  # it is up to date, its card is not
    assert f"| perplexity, novels | {base:.2f} | {ptq:.2f} ({ptq / base:.2f}x) |\n" in card.read_text()
    # Ragged groups of 32 over rows of 80 and 112.
    bits = f"{found['ptq']['bits_per_weight']:.4g}"
    assert f"| bits per binarized weight | 32 | {bits} |" in card.read_text()
    results = tmp_path / "run" / "eval" / "results.json"
    edited = json.loads(results.read_text())
    for entry in edited.values():
        del entry["bits_per_weight"], entry["activation_bits"]
    results.write_text(json.dumps(edited))
    ok("export", "--recipe", recipe)
    assert f"| bits per binarized weight |  | {bits} |" in card.read_text()
    ok("ptq", "--recipe", recipe, "ptq.rounds=1", "--force")
    ok("export", "--recipe", recipe, "ptq.rounds=1", "--force")
    assert "perplexity" not in card.read_text()


@pytest.mark.usefixtures("given_tables")
def test_a_format_without_quantizers_says_what_was_measured(ok, tmp_path):
    source = save_toy(tmp_path / "toy")
    sections = {"ptq": {"rounds": 0}, "act_calib": {"parent": "ptq", "epochs": 0}}
    recipe = write_recipe(tmp_path / "r.yaml", source, tmp_path / "run", **sections)
    for command in ("ptq", "act-calib", "eval"):
        ok(command, "--recipe", recipe)
    ok("export", "--recipe", recipe)
    said = "with activations in 4 bits, which stay in full precision here"
    assert said not in (tmp_path / "run" / "export" / "README.md").read_text()
    ok("export", "--recipe", recipe, "export.format=dense", "--force")
    assert said in (tmp_path / "run" / "export" / "README.md").read_text()
