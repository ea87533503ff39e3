"""What makes the program and its ranks start and exit fast. `train.py` imports this file before torch.

Times are of 2 CPU cores, PyTorch 2.13 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import threading
from datetime import timedelta

from conf.schema import ConfigError


def skip_final_collection() -> None:
    """At its exit Python searches all imported modules for garbage, for 0.8 s; with frozen objects it does not."""
    atexit.register(gc.freeze)


def configure_rank(num_local_ranks: int, num_ranks: int, deterministic: bool) -> None:
    """Set what torch, DeepSpeed, NCCL and gloo read from the environment. Call it before DeepSpeed is imported."""
    import torch
    from tqdm import tqdm

    if num_local_ranks == num_ranks:  # one host: listen on loopback only
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local_ranks))
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only with its own workspace
        torch.use_deterministic_algorithms(True)
    # tqdm's default lock is a semaphore; Python warns if a killed rank leaves one behind
    tqdm.set_lock(threading.RLock())


def import_deepspeed() -> None:
    """Import DeepSpeed without two slow steps that training does not need, 27 s on the CPU.

    `deepspeed.init_distributed` compiles a C++ extension (25 s) that only inference uses. DeepSpeed imports Muon for
    every optimizer, and Muon's use of `torch.compile` imports inductor (2 s).
    """
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if hasattr(torch.compiler, "set_default_backend"):  # since PyTorch 2.13
        torch.compiler.set_default_backend("eager")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        torch.compiler.set_default_backend(None)
    gc.freeze()  # DeepSpeed collects garbage six times while it starts and would search all modules each time


def init_distributed(init_method: str | None, timeout_s: float) -> None:
    """Join the process group that RANK and WORLD_SIZE name: NCCL on GPUs, gloo on the CPU. Every rank must call it.

    They meet at `init_method`, such as file:///tmp/rendezvous; None uses MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: on rank 0, if another program listens on the port.
    """
    import_deepspeed()
    import deepspeed
    import torch

    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if torch.cuda.is_available() else "gloo",
            auto_mpi_discovery=False,
            init_method=init_method,
            timeout=timedelta(seconds=timeout_s),
            dist_init_required=True,
            verbose=False,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        raise ConfigError(
            f"MASTER_PORT={port} is taken on {address}, where rank 0 must listen: stop the program that uses it "
            f"(ss -ltnp shows it), or set another port for all ranks, such as MASTER_PORT={int(port) % 60000 + 1024}"
        ) from error


# Ends this process without Python's own shutdown; files and the wandb run must be closed. The shutdown takes seconds,
# NCCL's part of it can wait for a dead peer, and threads that libraries leave behind can abort it (apache/arrow#45214).
exit_now = os._exit
