"""How many codes of two checkpoints of one model differ, by block and linear.

    python scripts/compare_codes.py runs/one/ptq runs/two/ptq
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from lbllm_cli.format.weights import PackedWeight


def differing(first: Path, second: Path) -> dict[str, tuple[int, int, int]]:
    """Of two files of a block: by linear, rows with codes that differ, these codes, and all codes, padding included."""
    ours, theirs = load_file(first), load_file(second)
    found = {}
    for owner in PackedWeight.owners(list(ours)):
        packed = PackedWeight.from_tensors(ours, owner, 1)
        width = packed.codes.shape[1] * packed.group_size
        codes = [PackedWeight.from_tensors(tensors, owner, width).unpacked() for tensors in (ours, theirs)]
        apart = codes[0] != codes[1]
        found[owner] = int(apart.any(1).sum()), int(apart.sum()), apart.numel()
    return found


def main() -> None:
    """Prints a line for each linear that differs, one for each block, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args()
    total = every = 0
    for file in sorted(options.first.glob("block_*.safetensors")):
        found = differing(file, options.second / file.name)
        for owner, (rows, codes, count) in found.items():
            if codes:
                print(f"{owner}: {codes:,} of {count:,} codes, in {rows:,} rows")
        apart, whole = (sum(one[place] for one in found.values()) for place in (1, 2))
        print(f"{file.stem}: {apart:,} of {whole:,} codes")
        total, every = total + apart, every + whole
    print(f"all: {total:,} of {every:,} codes, {total / max(every, 1):.1%}")


if __name__ == "__main__":
    main()
