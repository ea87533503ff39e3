"""Whether a launcher (torchrun, deepspeed, srun, submitit) has started this process as a rank. Imports nothing slow."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

from conf.schema import Config, ConfigError

RENDEZVOUS = "RING_ATTENTION_RENDEZVOUS"  # names the folder of the ranks' file rendezvous, instead of MASTER_ADDR
ACCELERATORS = ("cuda", "cpu")  # that DS_ACCELERATOR, DeepSpeed's choice of a device, may name here


def check_accelerator() -> None:
    """Make DS_ACCELERATOR's device, if it is set, the one that torch finds. Call it before CUDA is used.

    Raises:
        ConfigError: if it names another device than ACCELERATORS, or cuda where there is no GPU.
    """
    given = os.environ.get("DS_ACCELERATOR")
    if given is None:
        return
    if given not in ACCELERATORS:
        raise ConfigError(f"DS_ACCELERATOR={given} is not supported: use {' or '.join(ACCELERATORS)}, or unset it")
    if given == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    import torch

    if not torch.cuda.device_count():
        raise ConfigError("DS_ACCELERATOR=cuda needs an NVIDIA GPU, and there is none: use cpu, or unset it")


def ranks_are_started() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_given(config: Config) -> int | None:
    """The number of ranks, by the launcher or the configuration; None if it depends on the GPUs here.

    Raises:
        ConfigError: if the launcher has started another number of ranks than was typed.
    """
    typed = config.launch.num_ranks
    if not ranks_are_started():
        return typed
    started = int(os.environ["WORLD_SIZE"])
    if typed not in (None, started):
        raise ConfigError(
            f"launch.num_ranks={typed} is not the number of ranks that the launcher has started, {started}: leave it "
            f"out, or start {typed}"
        )
    return started


def adopt_external_ranks() -> bool:
    """Whether a launcher has started this process as one of several ranks; if so, set torchrun's variables.

    `srun` is recognised by its step, because batch scripts and interactive shells have the job's variables too. On one
    host its tasks use a file rendezvous unless MASTER_ADDR is set: torch's port would accept connections from anywhere.

    Raises:
        ConfigError: if RANK is set, but not the variables that belong to it.
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
            environ.setdefault("LOCAL_WORLD_SIZE", environ["LOCAL_SIZE"])  # the name that DeepSpeed's launcher uses
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
    job, step, restart = (environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    if environ["LOCAL_WORLD_SIZE"] == environ["WORLD_SIZE"] and "MASTER_ADDR" not in environ:
        # unique per start: files left by a killed start would confuse the next one
        name = f"ring_attention_{os.getuid()}_{job}_{step}_{restart}"
        environ[RENDEZVOUS] = str(Path(tempfile.gettempdir(), name))
    environ.setdefault("MASTER_ADDR", _first_host(environ["SLURM_STEP_NODELIST"]))
    # a port per step, below the kernel's ephemeral range
    environ.setdefault("MASTER_PORT", str(20000 + (97 * int(job) + int(step)) % 10000))
    return True


def make_private_folder(path: Path) -> None:
    """Make the folder that RENDEZVOUS names. Another rank of this user may have made it.

    Its name is predictable, in a folder where everyone may write, and who controls the file rendezvous in it can run
    code on the ranks.

    Raises:
        ConfigError: if it is a link or a file, belongs to another user, or others may use it.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return
    raise ConfigError(
        f"{path}, where the ranks of this srun meet, is {stat.filemode(found.st_mode)} of user {found.st_uid} and must "
        f"be drwx------ of user {os.getuid()}: set TMPDIR to a folder where only you may write, or MASTER_ADDR to "
        "127.0.0.1"
    )


def adopt_submitit_tasks() -> None:
    """In a submitit job of several tasks (Hydra's SLURM launcher), make each a rank; a single task starts its own."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _first_host(nodelist: str) -> str:
    """SLURM's node[003-007,9],gpu1 -> node003."""
    first, *_ = re.split(r",(?![^\[]*\])", nodelist)  # at commas outside of brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
