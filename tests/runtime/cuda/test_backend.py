"""The backend of NVIDIA GPUs: when there are kernels, what it says where there are none, and what it takes over."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from packed_toys import UNITS, packed_toy
from torch import nn

from lbllm_cli.core import console
from lbllm_cli.runtime.cuda import backend as cuda
from lbllm_cli.runtime.cuda import head_linear
from lbllm_cli.runtime.cuda.head_linear import HeadLinear
from lbllm_cli.runtime.cuda.step import DecodeStep
from lbllm_cli.runtime.cuda.unit import CudaUnit
from lbllm_cli.runtime.linear import PackedLinear


@pytest.fixture
def said(monkeypatch) -> Iterator[list[str]]:
    """What it says; nothing was said before."""
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    for kept in (cuda._has_triton, cuda._say_unable):
        kept.cache_clear()
    yield lines
    for kept in (cuda._has_triton, cuda._say_unable):
        kept.cache_clear()


class Driver:
    """torch.cuda with GPUs of these compute capabilities."""

    def __init__(self, *capabilities: tuple[int, int]):
        self.capabilities = capabilities

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return len(self.capabilities)

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return self.capabilities[index]


@pytest.fixture
def on(monkeypatch, said):
    """on((8, 0), ...): the backend where these GPUs are."""
    monkeypatch.delenv("LBLLM_KERNELS", raising=False)

    def there(*capabilities: tuple[int, int]) -> cuda.CudaBackend:
        monkeypatch.setattr(cuda.CudaBackend, "_module", Driver(*capabilities))
        return cuda.make("cuda")

    return there


def test_kernels_are_there_where_all_gpus_have_them(on, said, monkeypatch):
    backend = on((8, 0), (12, 0))
    assert backend.kernels is not None
    assert backend.kernels is backend.kernels
    assert type(backend.kernels).__name__ == "TritonKernels"
    assert said == []
    monkeypatch.setenv("LBLLM_KERNELS", "off")
    assert backend.kernels is None
    model = packed_toy()
    assert backend.take_over(model, UNITS, True) == []
    assert all(module.unit is None for module in model.modules() if isinstance(module, PackedLinear))


def test_an_old_gpu_leaves_everything_to_torch_and_is_named_once(on, said):
    backend = on((9, 0), (7, 5))
    assert backend.kernels is None
    assert backend.take_over(packed_toy(), UNITS, True) == []
    (line,) = said
    for part in ("need compute capability 8.0", "cuda:1 has 7.5", "CUDA_VISIBLE_DEVICES", "run in torch"):
        assert part in line


def test_without_triton_everything_is_torchs_and_it_is_said_once(on, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    backend = on((9, 0))
    assert backend.kernels is None
    assert backend.take_over(packed_toy(), UNITS, True) == []
    (line,) = said
    remedy = "run: pip install --upgrade torch 'triton>=3.7'"
    for part in ("need Triton 3.7 or newer", "got import of triton", remedy, "run in torch"):
        assert part in line


def test_a_triton_that_cannot_compile_them_is_none(on, said, monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.6.0")
    assert on((9, 0)).kernels is None
    (line,) = said
    assert "need Triton 3.7 or newer, got 3.6.0" in line


def test_it_takes_over_linears_decode_steps_and_the_head(on, device):
    model = packed_toy().to(device)
    weight = model.lm_head.weight
    on((8, 6)).take_over(model, UNITS, True)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 14
    assert all(isinstance(module.unit, CudaUnit) for module in packed)
    assert len({id(module.unit) for module in packed}) == 8
    assert isinstance(model.model.forward, DecodeStep)
    assert isinstance(model.lm_head, HeadLinear)
    assert model.lm_head.weight is weight


def test_weights_alone_have_no_decode_steps(on, device):
    model = packed_toy().to(device)
    handles = on((8, 6)).take_over(model, UNITS, False)
    assert len(handles) == 4  # before attention and MLP of two layers
    assert "forward" not in model.model.__dict__
    assert all(isinstance(module.unit, CudaUnit) for module in model.modules() if isinstance(module, PackedLinear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_few_rows_is_the_kernels(device, dtype, monkeypatch):
    head = nn.Linear(72, 5, bias=False, device=device, dtype=dtype)
    made, x = HeadLinear.of(head), torch.randn(2, 1, 72, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    assert made.weight is head.weight
    calls, real = [], head_linear.head_logits
    monkeypatch.setattr(head_linear, "head_logits", lambda *args: calls.append(1) or real(*args))
    with torch.no_grad():
        # Sums in another order: measured 1.2e-7 and, where the last bit of 16 falls to the other side, 4e-3.
        torch.testing.assert_close(made(x), head(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        assert calls == [1]
        many = torch.randn(9, 72).to(x)
        assert torch.equal(made(many), head(many))
    assert made(x).requires_grad
    assert calls == [1]


_IMPORT = """
import sys
sys.modules["triton"] = None
import torch, lbllm_cli.hf
from lbllm_cli.runtime.cuda.backend import make
assert make("cuda").kernels is None
print(*sorted(name for name in sys.modules if name.startswith("lbllm_cli.runtime.cuda")))
"""


def test_the_plugin_and_the_backend_need_no_triton():
    result = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["lbllm_cli.runtime.cuda", "lbllm_cli.runtime.cuda.backend"]
