"""How this process was started: by itself, or as one of several that torchrun has started. Without torch: every command asks."""

import os
from dataclasses import dataclass

from lbllm_cli.core.errors import LbllmError, UsageError

# What torchrun tells each process.
_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"


@dataclass(frozen=True)
class Launch:
    """How this process was started. local_rank, local_size: among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int


class Ended(LbllmError):
    """Another rank has said why all end."""

    def __init__(self, exit_code: int):
        super().__init__("")
        self.exit_code = exit_code


def launch() -> Launch | None:
    """What the environment says, None for a process by itself. Raises UsageError where torchrun has not said all of it."""
    size = os.environ.get(_SIZE, "1")
    if size == "1":
        return None
    names = (_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE, "MASTER_PORT")
    try:
        rank, size_, local_rank, local_size, port = (int(os.environ[name]) for name in names)
        found = Launch(rank, size_, local_rank, local_size, os.environ["MASTER_ADDR"], port)
    except (KeyError, ValueError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"WORLD_SIZE is {size[:20]}, but {problem}; start several processes with torchrun") from None
    if not (0 <= found.rank < found.size and 0 <= found.local_rank < found.local_size <= found.size):
        raise UsageError(f"rank {found.rank} of {found.size}, {found.local_rank} of {found.local_size}: start them with torchrun")
    return found


def started() -> bool:
    """Whether several processes were."""
    return os.environ.get(_SIZE, "1") != "1"


def refuse_ranks(command: str) -> None:
    """Raises UsageError, on the first rank with a message, where several processes were started of a command that is one's."""
    if (found := launch()) is None:
        return
    if found.rank:
        raise Ended(UsageError.exit_code)
    raise UsageError(f"{command} runs in one process, {found.size} were started; run it without torchrun")
