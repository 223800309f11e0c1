"""How much RAM a process may still take."""

from collections.abc import Iterator
from pathlib import Path

_GROUPS, _SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_ram() -> int:
    """Bytes that can be had without swapping: what is free on the machine, or in the control group that limits a batch job or a
    container where that is less. The system ends a process that takes more than its group may, without a word of its own.
    """
    import psutil  # here alone: a training step is measured where it is not installed

    return min([int(psutil.virtual_memory().available), *_left(_SELF, _GROUPS)])


def _left(own: Path, groups: Path) -> Iterator[int]:
    """What each limit above this process leaves. own: the list of its groups; groups: where they are mounted."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        # Version 2 has one tree, whose number is 0; in version 1 memory has a tree of its own.
        if number == "0" and not kinds:
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be that of the machine, which is not mounted there; its own group is the root then.
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            if (room := _room(folder, *names)) is not None:
                yield room
            if folder == root:
                break


def _room(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """Bytes below a group's limit, None where it has none. What only caches files is given back when it is wanted."""
    try:
        most, taken = int((folder / limit).read_text(encoding="ascii")), int((folder / used).read_text(encoding="ascii"))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, most - taken + int(counts.get(cached, 0)))
    except (OSError, ValueError):  # "max" is no number
        return None
