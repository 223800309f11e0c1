"""Where the compiled kernels are."""

from pathlib import Path

from lbllm_cli.engine import __path__ as folders

STEM = "liblbllm_kernels"


def library_path() -> Path | None:
    """The shared library of this installation; None where it was installed without a C++ compiler."""
    # In an editable install the package has two folders: the checkout's, and the environment's with what was compiled.
    return next((path for folder in folders for path in sorted(Path(folder).glob(f"{STEM}.*"))), None)
