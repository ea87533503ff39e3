"""Profiler traces of single steps, and snapshots of GPU memory, for all recipes that have steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed.comm as dist
import torch

from conf.schema import Config
from ring_attention.trace import visible_ring_steps

MAX_ALLOCATIONS = 100_000  # newest events of a snapshot; tens of MB


@contextlib.contextmanager
def profiler(config: Config, run_dir: Path) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step. Each rank writes its own files to RUN_DIR/profile.

    profile=true traces steps profile_steps[0] to profile_steps[1] for Perfetto: rank_N.json. memory_snapshot=true
    records GPU allocations until the block ends, also by running out of memory: memory_rank_N.pickle, for
    https://docs.pytorch.org/memory_viz.
    """
    folder = run_dir / "profile"
    with contextlib.ExitStack() as stack:
        if config.memory_snapshot and torch.cuda.is_available():
            folder.mkdir(exist_ok=True)
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
            stack.callback(torch.cuda.memory._record_memory_history, enabled=None)
            stack.callback(torch.cuda.memory._dump_snapshot, str(folder / f"memory_rank_{dist.get_rank()}.pickle"))
        if not config.profile:
            yield lambda: None
            return
        folder.mkdir(exist_ok=True)
        stack.enter_context(visible_ring_steps())
        first, last = config.profile_steps
        profile = stack.enter_context(
            torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=first - 2, warmup=1, active=last - first + 1, repeat=1),
                on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"rank_{dist.get_rank()}.json")),
            )
        )
        yield profile.step
