"""What a few training steps really take, time and memory, on random tokens, in processes of their own."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from conf.schema import Config
from recipes.launch import launcher
from recipes.launch.memory_errors import out_of_memory_cause
from recipes.run.errors import RunFailed

PROBE_FILE, NO_MEMORY_FILE = "probe.json", "out_of_memory"


@dataclass(frozen=True)
class Probe:
    """Train the configured number of steps on random tokens; rank 0 writes time and peak memory to PROBE_FILE.

    The peak is the largest of all ranks: on a GPU without the allocator's cache, on the CPU what the process grows by.
    """

    config: Config

    def run(self, run_dir: Path, console: TextIO) -> float:
        try:
            self._measure(run_dir)
        except Exception as error:
            if cause := out_of_memory_cause(error):
                (run_dir / NO_MEMORY_FILE).write_text(str(cause), encoding="utf-8")
            raise
        return float("nan")

    def _measure(self, run_dir: Path) -> None:
        import deepspeed.comm as dist

        from recipes.engine.build import build_engine, build_sharder
        from recipes.monitor import device_metrics

        plan = launcher.shared_plan(self.config)
        libraries_gib = 0.0 if plan.on_gpu else device_metrics.peak_memory_gib()
        engine = build_engine(plan)
        device_metrics.reset_peak_memory()  # building the fp32 weights may have needed more
        batches = build_sharder(plan, engine).steps(_random_sequences(plan.config), plan.accumulation_steps)
        clock = device_metrics.StepClock()
        for micro_batches in itertools.islice(batches, plan.config.num_steps):
            clock.restart()
            engine.train_step(micro_batches)
            clock.tick()
        step_time_s = engine.max_over_ranks(min(clock.take()))
        result = {
            "peak_gib": engine.max_over_ranks(device_metrics.peak_memory_gib(in_use=True) - libraries_gib),
            "peak_reserved_gib": engine.max_over_ranks(device_metrics.peak_memory_gib()) if plan.on_gpu else None,
            "step_time_s": step_time_s,
            "flops": plan.flops * plan.tokens_per_step,
            "tokens_per_s": plan.throughput(step_time_s).tokens_per_s,
            "device": plan.device_name,
        }
        if dist.get_rank() == 0:
            (run_dir / PROBE_FILE).write_text(json.dumps(result), encoding="utf-8")


def _random_sequences(config: Config) -> Iterator[np.ndarray]:
    """Endless, [L+1] each, the same on all ranks: memory does not depend on the text, and no corpus is too short."""
    generator = np.random.default_rng(config.seed)
    while True:
        yield generator.integers(0, config.model.vocab_size, config.data.sequence_length + 1)


def train_probe(config: Config, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Run a `Probe` in fresh ranks; what it measured, or `error` alone if it ran out of memory.

    Raises:
        RunFailed: if it fails for another reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PROBE_FILE, NO_MEMORY_FILE):
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    if not torch.cuda.device_count():  # glibc then returns freed tensors at once, so that the peak is that of tensors
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    try:
        launcher.start(Probe(config), num_ranks, folder)
    except RunFailed:
        if not (folder / NO_MEMORY_FILE).exists():
            raise
        return {"error": (folder / NO_MEMORY_FILE).read_text(encoding="utf-8")}
    return json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
