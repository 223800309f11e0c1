"""Joining the other ranks, as torchrun has started them; alone, where nobody has."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import metadata
from threading import Thread
from typing import TYPE_CHECKING, Any

from lbllm_cli.core.console import silence
from lbllm_cli.core.errors import LbllmError, UsageError
from lbllm_cli.parallel.group import ALONE, Group, agree
from lbllm_cli.parallel.launch import Ended, Launch, launch

if TYPE_CHECKING:
    from lbllm_cli.parallel.ranks import Ranks
    from lbllm_cli.parallel.watch import Watch

# Another version of any of these gives other numbers, or other files.
_LIBRARIES = ("lbllm-cli", "torch", "transformers", "safetensors", "numpy")
# A lost rank is found by its beats; an operation may wait for a slow disk as long as it likes.
_NEVER = timedelta(days=30)


@contextmanager
def joined() -> Iterator[Group]:
    """All ranks of this run, until its end. Where one fails, its message is said once and all end with its exit code.

    Raises UsageError where ranks have other versions of libraries.
    """
    if (found := launch()) is None:
        yield ALONE
        return
    if found.rank:
        silence()
    watch = _watch(found)
    watch.start()
    try:
        group = _group(found, watch)
        # Another Python adds up floats in another way.
        versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}
        _check_alike(group, versions, "versions of libraries")
        yield group
        group.meet()
    except LbllmError as error:
        # Those that were stopped, each by its own signal, have one thing to say as well.
        first = watch.end(error.exit_code)
        code = error.exit_code if first else watch.ended() or error.exit_code
        _part(watch)
        if first:
            silence(False)
            raise
        raise Ended(code) from None
    except BaseException:
        watch.end(1)
        _part(watch)
        silence(False)
        raise
    watch.stop()
    _leave()
    watch.part()


def _watch(found: Launch) -> "Watch":
    from lbllm_cli.parallel.watch import Watch, connection

    # torchrun's own agent serves the store, but where its variables were set by hand; a second try after a failure starts anew.
    by_hand = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    serves = found.rank == 0 and by_hand
    prefix = f"lbllm{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    first = connection(found.host, found.port, prefix, serves)
    made: list[object] = [first]
    connect = partial(connection, found.host, found.port, prefix, False)
    # Where the store is gone, its rank is: on that machine the next one speaks.
    speaks = found.local_rank == (1 if by_hand and found.rank == found.local_rank else 0)
    return Watch(lambda: made.pop() if made else connect(), found.rank, found.size, serves, speaks)


def _group(found: Launch, watch: "Watch") -> "Ranks":
    import torch
    import torch.distributed as dist

    from lbllm_cli.parallel.group import Traffic
    from lbllm_cli.parallel.ranks import Ranks

    stores: Any = dist
    gpus = torch.accelerator.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=stores.PrefixStore("ranks", watch.store), rank=found.rank,
        world_size=found.size, timeout=_NEVER,
    )  # fmt: skip
    ranks = Ranks(None, watch, Traffic({}))
    sizes = ranks.facts(found.local_size)
    if len(set(sizes)) > 1:
        raise UsageError(f"machines have {min(sizes)} to {max(sizes)} ranks; start equally many on each")
    return ranks if found.local_size == found.size else ranks.with_nodes(found.local_size, _NEVER)


def _leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def _part(watch: "Watch") -> None:
    """Ends this rank after a failure. Others that wait for it in an operation look up from there once it is out of the group."""
    if watch.serves:
        # It may wait for what is under way on a GPU.
        Thread(target=_leave, daemon=True).start()
    watch.part()


def _check_alike(group: Group, value: dict[str, str], what: str) -> None:
    if lines := agree(group, value):
        listed = "\n".join(lines)
        raise UsageError(f"ranks have different {what}:\n{listed}\nStart all of them in the same environment")


def check_alike(group: Group, inputs: dict[str, object]) -> None:
    """Raises UsageError where what a stage is made from differs between ranks."""
    _check_alike(group, {key: str(value) for key, value in inputs.items()}, "recipes, models or text")
