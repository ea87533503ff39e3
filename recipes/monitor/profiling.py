"""Traces of single steps for Perfetto, and what the GPU's memory was used for, for all recipes that have steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed.comm as dist
import torch

from conf.schema import Config

PROFILE_DIR = "profile"
MOST_ALLOCATIONS = 100_000  # the last ones are kept: some tens of MB


@contextlib.contextmanager
def profiler(config: Config, run_dir: Path) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step. Every rank writes files of its own to RUN_DIR/profile.

    profile=true makes the steps from profile_steps[0] to profile_steps[1] a trace for Perfetto, rank_N.json;
    memory_snapshot=true records allocations on a GPU until the block ends, also by running out of memory, for
    https://docs.pytorch.org/memory_viz: memory_rank_N.pickle.
    """
    folder = run_dir / PROFILE_DIR
    with contextlib.ExitStack() as stack:
        if config.memory_snapshot and torch.cuda.is_available():
            folder.mkdir(exist_ok=True)
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
            stack.callback(_dump_memory, folder / f"memory_rank_{dist.get_rank()}.pickle")
        if not config.profile:
            yield lambda: None
            return
        folder.mkdir(exist_ok=True)
        first, last = config.profile_steps
        recording = stack.enter_context(
            torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=first - 2, warmup=1, active=last - first + 1, repeat=1),
                on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"rank_{dist.get_rank()}.json")),
            )
        )
        yield recording.step


def _dump_memory(path: Path) -> None:
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
