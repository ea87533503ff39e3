"""Which ranks a launcher has started, and how a run of them fails. Imports nothing slow: `train.py` asks it first."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from conf.schema import Config, ConfigError

RENDEZVOUS = "RING_ATTENTION_RENDEZVOUS"  # the variable with the folder in which ranks meet, in place of MASTER_ADDR


def ranks_are_started() -> bool:
    """Whether this process is one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_given(config: Config) -> int | None:
    """How many a launcher has started or the configuration asks for; None: that depends on the GPUs there are."""
    return int(os.environ["WORLD_SIZE"]) if ranks_are_started() else config.launch.num_ranks


def adopt_external_ranks() -> bool:
    """Whether a launcher has started this process as one of several ranks; makes its variables look like torchrun's.

    `srun` is recognised by its step: a batch script or an interactive shell has the job's variables too. Its tasks on
    one host meet in a file, unless MASTER_ADDR is set: torch's port would take connections from everywhere.

    Raises:
        ConfigError: if RANK is there, but not what belongs to it.
    """
    environ = os.environ
    if ranks_are_started():
        missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise ConfigError(
                f"RANK={environ['RANK']} says that a launcher has started this rank, but {', '.join(missing)} is not "
                "set: start with torchrun, deepspeed --no_local_rank or srun, or unset RANK"
            )
        if "LOCAL_SIZE" in environ:
            environ.setdefault("LOCAL_WORLD_SIZE", environ["LOCAL_SIZE"])  # DeepSpeed's launcher calls it that
        return True
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_PROCID" not in environ or num_tasks == 1:
        return False
    environ.update(
        RANK=environ["SLURM_PROCID"],
        WORLD_SIZE=str(num_tasks),
        LOCAL_RANK=environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=environ["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],  # 8(x2),4 -> 8
    )
    if environ["LOCAL_WORLD_SIZE"] == environ["WORLD_SIZE"] and "MASTER_ADDR" not in environ:
        start = [environ["SLURM_JOB_ID"], *(environ.get(f"SLURM_{name}", "0") for name in ("STEP_ID", "RESTART_COUNT"))]
        # a name of its own for each start: what a killed one leaves would confuse the next
        environ[RENDEZVOUS] = str(Path(tempfile.gettempdir(), f"ring_attention_{os.getuid()}_{'_'.join(start)}"))
    environ.setdefault("MASTER_ADDR", _first_host(environ["SLURM_STEP_NODELIST"]))
    # a port of this step's own, below those that the kernel gives out
    step = 97 * int(environ["SLURM_JOB_ID"]) + int(environ.get("SLURM_STEP_ID", "0"))
    environ.setdefault("MASTER_PORT", str(20000 + step % 10000))
    return True


def adopt_submitit_tasks() -> None:
    """In a job of submitit's with several tasks, under Hydra's launcher for SLURM: each task is a rank of one run.

    A job of one task, which is the default, starts ranks of its own, as on a laptop, one for each GPU that it is given.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _first_host(nodelist: str) -> str:
    """SLURM's node[003-007,9],gpu1 -> node003."""
    first = re.match(r"([^,\[]|\[[^\]]*\])+", nodelist)
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())
