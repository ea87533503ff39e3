"""How much of this host's memory the run may use: containers and SLURM jobs have less than the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def usable_memory_bytes() -> int:
    """The least of the machine's memory, the limits of this process's control groups, and SLURM's for the job."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_cgroup_limits(), *_slurm_limits()])


def _cgroup_limits() -> Iterator[int]:
    """In bytes, of the groups of versions 1 and 2 that this process is in, and of those above them."""
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        # a container may see the path that its group has outside; its own limit is then at the root
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            file = root / folder / name
            if file.exists() and (limit := file.read_text().strip()) != "max":
                yield int(limit)


def _slurm_limits() -> Iterator[int]:
    """In bytes. SLURM's variables are in MiB, and 0 is all of the host's memory; not every cluster enforces them."""
    if "SLURM_CPUS_ON_NODE" not in os.environ:  # not in a job: users may have set the others for srun, as 64G
        return
    if per_node := int(os.environ.get("SLURM_MEM_PER_NODE", "0")):
        yield per_node * 2**20
    if per_cpu := int(os.environ.get("SLURM_MEM_PER_CPU", "0")):
        yield per_cpu * int(os.environ["SLURM_CPUS_ON_NODE"]) * 2**20
