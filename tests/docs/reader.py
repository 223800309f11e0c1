"""A reader of packed exports after docs/format.md, and after nothing else: standard library and numpy alone."""

import json

import numpy as np

DTYPES = {"U8": "<u1", "I8": "<i1", "I32": "<i4", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}
MEANS = [-1, 3, 5, 2, 3, 9, 9, 8, 7, 17, 13, 14, 13, 28, 19, 23]  # and the negative ones
HALF = [7, 23, 7, 26, 10, 29, 8, 31, 12, 33, 9, 35, 12, 38, 9, 41, 15, 41, 11, 45, 15, 48, 11, 51, 17, 55, 13, 60, 17, 72, 15, 99]


def bfloat16(bits):
    return (bits.astype("<u4") << 16).view("<f4")


def refit(x, lattice):
    return (x * lattice).sum() / max(np.float32(1), (lattice * lattice).sum())


def read_folder(folder) -> dict[str, np.ndarray]:
    """Every tensor of a folder's safetensors files; bfloat16 as float32, which has all its values."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                found = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
                tensors[name] = bfloat16(found) if entry["dtype"] == "BF16" else found
    return tensors


def weight(tensors, linear: str, inputs: int) -> np.ndarray:
    """Float32 [out, in] of a packed linear."""
    packed, levels, scale = (tensors[f"{linear}.{part}"] for part in ("weight", "levels", "scale"))
    if levels.dtype == "u1" and levels.shape[2] == 1:  # two bits of each, out of a table
        each = (MEANS + [-mean for mean in MEANS], levels & 15), (HALF, levels >> 4)
        mean, half = (np.reshape(pairs, (16, 2)).astype("i1")[place] for pairs, place in each)
        levels = np.stack([mean - half, mean + half], -1).reshape(*levels.shape[:2], 4)
    if levels.dtype == "u1":  # two to a byte, as two's complement
        levels = ((np.stack((levels & 15, levels >> 4), -1) ^ 8).astype("i1") - 8).reshape(*levels.shape[:2], 4)
    codes = (packed[..., None] >> np.array([0, 2, 4, 6], "u1") & 3).reshape(*packed.shape[:2], -1)
    values = np.take_along_axis(levels, codes.astype("i8"), 2).astype("f4") * scale.astype("f4")[..., None]
    return values.reshape(len(packed), -1)[:, :inputs]


def rows(tensors, owner: str) -> np.ndarray:
    """Float32 [rows, width] of an embedding or a head in 8 bits."""
    return tensors[f"{owner}.weight"].astype("f4") * tensors[f"{owner}.scale"].astype("f4")[:, None]


def tables(tensors, quantizer: str):
    """T, Z (empty in the uniform form) and clipping factors."""
    levels, zero, clip = (tensors[f"{quantizer}.{part}"] for part in ("act_levels", "act_zero", "act_clip"))
    return levels.astype("i8"), zero.astype("i8"), (clip / 65536).astype("f4")


def quantize(x: np.ndarray, levels, zero, clip):
    """One group of float32 values: codes, step before it is rounded to its stored type, Z, the table taken."""
    high, low = max(np.float32(0), x.max()), max(np.float32(0), -x.min())
    if not len(zero):
        top = np.float32(levels.shape[1] - 1)
        step = (high * clip[0, 0] + low * clip[0, 1]) / top
        inverse = 1 / step if step > 1e-30 else np.float32(0)
        z = np.clip(np.rint(low * clip[0, 1] * inverse), 0, top)
        codes = np.clip(np.rint(x * inverse) + z, 0, top)
        return codes.astype("u1"), refit(x, codes - z), int(z), 0
    found = []
    for table, (t, z, factor) in enumerate(zip(levels, zero, clip, strict=True)):
        for share in np.array([1, 0.88], "f4"):
            sides = zip((high, low), factor, np.array([t[-1] - z, z], "f4"), strict=True)
            reach = share * max(extreme * (c / places) if places else 0 for extreme, c, places in sides)
            inverse = 1 / reach if reach > 1e-30 else np.float32(0)
            codes = np.abs(np.clip(np.rint(x * inverse) + np.float32(z), 0, t[-1])[:, None] - t).argmin(1)
            step = refit(x, lattice := (t[codes] - z).astype("f4"))
            found.append((np.square(step * lattice - x).sum(), codes.astype("u1"), step, int(z), table))
    return min(found, key=lambda candidate: candidate[0])[1:]


def cached(records: np.ndarray, levels, zero, bits: int, size: int) -> np.ndarray:
    """Float32 [..., size] of records uint8 [..., record]."""
    packed = -(-size // (whole := 8 // np.gcd(bits, 8))) * whole
    stream = np.unpackbits(records[..., : packed * bits // 8], axis=-1, bitorder="little")
    codes = (stream.reshape(*stream.shape[:-1], packed, bits) << np.arange(bits)).sum(-1)[..., :size]
    step = bfloat16(records[..., -3:-1].copy().view("<u2"))
    mark = records[..., -1:].astype("i8")
    table, z = (mark, zero[mark]) if len(zero) else (0 * mark, mark)
    return step * (levels[table, codes] - z).astype("f4")
