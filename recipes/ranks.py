"""Which ranks a launcher has started, and how a run of them fails. Imports nothing slow: `train.py` asks it first."""

from __future__ import annotations

import os
import re


class RunFailed(RuntimeError):
    """A rank failed; the message names it, shows its error and says where its log is."""


def adopt_external_ranks() -> bool:
    """Whether a launcher has started this process as one of several ranks; makes srun's variables look like torchrun's.

    `srun` is recognised by its step: a batch script or an interactive shell has the job's variables too.
    """
    environ = os.environ
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return True
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_PROCID" not in environ or num_tasks == 1:
        return False
    first_host = re.match(r"([^\[,]+)(?:\[(\d+))?", environ["SLURM_STEP_NODELIST"])  # node[003-007,9] -> node003
    assert first_host is not None
    environ.update(
        RANK=environ["SLURM_PROCID"],
        WORLD_SIZE=str(num_tasks),
        LOCAL_RANK=environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(num_tasks) if environ.get("SLURM_STEP_NUM_NODES") == "1" else "unknown",
    )
    environ.setdefault("MASTER_ADDR", "".join(part or "" for part in first_host.groups()))
    environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 20000))
    return True
