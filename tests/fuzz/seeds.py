"""Which cases run."""

import os
from typing import Any

import pytest


def seeds(normal: int, every: int) -> list[Any]:
    """Seeds of the cases to run: the first `normal` of them always, all with `-m "slow or not slow"`.

    LBLLM_FUZZ_SEED and LBLLM_FUZZ_CASES choose others: the first seed, and how many.
    """
    first, count = os.environ.get("LBLLM_FUZZ_SEED"), os.environ.get("LBLLM_FUZZ_CASES")
    if first or count:
        start = int(first or 0)
        return list(range(start, start + int(count or normal)))
    return [pytest.param(seed, marks=[] if seed < normal else pytest.mark.slow) for seed in range(every)]
