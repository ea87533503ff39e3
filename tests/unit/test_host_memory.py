"""The memory that a run on the CPU may use, with made-up control groups and SLURM jobs."""

from __future__ import annotations

import os

import pytest

from recipes.launch import host_memory

GIB = 2**30


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with 64 GiB; the function writes what this process is in, and files below /sys/fs/cgroup."""
    pages = {"SC_PHYS_PAGES": 64 * GIB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(host_memory, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "groups")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def write(own: str, files: dict[str, object]) -> None:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return write


def test_without_limits_it_is_the_machines(host):
    assert host_memory.usable_memory_bytes() == 64 * GIB  # no /proc/self/cgroup
    host("0::/user.slice\n", {"user.slice/memory.max": "max"})
    assert host_memory.usable_memory_bytes() == 64 * GIB


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"memory.max": 8 * GIB}),  # a container
        ("0::/docker/abc\n", {"memory.max": 8 * GIB}),  # a container that sees its path outside
        ("0::/job/step\n", {"job/memory.max": 8 * GIB, "job/step/memory.max": "max"}),
        ("0::/job/step\n", {"job/memory.max": 32 * GIB, "job/step/memory.max": 8 * GIB}),
        ("5:cpu,memory:/a/b\n1:cpu:/\n0::/\n", {"memory/a/memory.limit_in_bytes": 8 * GIB}),
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/a/memory.limit_in_bytes": 8 * GIB}),
    ],
)
def test_the_strictest_control_group_counts(host, own, files):
    host(own, files)
    assert host_memory.usable_memory_bytes() == 8 * GIB


@pytest.mark.parametrize(
    ("job", "gib"),
    [
        ({"SLURM_MEM_PER_NODE": "16384"}, 16),
        ({"SLURM_MEM_PER_CPU": "2048"}, 8),
        ({"SLURM_MEM_PER_NODE": "0"}, 64),  # all of it
        ({"SLURM_MEM_PER_NODE": "131072"}, 64),
    ],
)
def test_slurms_memory_of_the_job_counts(host, monkeypatch, job, gib):
    for name, value in (job | {"SLURM_CPUS_ON_NODE": "4"}).items():
        monkeypatch.setenv(name, value)
    assert host_memory.usable_memory_bytes() == gib * GIB


def test_what_a_user_has_set_for_srun_does_not_count(host, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1G")
    assert host_memory.usable_memory_bytes() == 64 * GIB
