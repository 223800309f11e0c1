"""Model folders: config.json, tokenizer, weight files and their index."""

import json
import random
from pathlib import Path
from typing import Any

from bases import RECIPE, stage_writes
from conftest import save_toy
from mutate import ODD, dump_json, leaves, load_json, mutate_bytes, mutate_tree, nested, spoil_file
from promise import Case
from weight_files import edit_tensors, harm_tensor, spoil_data, spoil_header, spoil_index

_GENERATE = ["generate", "--model", "model", "--max-new-tokens", "3", "--prompt", "The sea"]
_EVAL = ("work/run/eval*",)


def _case(kind: str, rng: random.Random, outcome: Any = "any", stdin: str = "") -> Case:
    recipe = ["--recipe", RECIPE]
    command = rng.choice([["validate", *recipe], ["ptq", *recipe], ["ptq", "--dry-run", *recipe], ["eval", *recipe], _GENERATE])
    if outcome == "refused":
        command = rng.choice([["ptq", *recipe], ["eval", *recipe], _GENERATE])
    return Case(f"{command[0]}: {kind}", command, (*stage_writes("ptq"), *_EVAL), outcome, stdin)


def _config(work: Path, rng: random.Random) -> Case:
    """A key of the configuration takes an odd value."""
    file = work / "model" / "config.json"
    values = load_json(file)
    values |= {"rope_scaling": None, "sliding_window": None, "layer_types": None, "attention_bias": False, "mlp_bias": False}
    key = rng.choice(list(values))
    values[key] = rng.choice([*ODD, [values[key]], {"x": values[key]}, str(values[key])])
    dump_json(values, file)
    return _case(f"config {key} = {str(values[key])[:40]!r}", rng)


def _config_meant(work: Path, rng: random.Random) -> Case:
    """Values that look right, key by key."""
    file = work / "model" / "config.json"
    values = load_json(file)
    numbers = [0, -1, 1, 2, 3, 5, 31, 33, 2**31, 10**9, 2**63, 1.5, "32", None, True]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    choices: dict[str, list[Any]] = {
        **dict.fromkeys((*sizes, "head_dim", "max_position_embeddings"), numbers),
        "rms_norm_eps": [0, -1, 1e-30, 1e30, float("nan"), "1e-6", None],
        "hidden_act": ["relu", "nothing", None, 7, "", "gelu_new"],
        "torch_dtype": ["float8_e4m3fn", "int8", "nothing", 7, None, "torch.float32"],
        "dtype": ["float8_e4m3fn", "int8", "nothing", 7, None, "torch.float32", "float16"],
        "rope_scaling": [
            {},
            {"type": "x"},
            {"rope_type": "yarn"},
            {"rope_type": "llama3"},
            {"rope_type": "linear", "factor": "x"},
            7,
            [],
        ],
        "rope_parameters": [
            {},
            7,
            None,
            {"rope_type": "yarn", "factor": -1},
            {"rope_type": "default", "rope_theta": 0},
            {"rope_theta": "x"},
        ],
        "rope_theta": [0, -1, "x", None, float("nan"), 1e300],
        "architectures": [[], None, ["Nothing"], 7, "LlamaForCausalLM", [7]],
        "model_type": ["nothing", None, 7, "gpt2", "", [], "mistral", "bert", "qwen3", "mixtral", "../x", "mamba"],
        "layer_types": [[], ["x", "y"], ["full_attention"], ["sliding_attention"] * 2, 7, ["full_attention"] * 9],
        "quantization_config": [
            {},
            7,
            [],
            {"quant_method": 7},
            {"quant_method": "lbllm"},
            {"quant_method": "gptq"},
            {"quant_method": []},
        ],
        "tie_word_embeddings": [False, None, "yes", 0],
        "attention_bias": [True, "x"],
        "bos_token_id": [-1, 10**9, "x", [0], None],
        "eos_token_id": [-1, 10**9, "x", [0, 1], None],
        "pad_token_id": [-1, 10**9, "x", [0]],
        "pretraining_tp": [0, 2, "x"],
        "transformers_version": [7, "x", "99.0"],
        "auto_map": [{}, {"AutoConfig": "evil.X"}, {"AutoConfig": 7, "AutoModelForCausalLM": "evil.Y"}, 7],
    }
    what = []
    for key in rng.sample(sorted(choices), rng.choice([1, 1, 1, 2])):
        values[key] = rng.choice(choices[key])
        what.append(f"{key} = {values[key]}")
    (work / "model" / "evil.py").write_text("open('../beside/precious.txt', 'w').write('evil')\n")
    dump_json(values, file)
    return _case(f"config {'; '.join(what)}", rng, stdin="y\n" * 3)


def _config_text(work: Path, rng: random.Random) -> Case:
    file = work / "model" / "config.json"
    good = file.read_text()
    how, text = rng.choice(
        [
            ("nested", good[:-2] + f', "x": {nested(rng)}}}'), ("deep", nested(rng)),
            ("twice", good[:-2] + ', "model_type": "gpt2"}'),
            ("scalar", "7"), ("list", "[]"), ("null", "null"), ("empty", ""), ("cut", good[: len(good) // 2]),
            ("NaN", '{"hidden_size": NaN}'),
            ("digits", good[:-2] + f', "x": {"9" * 5000}}}'), ("BOM", "\ufeff" + good), ("comment", "// x\n" + good),
            ("only", "{}"),
        ]
    )  # fmt: skip
    file.write_text(text, encoding="utf-8")
    if rng.random() < 0.2:
        file.write_bytes(rng.choice([good.encode("utf-16"), b"\xff" + good.encode(), mutate_bytes(good.encode(), rng)[0]]))
        how = "bytes"
    return _case(f"config text {how}", rng)


def _spoiled(work: Path, rng: random.Random) -> Case:
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"]
    file = work / "model" / rng.choice(names)
    if not file.exists():
        file.write_text('{"do_sample": false}')
    return _case(spoil_file(file, rng), rng)


def _tokenizer(work: Path, rng: random.Random) -> Case:
    file = (
        work
        / "model"
        / rng.choice(["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
    )
    values = load_json(file) if file.exists() else {"bos_token": "<s>", "eos_token_id": 0, "max_length": 20}
    if file.name == "tokenizer.json" and rng.random() < 0.5:
        # Few of its nodes are not entries of the vocabulary.
        what = mutate_tree(values, rng, [path for path in leaves(values) if "vocab" not in path and "merges" not in path])
    else:
        what = mutate_tree(values, rng)
    dump_json(values, file)
    return _case(f"{file.name}: {what}", rng)


TEMPLATES = (
    "{{ raise_exception('no') }}", "{% for %}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ messages[7].content }}", "{% include 'x' %}", "{{ [].__class__.__mro__[1].__subclasses__() }}", "",
    "{{ messages | tojson }}", "{{",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ ('%c' * 10**7) }}",
    "{{ messages + 1 }}", "x" * 10**6,
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ lipsum.__globals__ }}", "{{ namespace(x=1).y.z }}",
    "{{ messages[0]['role'] }}",
    "{% set x = namespace(a=[]) %}{% for i in range(99999) %}{% set x.a = x.a + x.a + [1] %}{% endfor %}", "\ud800",
    "{{ '\\ud800' }}",
)  # fmt: skip


def _template(work: Path, rng: random.Random) -> Case:
    """`generate` with a chat template that fails, loops or asks for too much."""
    file = work / "model" / "tokenizer_config.json"
    odd: list[Any] = [
        *TEMPLATES,
        7,
        [],
        {},
        [{"name": "default", "template": "{{"}],
        [{"name": "x", "template": "y"}],
        [7],
        {"default": "{{ 1/0 }}"},
    ]
    template = rng.choice(odd)
    if isinstance(template, str) and rng.random() < 0.3:
        (work / "model" / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    else:
        dump_json({**load_json(file), "chat_template": template}, file)
    return Case(f"template {str(template)[:50]!r}", [*_GENERATE])


def _generate(work: Path, rng: random.Random) -> Case:
    """Options and prompts of `generate`."""
    prompt = rng.choice(
        ["", " ", "\udcff", "x" * 3000, "word " * 2000, "\n", "<s>" * 300, "{{ x }}", "-p", "é☃\u200b", "<|endoftext|>"]
    )
    options = rng.choice(
        [
            [], ["--device", "foo"], ["--device", "cuda"], ["--device", "cuda:99"], ["--device", "meta"], ["--device", ""],
            ["--seed", "-1"],
            ["--seed", str(2**64)], ["--seed", "x"], ["--temperature", "nan"], ["--temperature", "3"], ["--max-new-tokens", "0"],
            ["--max-new-tokens", str(10**9)], ["--temperature", "1e-30"], ["--raw"], ["--full-activations"],
            ["--model", "nothing"],
            ["--model", "chapter.txt"], ["--model", "~nosuchuser"], ["--model", ""], ["--model", "x" * 300], ["--model", "."],
            ["--seed", str(2**63)],
        ]
    )  # fmt: skip
    line = ["generate", "--model", "model", "--max-new-tokens", "3", "--prompt", prompt, *options]
    return Case(f"generate {prompt[:20]!r} {options}", line)


def _header(work: Path, rng: random.Random) -> Case:
    return _case(spoil_header(work / "model" / "model.safetensors", rng), rng)


def _data(work: Path, rng: random.Random) -> Case:
    return _case(spoil_data(work / "model" / "model.safetensors", rng), rng)


def _harmed(work: Path, rng: random.Random) -> Case:
    return _case(harm_tensor(work / "model" / "model.safetensors", rng), rng, "refused")


def _harmed_outside(work: Path, rng: random.Random) -> Case:
    name = rng.choice(["model.embed_tokens.weight", "model.norm.weight"])
    return _case(harm_tensor(work / "model" / "model.safetensors", rng, name), rng, "refused")


def _head(work: Path, rng: random.Random) -> Case:
    """A head in the file where the configuration ties it to the embedding: it must not be dropped without a word."""
    import torch

    same = rng.random() < 0.3

    def change(tensors: dict[str, Any]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if same else torch.randn_like(embedding)

    edit_tensors(work / "model" / "model.safetensors", change)
    return _case(f"a head beside tied embeddings, {'the same' if same else 'another'}", rng)


def _index(work: Path, rng: random.Random) -> Case:
    for file in (work / "model").glob("*.safetensors"):
        file.unlink()
    config = load_json(work / "model" / "config.json")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    save_toy(work / "model", shard="60KB", **{key: config[key] for key in sizes})
    # A shard where an index that climbs out of the folder would find one.
    shard = sorted((work / "model").glob("model-*.safetensors"))[0]
    (work / "outside.safetensors").write_bytes(shard.read_bytes())
    if rng.random() < 0.25:
        return _case(spoil_file(rng.choice(sorted((work / "model").glob("model*"))), rng), rng, "any")
    return _case(spoil_index(work / "model", rng), rng)


def _empty(work: Path, rng: random.Random) -> Case:
    """Weight files that are well formed and hold nothing, or nothing of this model."""
    file = work / "model" / "model.safetensors"
    header = rng.choice(
        [
            b"{}",
            b'{"__metadata__": {"format": "pt"}}',
            json.dumps({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode(),
        ]
    )
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    return _case("no tensors", rng, "refused")


KINDS = (
    _config, _header, _harmed, _config_meant, _template, _spoiled, _index, _generate, _harmed_outside, _config_text, _tokenizer,
    _head, _data,
    _empty, _config_meant, _header,
)  # fmt: skip
