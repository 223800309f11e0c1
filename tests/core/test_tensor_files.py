"""Headers of safetensors files: what they say, and damage of every kind."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from lbllm_cli.core.errors import UsageError
from lbllm_cli.core.headers import read_header


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(6, 8, generator=generator),
        "b.weight": torch.randn(4, 8, generator=generator).bfloat16(),
        "c.bias": torch.randn(5, generator=generator).half(),
        "d.scalar": torch.tensor(2.0),
        "e.codes": torch.arange(7, dtype=torch.uint8),
    }


def _raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.fixture
def single(tmp_path):
    """A file of a tensor of each dtype."""
    save_file(_tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_a_header_gives_dtypes_shapes_and_sizes(single):
    entries = read_header(single)
    assert set(entries) == set(_tensors())
    for name, tensor in _tensors().items():
        assert entries[name].shape == tuple(tensor.shape)
        assert entries[name].nbytes == tensor.numel() * tensor.element_size()
    assert [entries[name].dtype for name in _tensors()] == ["F32", "BF16", "F16", "F32", "U8"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not a complete safetensors file \(0 bytes\)"),
        (b"\x01\x02\x03", r"is not a complete safetensors file \(3 bytes\)"),
        (struct.pack("<Q", 1 << 40) + b"{}", "is not a complete safetensors file"),
        (_raw({"a": _entry()}, bytes(8))[:20], "is not a complete safetensors file"),
        (_raw({"a": _entry()}, bytes(7)), "is truncated or padded: expected 77 bytes, got 76"),
        (_raw({"a": _entry()}, bytes(9)), "is truncated or padded: expected 77 bytes, got 78"),
        (_raw(b"{not json", b""), "has a corrupt safetensors header"),
        (_raw(b"\xff\xfe{}", b""), "has a corrupt safetensors header"),
        (_raw([1, 2]), "has a corrupt safetensors header"),
        (_raw({"a": 5}), "has a corrupt safetensors header"),
        (_raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(data_offsets=[0])}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(shape=None)}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(dtype="F8_E4M3")}, bytes(8)), "holds tensors of dtype F8_E4M3; expected float32, bfloat16"),
        (_raw({"a": _entry(dtype="F" * 9999)}, bytes(8)), "holds tensors of dtype F{80}; expected float32"),
        (_raw({"a": _entry(dtype=7)}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(dtype=["F32"])}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(shape=[-1, -2])}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(shape=[2.0])}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(shape=[True, 2])}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(shape=[3])}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(data_offsets=[8, 0])}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(data_offsets=[8, 16])}, bytes(16)), "tensors overlap or leave a gap at 8"),
        (_raw({"a": _entry(), "b": _entry(data_offsets=[4, 12])}, bytes(12)), "tensors overlap or leave a gap at 4"),
        (_raw({"a": _entry(), "b": _entry(data_offsets=[8, 16])}, bytes(8)), "is truncated or padded"),
        (_raw(b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": 1}', bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(), "__metadata__": 5}, bytes(8)), "has a corrupt safetensors header"),
        (_raw({"a": _entry(), "__metadata__": {"b": 5}}, bytes(8)), "has a corrupt safetensors header"),
        (_raw(b"[" * 100_000), "has a corrupt safetensors header"),
        (_raw(b'{"a":' * 100_000), "has a corrupt safetensors header"),
    ],
    ids=range(30),
)
def test_damaged_headers_are_refused(tmp_path, content, message):
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_every_truncation_is_noticed(single):
    whole = single.read_bytes()
    for size in (*range(0, 16), len(whole) // 2, len(whole) - 1):
        single.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"model\.safetensors .* again"):
            read_header(single)


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"w\.safetensors is missing; download w\.safetensors again"):
        read_header(tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="is a folder; expected a file"):
        read_header(tmp_path)
