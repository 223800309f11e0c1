"""Tokenizers that are read without torch are those that AutoTokenizer gives."""

import json
import shutil
import subprocess
import sys
from typing import get_args

import pytest
from conftest import TOKENIZER_FILES, TOY

from lbllm_cli.engine.config import Configuration
from lbllm_cli.models import tokenizer as module
from lbllm_cli.models.tokenizer import read_tokenizer

TEXTS = ("The sea was calm.", "  caf\u00e9 \u2013 two\n\nlines ", "<|endoftext|>x")
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"


def folder_of(tmp_path, kind="llama", **settings):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOY / name, tmp_path / name)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


@pytest.mark.parametrize("kind", get_args(Configuration.model_fields["model_type"].annotation))
@pytest.mark.parametrize("name", sorted(module._LIGHT))
def test_each_class_is_the_one_that_auto_takes(tmp_path, name, kind):
    folder = folder_of(tmp_path, kind, tokenizer_class=name)
    light, auto = read_tokenizer(folder, False, light=True), read_tokenizer(folder, False)
    assert type(light) is type(auto)
    for text in TEXTS:
        for special in (True, False):
            assert light(text, add_special_tokens=special)["input_ids"] == auto(text, add_special_tokens=special)["input_ids"]
    messages = [{"role": "user", "content": "the sea"}]
    rendered = [each.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for each in (light, auto)]
    assert rendered[0] == rendered[1]
    assert "the sea" in rendered[0]


def test_torch_is_not_imported(tmp_path):
    folder = folder_of(tmp_path)
    code = (
        "import sys, pathlib\nfrom lbllm_cli.models.tokenizer import read_tokenizer\n"
        f"read_tokenizer(pathlib.Path({str(folder)!r}), False, light=True)('the sea')\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": None}, {"auto_map": {"x": "y"}},
        {"kind": "qwen2", "tokenizer_class": "TokenizersBackend"}, {"kind": "mistral", "tokenizer_class": "TokenizersBackend"},
    ],
)  # fmt: skip
def test_other_classes_and_code_are_left_to_auto(tmp_path, monkeypatch, settings):
    folder, asked = folder_of(tmp_path, **settings), []
    import transformers

    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(a) or real(*a, **k))
    read_tokenizer(folder, False, light=True)
    assert asked
