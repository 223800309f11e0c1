"""Packed exports in vLLM, by the plugin: what transformers computes of them, in every family that vLLM has.

vLLM lives in an environment of its own: `make serve-test`.
"""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, save_toy
from packed_models import exported
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

# In this process: engines are made one after another, and errors come as they are.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make serve-test")

import lbllm_cli.hf  # noqa: E402
from lbllm_cli.format.settings import FORMAT_VERSION  # noqa: E402

pytestmark = pytest.mark.slow

# vLLM's attention on a CPU has no heads of 24 channels.
WIDTHS = {"head_dim": 32, "hidden_size": 128}
FAMILIES = (
    "gemma2", "gemma3", "glm4", "granite", "granitemoe", "llama-tied", "llama-untied", "ministral3", "mistral-sliding", "mixtral",
    "olmo2", "olmo3", "olmoe", "phi3", "qwen2-biases", "qwen3", "qwen3-moe", "seed-oss", "smollm3",
)  # fmt: skip
# Log probabilities; measured 2.9e-6 at most.
CLOSE = 2e-5
TOKENS = torch.randint(3, 90, (24,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def toy_export(once) -> Any:
    """toy_export(family): a W(1+1)A4KV4 export whose heads vLLM has. level_bits, larger: of `ptq`, what has
    groups of 64. head_bits: of `export`.
    """

    def of(family: str, level_bits: int = 8, head_bits: int = 16, larger: str = "") -> Path:
        def make(folder: Path) -> Path:
            sizes = {larger: 64} if larger else {}
            ptq = {"rounds": 0, "level_bits": level_bits, "group_sizes": sizes}
            sections = {"ptq": ptq, "export": {"head_bits": head_bits}}
            return exported(folder, save_toy(folder / "model", family, **WIDTHS), **sections)

        # vLLM takes a folder's name for a pattern.
        plain = re.sub(r"\W", "-", larger)
        return once(f"vllm-{family}-{level_bits}-{head_bits}{plain}", make)

    return of


def engine(folder: Path, **options: Any) -> Any:
    usual = {
        "dtype": "float32", "max_model_len": 64, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24, "max_logprobs": -1,
        "block_size": 32,
    }  # fmt: skip
    return vllm.LLM(str(folder), **(usual | options))


def answers(llm: Any) -> tuple[torch.Tensor, list[int]]:
    """Log probabilities of TOKENS, one row for each but the first, and what follows them greedily."""
    asked = vllm.SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=-1, ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": TOKENS}], asked, use_tqdm=False)[0]
    rows = [torch.tensor([row[token].logprob for token in range(len(row))]) for row in found.prompt_logprobs[1:]]
    return torch.stack(rows), list(found.outputs[0].token_ids)


@torch.no_grad()
def wanted(folder: Path, full: bool = False) -> tuple[torch.Tensor, list[int]]:
    """The same by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lbllm_cli.hf.quantize_activations(model, not full)
    rows = model(torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1)
    written = model.generate(torch.tensor([TOKENS]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return rows, written[0, len(TOKENS) :].tolist()


@contextmanager
def unpatched(folder: Path) -> Iterator[None]:
    """vLLM runs classes of transformers' in some families, and gives them another `__init__` and base. Afterwards they are as
    they were: else nothing but vLLM could make a model of them.
    """
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).get_decoder())
    bases, own = kind.__bases__, dict(vars(kind))
    try:
        yield
    finally:
        kind.__bases__ = bases
        for name in vars(kind).keys() - own.keys():
            delattr(kind, name)
        for name, value in own.items():
            if vars(kind)[name] is not value:
                setattr(kind, name, value)


def compare(folder: Path, full: bool = False, **options: Any) -> None:
    rows, written = wanted(folder, full)
    with unpatched(folder):
        llm = engine(folder, **options)
        found, tokens = answers(llm)
        del llm
        gc.collect()
    assert found.shape == rows.shape
    assert (found - rows).abs().max() < CLOSE
    assert tokens == written


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_transformers_does(toy_export, family):
    compare(toy_export(family))


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("family", ["llama-tied", "qwen2-biases", "qwen3-moe"])
def test_levels_may_have_fewer_bits(toy_export, family, bits):
    compare(toy_export(family, bits))


@pytest.mark.parametrize(("family", "larger"), [("qwen2-biases", "layers.[01].self_attn.*"), ("qwen3-moe", "layers.1.mlp.*")])
def test_linears_may_have_groups_of_their_own_sizes(toy_export, family, larger):
    compare(toy_export(family, 2, larger=larger))


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in ("gemma2", "granitemoe", "mixtral")]
)
def test_embedding_and_head_may_have_8_bits(toy_export, family):
    # In 4 bits the last bit of a norm tips a code of this toy over, 0.26 of a logit: it is compared in full precision.
    more = {"full": True, "additional_config": {"lbllm_activations": "full"}} if family == "olmo2" else {}
    compare(toy_export(family, head_bits=8), **more)


@pytest.mark.parametrize("family", ["gemma2", "granitemoe", "mixtral"])
def test_where_vllm_asks_for_no_embedding_of_8_bits_it_is_refused(toy_export, family):
    with pytest.raises(ValueError, match=r"export it again with export\.head_bits=16"):
        engine(toy_export(family, head_bits=8))


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "gemma3", "mistral-sliding", "qwen2-biases"])
def test_keys_and_values_may_be_kept_as_codes(toy_export, family):
    compare(toy_export(family), additional_config={"lbllm_cache": "codes"})


def test_activations_may_stay_in_full_precision(toy_export):
    folder = toy_export("llama-tied")
    assert (wanted(folder)[0] - wanted(folder, True)[0]).abs().max() > 0.05
    compare(folder, full=True, additional_config={"lbllm_activations": "full"})


def test_a_compiled_graph_computes_the_same(toy_export):
    compare(toy_export("llama-tied"), enforce_eager=False)


def test_kernels_run_the_linears(toy_export, monkeypatch):
    from lbllm_cli.runtime.cpu import unit

    calls = []
    run = unit.Unit.run
    monkeypatch.setattr(unit.Unit, "run", lambda self, x: calls.append(self.quantizer is not None) or run(self, x))
    answers(engine(toy_export("llama-tied")))
    assert len(calls) > 4 * 3
    assert all(calls)


def test_pages_of_codes_are_smaller(toy_export):
    folder = toy_export("llama-tied")
    pages = []
    for form in ("values", "codes"):
        llm = engine(folder, additional_config={"lbllm_cache": form})
        pages.append(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
        del llm
        gc.collect()
    # 32 channels: 128 bytes in float32, 16 + 3 as codes.
    assert pages[1] / pages[0] == pytest.approx(128 / 19, rel=0.01)


@pytest.mark.parametrize("bits", [8, 2])
def test_two_processes_share_the_heads(toy_export, tmp_path, bits):
    """Tensor parallel: weights are cut by heads and groups, quantizers and scales of whole rows are whole on both sides."""
    # A sum in another order may flip a code of 4 bits, and with it all that looks back at it; of these fits it flips none.
    ptq, act = {"rounds": 1, "level_bits": bits}, {"group_size": 32}
    toy = save_toy(tmp_path / "model", "qwen2-biases", **WIDTHS, intermediate_size=192)
    folder = exported(tmp_path, toy, act=act, ptq=ptq)
    rows, written = wanted(folder)
    torch.save((rows, written), tmp_path / "wanted.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
if __name__ == "__main__":
    import os
    from pathlib import Path
    import test_vllm
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    rows, written = torch.load({str(tmp_path / "wanted.pt")!r})
    found, tokens = test_vllm.answers(test_vllm.engine(Path({str(folder)!r}), tensor_parallel_size=2))
    assert (found - rows).abs().max() < test_vllm.CLOSE, (found - rows).abs().max()
    assert tokens == written
    print("equal")
"""
    (tmp_path / "two.py").write_text(code)
    told = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    done = subprocess.run([sys.executable, tmp_path / "two.py"], env=told, capture_output=True, text=True, timeout=400)
    assert "equal" in done.stdout, done.stderr[-3000:]


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy whose quantization_config has these values."""
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    values["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(values))
    return target


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.up_proj.scale", "layers.0.self_attn.key_cache.act_clip"])
def test_a_missing_tensor_is_refused_before_loading(toy_export, tmp_path, name):
    folder = copied(toy_export("llama-tied"), tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.{name}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        engine(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.0.self_attn.q_proj.input.act_levels", lambda t: t + 120, "qkv_proj.input.act_levels: expected rows that ascend"),
        ("layers.1.self_attn.key_cache.act_clip", lambda t: t * 0, "attn.key_cache.act_clip: expected 6554 to 65536"),
        ("layers.1.mlp.down_proj.scale", lambda t: t * torch.inf, "down_proj.packed.scale holds NaN or infinity"),
        ("layers.1.mlp.experts.2.down_proj.scale", lambda t: t * torch.inf, "experts.packed.w2.2.scale holds NaN or infinity"),
        ("layers.0.mlp.experts.gate_proj_input.act_levels", lambda t: t + 120, "gate_input.act_levels: expected rows"),
    ],
)
def test_values_without_meaning_are_refused(toy_export, tmp_path, name, change, message):
    folder = copied(toy_export("qwen3-moe" if "experts" in name else "llama-tied"), tmp_path / "export")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.{name}"] = change(tensors[f"model.{name}"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_vllm; test_vllm.engine({str(folder)!r})"
    told = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    # In a process of its own: vLLM leaves one behind half set up.
    done = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, timeout=400)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, f"packed format_version 99, this lbllm reads {FORMAT_VERSION}; update lbllm-cli"),
        ({"group_size": 20}, "quantization_config.group_size: expected a multiple of 16"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(toy_export, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        engine(copied(toy_export("llama-tied"), tmp_path / "export", **changes))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lbllm_cache": "bytes"}, "--additional-config lbllm_cache: expected values or codes, got 'bytes'"),
        ({"lbllm_kv": "codes"}, "--additional-config lbllm_kv: expected lbllm_activations or lbllm_cache"),
        ({"lbllm_cache": "codes", "lbllm_activations": "full"}, "codes are of quantized keys and values, the model runs without"),
    ],
)
def test_a_wrong_switch_is_refused(toy_export, given, message):
    with pytest.raises(ValueError, match=message):
        engine(toy_export("llama-tied"), additional_config=given)


@pytest.mark.parametrize(
    ("inputs", "granularity", "message"),
    [
        (80, "group", r"self_attn.o_proj: 80 inputs in 2 parts are 40 each, no whole number of groups of 32; take a smaller"),
        (64, "token", "self_attn.o_proj: a step of activations stands for a whole token"),
        (160, "group", "160 inputs in 2 parts are 80 each, no whole number of groups of 96; take a smaller"),
    ],
)
def test_what_cannot_be_cut_is_refused(inputs, granularity, message):
    from lbllm_cli.format.activations import ActivationFormat
    from lbllm_cli.vllm.linear import PackedLinearMethod

    step, bits = (96, 2) if inputs == 160 else (32, 8)
    layout = ActivationFormat(4, 4, granularity, "knee", "knee", 2, step)
    config = SimpleNamespace(group_size=lambda *_: 32, level_bits=bits)
    method = PackedLinearMethod(config, "self_attn.o_proj", ["self_attn.o_proj"], layout)
    with pytest.raises(ValueError, match=message):
        method.create_weights(torch.nn.Module(), inputs // 2, [8], inputs, 8, torch.float32, weight_loader=None)


@pytest.mark.parametrize(
    ("ways", "biases", "message"),
    [(2, False, "packed experts in vLLM have no experts in parallel"), (1, True, "have no biases of experts; take: lbllm serve")],
)
def test_experts_that_cannot_be_run_are_refused(ways, biases, message):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from lbllm_cli.vllm.experts import PackedExpertsMethod

    moe = SimpleNamespace(moe_parallel_config=SimpleNamespace(use_ep=False, tp_size=ways), has_bias=biases)
    layer = torch.nn.Module()
    layer.activation, layer.apply_router_weight_on_input = MoEActivation.SILU, False
    with pytest.raises(ValueError, match=message):
        PackedExpertsMethod(SimpleNamespace(), "mlp.experts", moe, None, False).create_weights(
            layer, 4, 64, 32, torch.float32
        )


def test_loras_are_refused(toy_export):
    with pytest.raises(ValueError, match="packed linears take no LoRA"):
        engine(toy_export("llama-tied"), enable_lora=True)


@pytest.mark.parametrize(("family", "bits"), [("llama-tied", 8), ("qwen3-moe", 16)])
def test_weights_that_are_loaded_again_are_the_same(toy_export, family, bits):
    """As after vLLM's sleep, or by whoever trains: it finds where they belong by the names of the loaders' arguments."""
    llm = engine(toy_export(family, head_bits=bits))
    rows, tokens = answers(llm)
    llm.reset_prefix_cache()
    llm.collective_rpc("reload_weights")
    again, others = answers(llm)
    assert torch.equal(again, rows)
    assert others == tokens


@pytest.mark.parametrize("eager", [True, False])
def test_experts_are_in_no_graph(monkeypatch, eager):
    """As on a GPU: what they ask the host for would end vLLM's capture, with a message of CUDA's."""
    from lbllm_cli.vllm import experts

    monkeypatch.setattr(experts, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    given = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=eager))
    monkeypatch.setattr(experts, "get_current_vllm_config", lambda: given)
    moe = SimpleNamespace(moe_parallel_config=SimpleNamespace(use_ep=True, tp_size=1))
    method = experts.PackedExpertsMethod(SimpleNamespace(), "mlp.experts", moe, None, False)
    # What comes after it is refused for another reason.
    with pytest.raises((ValueError, AttributeError)) as caught:
        method.create_weights(torch.nn.Module(), 4, 64, 32, torch.float32)
    assert ("have no CUDA graphs; give it --enforce-eager" in str(caught.value)) is not eager
