#!/usr/bin/env python3
"""Compiles the kernels for GPUs, without one, and says what came out: registers, spills, shared memory, instructions that count.

    python scripts/kernel_statistics.py            # print
    python scripts/kernel_statistics.py --check    # against tests/runtime/cuda/statistics.json: exit code 1 where they differ
    python scripts/kernel_statistics.py --write    # record
    python scripts/kernel_statistics.py --check --all
    python scripts/kernel_statistics.py --sources  # hash of the files that decide what is compiled

Each case is one specialization of a kernel, as a model's shapes make it, and is read from its SASS. Without --all or --write
those that are `everywhere` are compiled for every one of ARCHITECTURES and the others for sm_90. Nothing may spill. Registers may
differ from the record by 8, each count by a tenth and 4: compilers move. Needs Triton, whose ptxas and cuobjdump it uses, and no
TRITON_INTERPRET.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lbllm_cli.runtime.cuda import activations, gemm, gemv, head, instructions, level_bytes
from lbllm_cli.runtime.cuda.instructions import NATIVE
from lbllm_cli.runtime.cuda.weights import FOLD

RECORD = Path(__file__).parents[1] / "tests" / "runtime" / "cuda" / "statistics.json"
ARCHITECTURES = (80, 89, 90, 100, 120)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Instructions that are counted, by what their names begin with.
COUNTED = {
    "PRMT": ("PRMT",),
    "dp4a": ("IDP.4A",),
    "integer MMA": ("IMMA", "IGMMA", "UTCIMMA"),
    "float MMA": ("HMMA", "HGMMA", "UTCHMMA"),
    "wide loads": ("LDG.E.128", "LDG.E.64", "LDGSTS.E.BYPASS.128"),
    "barriers": ("BAR",),
    "all": ("",),
}
SPILLS = ("STL", "LDL")


@dataclass(frozen=True)
class Case:
    """One specialization. pointers: type of each tensor. integers: a value of each, by which Triton specializes; either may have
    more than the kernel takes. constants: of the kernel, and options of its compilation.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    integers: dict[str, int]
    constants: dict[str, Any]
    everywhere: bool = False

    def compiled(self, whole: bool) -> dict[str, int]:
        """Names of what is compiled of it, and for which architectures. whole: for all of them."""
        wanted = ARCHITECTURES if whole or self.everywhere else (90,)
        return {f"{self.name}, sm_{architecture}": architecture for architecture in wanted}


_WEIGHTS = {"words": "*i32", "levels": "*i32", "table": "*i32", "scale": "*fp16"}
_OUTPUTS = {"bias": "*fp32", "residual": "*bf16", "out": "*bf16"}


def _linear(name: str, kernel: Any, rows: int, groups: int, words: int, form: int = 0, **constants: Any) -> Case:
    """A product of packed weights [4096, groups] with some rows. form: bytes of a group's levels, 0 where they are int32."""
    integers = {"rows": rows, "outs": 4096, "groups": groups, "inputs": groups * words * 16, "steps": groups}
    values = "STEPS" not in constants
    few = kernel in (gemv.gemv_places, gemv.gemv_values)
    constants = {"BYTES": form} | ({} if values else {"PARTS": 1}) | constants
    unit = constants.get("STEPS", 0) * words if form else None
    tile = gemv.tile(rows, 4096, groups, words, values) if few else gemm.tile(rows, words, unit, values)
    weights = _WEIGHTS | ({"levels": "*u8"} if form and not (few and form == FOLD) else {})
    inputs = {"places": "*i32" if few else "*i8", "step": "*fp32", "planes": "*fp32", "x": "*bf16"}
    return Case(name, kernel, weights | inputs | _OUTPUTS, integers, {"BIAS": False, "RESIDUAL": False, **tile, **constants})


def _quantizer(name: str, size: int, width: int, **constants: Any) -> Case:
    pointers = {"x": "*bf16", "lattice": "*i8", "factors": "*fp32", "step": "*fp32"}
    pointers["found"] = "*bf16" if constants["VALUES"] else "*i8"
    integers = {"width": width, "groups": -(-width // size), "padded": width}
    return Case(name, activations.quantize_rows, pointers, integers, {"STEP": tl.float32, **activations.tile(size), **constants})


def _head(name: str, rows: int) -> Case:
    pointers, integers = {"weight": "*bf16", "x": "*bf16", "out": "*bf16"}, {"rows": rows, "outs": 32000, "width": 4096}
    return Case(name, head.head_rows, pointers, integers, head.tile(rows, 4096))


# A kernel is added here.
CASES = [
    replace(_linear("gemv, 1 row", gemv.gemv_places, 1, 32, 8, STEPS=1, RESIDUAL=True), everywhere=True),
    _linear("gemv, 1 row, 86 groups, step of the row", gemv.gemv_places, 1, 86, 8, STEPS=0),
    _linear("gemv, 1 row, groups of 64", gemv.gemv_places, 1, 64, 4, STEPS=1),
    _linear("gemv, 1 row, groups of 16, a step of four", gemv.gemv_places, 1, 64, 4, FOLD, STEPS=1),
    _linear("gemv, 1 row, groups of 16, a step of two", gemv.gemv_places, 1, 64, 4, FOLD, STEPS=1, PARTS=2),
    _linear("gemv, 1 row, groups of 16 as they are, a step of three", gemv.gemv_places, 1, 256, 1, 1, STEPS=3),
    _linear("gemv, 1 row, groups of 64 with levels of 2 bits", gemv.gemv_places, 1, 64, 4, 1, STEPS=1),
    _linear("gemv, 4 rows", gemv.gemv_places, 4, 32, 8, STEPS=1),
    _linear("gemv, 8 rows", gemv.gemv_places, 8, 32, 8, STEPS=1),
    _linear("gemv of values, 1 row", gemv.gemv_values, 1, 32, 8),
    _linear("gemv of values, 4 rows", gemv.gemv_values, 4, 32, 8),
    _linear("gemv of values, 1 row, groups of 16", gemv.gemv_values, 1, 64, 4, FOLD),
    Case(
        "deal columns", gemv.deal_columns, {"x": "*bf16", "planes": "*fp32"}, {"width": 4096, "words": 256}, {"V": 8, "BLOCK": 64}
    ),
    _linear("gemm, 16 rows", gemm.gemm_places, 16, 32, 8, STEPS=1),
    replace(_linear("gemm, 2048 rows", gemm.gemm_places, 2048, 32, 8, STEPS=1), everywhere=True),
    replace(
        _linear("gemm, 2048 rows, groups of 16, a step of four", gemm.gemm_places, 2048, 64, 4, FOLD, STEPS=1),
        everywhere=True,
    ),
    replace(
        _linear("gemm, 2048 rows, groups of 16, a step of two", gemm.gemm_places, 2048, 64, 4, FOLD, STEPS=1, PARTS=2),
        everywhere=True,
    ),
    _linear("gemm, 2048 rows, groups of 16, step of the row", gemm.gemm_places, 2048, 64, 4, FOLD, STEPS=0),
    _linear("gemm, 2048 rows, groups of 64 with levels of 2 bits", gemm.gemm_places, 2048, 64, 4, 1, STEPS=2),
    _linear("gemm of values, 2048 rows", gemm.gemm_values, 2048, 32, 8),
    _linear("gemm of values, 2048 rows, groups of 16", gemm.gemm_values, 2048, 64, 4, FOLD),
    replace(_quantizer("quantizer, groups, two tables", 128, 4096, TABLES=2, PLACES=128, VALUES=False), everywhere=True),
    _quantizer("quantizer, rows, two tables", 11008, 11008, TABLES=2, PLACES=128, VALUES=False),
    _quantizer("quantizer, groups, uniform, values", 128, 4096, TABLES=0, PLACES=16, VALUES=True),
    _head("head, 1 row", 1),
    _head("head, 8 rows", 8),
]


def sources() -> str:
    """Hash of the files that decide what is compiled: the kernels, what they call, and the cases here."""
    files = [Path(module.__file__ or "") for module in (activations, gemm, gemv, head, instructions, level_bytes)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in (*files, Path(__file__)))).hexdigest()


def _source(case: Case) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        value = case.constants.get(name, case.integers.get(name))
        if name in case.constants or value == 1:  # Triton makes a constant of an integer that is 1
            signature[name], constants[(place,)] = "constexpr", value
            continue
        signature[name] = case.pointers.get(name, "i32")
        if name in case.pointers or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _listing(cubin: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, "-sass", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout


def statistics(case: Case, architecture: int, folder: Path) -> dict[str, int]:
    """Compiles one case: {"registers": 80, "spills": 0, "shared bytes": 512, "PRMT": 68, ...}."""
    options = {name: case.constants[name] for name in OPTIONS if name in case.constants}
    made = triton.compile(_source(case), target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    listing = _listing(cubin)
    listed = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+ +)?([A-Z][A-Z0-9_.]*)", listing, re.M)
    counts, usage = Counter(listed), re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert usage is not None
    assert listed
    found = {"registers": int(usage[1]), "spills": sum(count for name, count in counts.items() if name.startswith(SPILLS))}
    found |= {"shared bytes": made.metadata.shared}
    return found | {kind: sum(n for name, n in counts.items() if name.startswith(names)) for kind, names in COUNTED.items()}


def differences(name: str, found: dict[str, int], known: dict[str, int] | None) -> Iterator[str]:
    """What of a case is not as it was recorded."""
    if found["spills"]:
        yield f"{name}: {found['spills']} loads and stores of spilled registers"
    if known is None or known.keys() != found.keys():
        yield f"{name}: not in the record; run with --write"
        return
    for key, value in known.items():
        margin = 8 if key == "registers" else value // 10 + 4
        if abs(found[key] - value) > margin:
            yield f"{name}: {key} {found[key]}, recorded {value}"


def main() -> int:
    """Prints one line for what was compiled, and what differs from the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the record")
    mode.add_argument("--write", action="store_true", help="record")
    mode.add_argument("--sources", action="store_true", help="print the hash of what would be compiled, and nothing else")
    parser.add_argument("--all", action="store_true", help="every case for every architecture; takes three times as long")
    arguments = parser.parse_args()
    if arguments.sources:
        print(sources())
        return 0
    if not NATIVE:
        parser.error("TRITON_INTERPRET is set; unset it")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for name, architecture in case.compiled(arguments.all or arguments.write).items():
                found[name] = statistics(case, architecture, Path(folder))
                print(f"{name:54} " + "  ".join(f"{key} {value}" for key, value in found[name].items()), flush=True)
    if arguments.write:
        record = {"triton": triton.__version__, "sources": sources(), "cases": found}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not arguments.check:
        return 0
    record = json.loads(RECORD.read_text(encoding="utf-8"))["cases"]
    wrong = [line for name, values in found.items() for line in differences(name, values, record.get(name))]
    wrong += [f"{name}: recorded, and no case any more" for name in record.keys() - {n for c in CASES for n in c.compiled(True)}]
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
