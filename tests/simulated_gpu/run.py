#!/usr/bin/env python3
"""Commands of lbllm, or a script, on the simulated device: exit code 70 where a rule was broken that CUDA itself does not have.

    python tests/simulated_gpu/run.py ptq --recipe recipe.yaml
    python tests/simulated_gpu/run.py --stop step:3 distill --recipe recipe.yaml
    python tests/simulated_gpu/run.py --script some.py ARGUMENTS
    python tests/simulated_gpu/run.py --serve          requests on stdin, one JSON object a line, see `serve`

The recipe says `runtime.device: cuda`. --stop: SIGTERM comes after so many training steps, or pieces of hidden states. --tables:
knee tables of 4 bits are given, not searched for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Begins again with the guard, then runs."""
    from simulated_gpu import build

    build.preload()
    from simulated_gpu.commands import main

    return main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
