"""Records of datasets of the Hugging Face hub, and what its refusals mean."""

import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import Any
from urllib.parse import quote, urlparse

from lbllm_cli.core.errors import UsageError, reason
from lbllm_cli.data.presets import PRESETS, Part, Preset, alternatives, preset_of

_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def check_hub_name(name: str) -> None:
    """Raises UsageError for what cannot be a dataset of the hub, without asking it."""
    if not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name or len(name) > 96:
        raise UsageError(f"source {f'hub:{name}'[:120]!r}: expected hub:NAME or hub:OWNER/NAME, the dataset's name on the hub")


def hub_records(repository: str, config: str | None, split: str) -> Iterator[Any]:
    """Records of a dataset of the hub, as they come. Raises UsageError when it cannot be read."""
    import datasets

    try:
        _check_network()
        yield from datasets.load_dataset(repository, config, split=split, streaming=True)
    except Exception as error:  # hub, network and builder errors have no common base
        raise _refusal(repository, error, evaluating=False) from None


def preset_records(name: str, evaluating: bool) -> Iterator[Any]:
    """Records of a preset's files on the hub, as they come, the files in the order of their names.

    Raises UsageError when they cannot be read, naming the presets that can stand in for one that is gone.
    """
    import datasets

    preset = PRESETS[name]
    part = preset.evaluation if evaluating else preset.calibration
    assert part is not None  # `sources.check` refused this
    try:
        _check_network()
        kind = "parquet" if part.files.endswith(".parquet") else "json"
        files = {"train": _addresses(preset, part)}
        yield from datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    except Exception as error:
        raise _refusal(preset.repository, error, evaluating) from None


def _addresses(preset: Preset, part: Part) -> list[str]:
    """Where the files of a part lie. They are listed here, for a pattern that `datasets` looks up takes refusals for no files.

    Raises the hub's errors, and FileNotFoundError where none has such a name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    folder = part.files.rpartition("/")[0]
    try:
        entries = HfApi().list_repo_tree(preset.repository, folder or None, revision=preset.revision, repo_type="dataset")
        names = sorted(entry.path for entry in entries if fnmatchcase(entry.path, part.files))
    except (EntryNotFoundError, RevisionNotFoundError):
        names = []
    if not names:
        raise FileNotFoundError(f"expected {part.files}, there is no such file")
    revision = f"@{quote(preset.revision, safe='')}" if preset.revision else ""
    return [f"hf://datasets/{preset.repository}{revision}/{name}" for name in names]


def _refusal(repository: str, error: Exception, evaluating: bool) -> UsageError:
    """What to do about an error, by the hub's answer where it is one that a library has wrapped."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = list(_causes(error))
    # `datasets` has one error for both, and drops what it came from.
    missing = any(isinstance(cause, RepositoryNotFoundError | DatasetNotFoundError) for cause in causes)
    if missing and any(isinstance(cause, GatedRepoError) or "is a gated dataset" in str(cause) for cause in causes):
        return UsageError(
            f"dataset {repository} is gated: accept its licence at https://huggingface.co/datasets/{repository}, "
            "then run: hf auth login"
        )
    name = preset_of(repository)
    others = ", ".join(alternatives(name, evaluating))
    if missing:
        return UsageError(
            f"dataset {repository} is not on the Hugging Face hub, or private (then run: hf auth login); use another: {others}"
        )
    if name is not None and isinstance(error, FileNotFoundError):
        return UsageError(
            f"dataset {repository} has changed on the Hugging Face hub: {reason(error)}; use another: {others}, "
            "or `path:` with a local file of the preset's schema"
        )
    return UsageError(
        f"dataset {repository} cannot be read from the Hugging Face hub: {reason(error)}. "
        "Without a network give a local file, or `path:` with the preset's schema"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def no_network() -> str | None:
    """Why the hub cannot be reached; None where it can, where a proxy stands before it, or where nobody is to ask it."""
    from huggingface_hub import constants

    address = urlparse(constants.ENDPOINT)
    # NO_PROXY alone is among them too, and is no proxy.
    proxies = urllib.request.getproxies()
    if constants.HF_HUB_OFFLINE or proxies.keys() & {address.scheme, "all"}:
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    return _unreachable(address.hostname or "", port, constants.HF_HUB_ETAG_TIMEOUT)


@cache
def _unreachable(host: str, port: int, seconds: float) -> str | None:
    """Once a command: a network that drops what is sent answers after `seconds`."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except OSError as error:
        return f"there is no network, or no way to {host} in it ({error.strerror or error})"
    return None


def _check_network() -> None:
    """Without a network the libraries try again for half a minute before they say so."""
    if (why := no_network()) is not None:
        raise UsageError(why)


@contextmanager
def at_once(local: bool = False) -> Iterator[str | None]:
    """Where the hub cannot be reached, libraries take what is kept here, and else fail at once; they would try again for minutes.

    local: that nothing is wanted of it: it is not asked, nor told what is loaded. Gives why it cannot be reached, else None.
    """
    import datasets
    from huggingface_hub import constants

    why = None if local else no_network()
    if why is None and not local:
        yield None
        return
    places: list[tuple[Any, str]] = [
        (constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"), (datasets.config, "HF_DATASETS_OFFLINE"),
    ]  # fmt: skip
    before = [getattr(*place) for place in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield why
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
