"""Traces of single steps for Perfetto, for all recipes that have steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed.comm as dist
import torch

from conf.schema import Config


@contextlib.contextmanager
def profiler(config: Config, run_dir: Path) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step; profile=true makes steps 3 and 4 a trace for Perfetto, on every rank."""
    if not config.profile:
        yield lambda: None
        return
    folder = run_dir / "profile"
    folder.mkdir(exist_ok=True)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"rank_{dist.get_rank()}.json")),
    ) as recording:
        yield recording.step
