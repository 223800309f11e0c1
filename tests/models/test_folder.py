"""A model folder on disk: headers, shards, reading, identity, metadata."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lbllm_cli.core import model_folder
from lbllm_cli.core.errors import RunError, UsageError
from lbllm_cli.core.headers import read_header
from lbllm_cli.models import folder as source

CPU = torch.device("cpu")


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(6, 8, generator=generator),
        "b.weight": torch.randn(4, 8, generator=generator).bfloat16(),
        "c.bias": torch.randn(5, generator=generator).half(),
        "d.scalar": torch.tensor(2.0),
        "e.codes": torch.arange(7, dtype=torch.uint8),
    }


@pytest.fixture
def single(tmp_path):
    """A folder with config.json and one weight file."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    save_file(_tensors(), folder / model_folder.SINGLE, metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path):
    """A folder with an index and two weight files."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    tensors = _tensors()
    parts = {"model-1.safetensors": ["a.weight", "b.weight"], "model-2.safetensors": ["c.bias", "d.scalar", "e.codes"]}
    for name, held in parts.items():
        save_file({key: tensors[key] for key in held}, folder / name)
    weight_map = {key: name for name, held in parts.items() for key in held}
    (folder / model_folder.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def test_one_file_and_shards_hold_the_same(single, sharded):
    first, second = model_folder.read_folder(single), model_folder.read_folder(sharded)
    assert {name: (entry.dtype, entry.shape) for name, entry in first.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in second.items()
    }
    for entries in (first, second):
        read = source.read_tensors(entries, ["c.bias", "a.weight"], CPU)
        assert set(read) == {"c.bias", "a.weight"}
        for name, tensor in read.items():
            assert tensor.dtype == _tensors()[name].dtype
            assert torch.equal(tensor, _tensors()[name])


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(UsageError, match=r"1 of 2 weight files are missing: model-2\.safetensors"):
        model_folder.read_folder(sharded)


def test_an_index_that_names_absent_tensors(sharded):
    index = json.loads((sharded / model_folder.INDEX).read_text(encoding="utf-8"))
    index["weight_map"] |= {"z.weight": "model-1.safetensors", "y.weight": "model-2.safetensors"}
    (sharded / model_folder.INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UsageError, match=r"names 2 tensors that no shard holds, first y\.weight"):
        model_folder.read_folder(sharded)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "7", '{"weight_map": 3}', '{"weight_map": ["a"]}', '{"weight_map": {}}', '{"weight_map": {"a.weight": 3}}',
     '{"weight_map": {"a.weight": null}}', '{"metadata": 1, "weight_map": {"a.weight": "model-1.safetensors"}}',
     '{"weight_map": {"a.weight": ["model-1.safetensors"]}}', "[" * 100_000],
    ids=range(12),
)  # fmt: skip
def test_a_damaged_index_is_refused(sharded, text):
    (sharded / model_folder.INDEX).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"index\.json (is not a safetensors index|cannot be read as JSON)"):
        model_folder.read_folder(sharded)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "a/../../outside.safetensors", "{absolute}", "", ".", "a\0b", "a" * 300]
)
def test_an_index_names_files_of_its_folder(sharded, name):
    outside = sharded.parent / "outside.safetensors"
    save_file(_tensors(), outside)
    index = {"weight_map": dict.fromkeys(_tensors(), name.format(absolute=outside))}
    (sharded / model_folder.INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UsageError, match=r"index\.json names .*; expected the names of files in"):
        model_folder.read_folder(sharded)


def test_shards_that_are_links_are_followed(sharded, tmp_path):
    (sharded / "model-1.safetensors").rename(tmp_path / "blob")
    (sharded / "model-1.safetensors").symlink_to(tmp_path / "blob")
    assert model_folder.read_folder(sharded).keys() == _tensors().keys()


def test_a_tensor_in_two_shards(sharded):
    save_file({"c.bias": torch.zeros(3), "a.weight": torch.ones(2), "b.weight": torch.ones(2)}, sharded / "model-1.safetensors")
    with pytest.raises(UsageError, match=r"c\.bias is in model-1\.safetensors and in model-2\.safetensors"):
        model_folder.read_folder(sharded)


def test_one_file_goes_before_an_index_as_in_transformers(single, sharded):
    save_file({"only.weight": torch.ones(2)}, sharded / model_folder.SINGLE)
    assert set(model_folder.read_folder(sharded)) == {"only.weight"}


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(UsageError, match=r"no weights: expected model\.safetensors or .*, found no weight file"):
        model_folder.read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"found pytorch_model\.bin. Only safetensors are read; convert"):
        model_folder.read_folder(tmp_path)
    assert not model_folder.has_weights(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(sharded, value):
    save_file({"a.weight": torch.tensor([1.0, value]), "b.weight": torch.ones(2)}, sharded / "model-1.safetensors")
    entries = model_folder.read_folder(sharded)
    with pytest.raises(RunError, match=r"a\.weight in .*model-1\.safetensors holds NaN or infinity"):
        source.read_tensors(entries, ["b.weight", "a.weight"], CPU)
    assert set(source.read_tensors(entries, ["b.weight"], CPU)) == {"b.weight"}


def test_tensors_are_checked_and_compared_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "PIECE", 7)
    tensors = {"a": torch.arange(40.0).view(10, 4), "scalar": torch.tensor(1.0), "none": torch.empty(0, 3)}
    tensors |= {"half": tensors["a"].half(), "other": tensors["a"].clone(), "spoiled": tensors["a"].clone()}
    tensors["other"][9, 3] += 1
    tensors["spoiled"][8, 1] = torch.inf
    save_file(tensors, tmp_path / "w.safetensors")
    entries = read_header(tmp_path / "w.safetensors")
    source.check_finite(entries, ["a", "scalar", "none"])
    with pytest.raises(RunError, match=r"spoiled in .* holds NaN or infinity"):
        source.check_finite(entries, ["a", "spoiled"])
    assert source.equal(entries, "a", "half", torch.float32)
    assert not source.equal(entries, "a", "other", torch.float32)
    assert not source.equal(entries, "a", "scalar", torch.float32)


def _identity(folder) -> str:
    return model_folder.identity(folder, model_folder.read_folder(folder))


def test_identity_notices_changes(single):
    file = single / model_folder.SINGLE
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(300, 400, generator=generator) for name in ("a.weight", "b.weight")}
    save_file(tensors, file)
    before = _identity(single)
    assert _identity(single) == before
    seen = {before}

    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for place in (start, 65535, len(content) - 65536, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        seen.add(_identity(single))
    file.write_bytes(content)
    assert _identity(single) == before

    save_file({name: tensor.view(400, 300) for name, tensor in tensors.items()}, file)
    seen.add(_identity(single))
    save_file({name.replace("a.", "c."): tensor for name, tensor in tensors.items()}, file)
    seen.add(_identity(single))
    file.write_bytes(content)
    (single / "config.json").write_text('{"model_type": "llama", "rope_theta": 1}', encoding="utf-8")
    seen.add(_identity(single))
    assert len(seen) == 8


def test_identity_notices_shapes_that_lie_deep_in_the_file(single):
    seen = set()
    for shape in ((300, 400), (400, 300), (120000,)):
        save_file({"a.weight": torch.ones(shape)}, single / model_folder.SINGLE, metadata={"padding": "x" * 70_000})
        assert b"shape" not in (single / model_folder.SINGLE).read_bytes()[:65536]
        seen.add(_identity(single))
    assert len(seen) == 3


def test_identity_covers_every_shard(sharded):
    before = _identity(sharded)
    for file in sorted(sharded.glob("*.safetensors")):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert _identity(sharded) != before
        content[-1] ^= 1
        file.write_bytes(content)
    assert _identity(sharded) == before


def test_metadata_is_copied_byte_for_byte(single, tmp_path):
    generator = torch.Generator().manual_seed(1)
    kept = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "vocab.json", "generation_config.json")
    kept += ("chat_template.jinja", "LICENSE", "LICENSE.txt", "NOTICE", "special_tokens_map.json", "USE_POLICY.md")
    kept += ("tokenization_mine.py", "additional_chat_templates/tools.jinja")
    (single / "additional_chat_templates").mkdir()
    for name in (*kept, "README.md", "pytorch_model.bin", "modeling_x.py"):
        (single / name).write_bytes(bytes(torch.randint(0, 256, (64,), generator=generator).tolist()) + b"\r\n")
    (single / "LICENSES").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    model_folder.copy_metadata(single, target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()) == sorted(kept)
    for name in kept:
        assert (target / name).read_bytes() == (single / name).read_bytes()
    assert single / "config.json" in set(model_folder.metadata_files(single))
    assert model_folder.metadata_hash(target) == model_folder.metadata_hash(single)
    (target / "additional_chat_templates" / "tools.jinja").write_text("")
    assert model_folder.metadata_hash(target) != model_folder.metadata_hash(single)


def test_a_folder_resolves_to_itself(single, monkeypatch):
    assert model_folder.resolve(str(single), None, True) == single
    monkeypatch.setenv("HOME", str(single.parent))
    assert model_folder.resolve("~/single", None, True) == single


def test_paths_that_are_no_folder_are_refused_without_the_hub(single, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for path in (str(single / "nowhere"), str(single / "config.json"), "./nowhere", "../a", "a/b/c", "~/no/where", "a b"):
        with pytest.raises(UsageError, match=r"is not a folder; give a folder with config\.json or a Hugging Face id"):
            model_folder.resolve(path, None, True)


@pytest.mark.parametrize("name", ["nobody/nothing-here", "nothing--here", "a..b", "nothing.git", "x" * 120])
def test_models_that_cannot_be_had_give_one_message(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"model.path {name}: no such folder") as caught:
        model_folder.resolve(name, None, True)
    assert "\n" not in str(caught.value)


def test_configs(single):
    assert model_folder.read_config(single) == {"model_type": "llama"}
    for text, message in (("{", "cannot be read as JSON"), ("[]", "expected a JSON object, got list")):
        (single / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=message):
            model_folder.read_config(single)
    (single / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json; expected a Hugging Face model folder$"):
        model_folder.read_config(single)


def test_the_folder_of_a_run_names_the_export_in_it(tmp_path):
    for name in ("base", "export", "export.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        model_folder.read_config(tmp_path)
    expected = f"{tmp_path} has no config.json; expected a Hugging Face model folder, as {tmp_path / 'export'} is"
    assert str(caught.value) == expected
