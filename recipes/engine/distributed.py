"""The process group, and small reductions over all its ranks."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta

import deepspeed
import deepspeed.comm as dist
import torch

from conf.schema import ConfigError


def _import_muon() -> None:
    """Import Muon without PyTorch's inductor, which takes 2 s.

    DeepSpeed imports Muon for every optimizer. Three of its functions use torch.compile, and that imports the default
    backend. Nothing here calls them.
    """
    if not hasattr(torch.compiler, "set_default_backend"):  # since PyTorch 2.13
        return
    torch.compiler.set_default_backend("eager")
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compiler.set_default_backend(None)


def init_distributed(init_method: str | None, timeout_s: float) -> None:
    """Join the process group as RANK of WORLD_SIZE: NCCL on GPUs, gloo on the CPU. Every rank must call it.

    Args:
        init_method: the rendezvous, for example file:///tmp/rendezvous; None uses MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: on rank 0, if another program listens on the port.
    """
    # on the CPU DeepSpeed would compile a C++ extension for 25 s, which only its inference uses
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
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
            f"MASTER_PORT={port} is taken on {address}, where rank 0 must listen: end the program that uses it "
            f"(ss -ltnp shows it), or set another port for all ranks, such as MASTER_PORT={int(port) % 60000 + 1024}"
        ) from error


def extremes_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, tuple[float, float]]:
    """(smallest, largest) over all ranks of each value, in one collective. Every rank must pass the same names."""
    own = torch.tensor([*values.values()], dtype=torch.float64)
    extremes = torch.stack([-own, own]).to(device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    smallest, largest = extremes.tolist()
    return {name: (-low, high) for name, low, high in zip(values, smallest, largest, strict=True)}


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest value over all ranks. Every rank must call it."""
    return extremes_over_ranks({"value": value}, device)["value"][1]
