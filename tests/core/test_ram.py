"""RAM that a process may still take, with the limits of the control groups above it."""

from pathlib import Path

import psutil
import pytest

from lbllm_cli.core import ram

MIB = 1 << 20


def group(folder: Path, limit: str, used: int, cached: int, version: int = 2) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n", encoding="ascii")
    (folder / names[1]).write_text(f"{used}\n", encoding="ascii")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n", encoding="ascii")


@pytest.fixture
def left(tmp_path, monkeypatch):
    """What `available_ram` says of a machine with 1,000 MiB free, by what /proc/self/cgroup says."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000 * MIB}))
    monkeypatch.setattr(ram, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(ram, "_SELF", tmp_path / "own")

    def ask(text: str) -> int:
        (tmp_path / "own").write_text(text, encoding="utf-8")
        return ram.available_ram() // MIB

    return ask


def test_the_nearest_limit_counts_and_a_cache_of_files_is_given_back(left, tmp_path):
    job = tmp_path / "groups" / "slurm" / "job_7"
    group(job / "step", "max", 10 * MIB, 0)
    assert left("0::/slurm/job_7/step\n") == 1000
    group(job, f"{64 * MIB}", 40 * MIB, 30 * MIB)
    assert left("0::/slurm/job_7/step\n") == 54
    group(job.parent, f"{60 * MIB}", 50 * MIB, 2 * MIB)
    assert left("0::/slurm/job_7/step\n") == 12
    group(job, f"{64 * MIB}", 70 * MIB, 0)
    assert left("0::/slurm/job_7/step\n") == 0


def test_version_1_and_a_container_that_sees_its_group_as_the_root(left, tmp_path):
    group(tmp_path / "groups" / "memory", f"{500 * MIB}", 100 * MIB, 0, version=1)
    assert left("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n") == 400
    group(tmp_path / "groups", f"{300 * MIB}", 100 * MIB, 0)
    assert left("0::/\n") == 200


def test_without_groups_it_is_the_machine(left, tmp_path):
    assert left("") == 1000
    (tmp_path / "own").unlink()
    assert ram.available_ram() == 1000 * MIB
