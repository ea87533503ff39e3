"""What logging costs: `python -m tests.tools.logging_cost`, on two CPU ranks. Takes minutes and needs idle cores.

One run of the main job logs every 40 steps. Intervals of 20 steps with a logged step in their middle alternate with
intervals without one. Printed are the difference in wall time and in rank 0's CPU time, which depends less on other
processes, and the time that rank 0 spends in the calls for a logged step, including waiting for the other rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from conf.schema import CheckpointConfig, Config, DataConfig, LoggingConfig
from recipes import registry
from recipes.launch import launcher

INTERVAL = 20
RESULT_FILE = "cost.json"


@dataclass(frozen=True)
class Measurement:
    """The ranks' task: rank 0 writes when each step ended and how long logging took, in seconds."""

    config: Config

    def run(self, run_dir: Path, console: TextIO) -> float:
        from recipes.monitor.reporter import Reporter
        from recipes.monitor.step_logger import StepLogger

        ends_s: list[tuple[float, float]] = []
        logging_s: list[float] = []

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                started = time.perf_counter()
                result = function(*arguments)
                logging_s.append(time.perf_counter() - started)
                return result

            return run

        def advance(reporter: Reporter) -> None:
            ends_s.append((time.perf_counter(), time.process_time()))
            if len(ends_s) == INTERVAL // 2:
                logging_s.clear()  # without the first step

        with (
            mock.patch.object(Reporter, "advance", advance),
            mock.patch.object(Reporter, "log", timed(Reporter.log)),
            mock.patch.object(StepLogger, "step_metrics", timed(StepLogger.step_metrics)),
        ):
            registry.RecipeTask(self.config).run(run_dir, console)
        if ends_s:
            (run_dir / RESULT_FILE).write_text(json.dumps([ends_s, sum(logging_s)]))
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="of intervals")
    parser.add_argument("--length", type=int, default=2048, help="of sequences")
    options = parser.parse_args()
    config = Config(
        data=DataConfig(sequence_length=options.length, validation_sequences=1),
        logging=LoggingConfig(every_n_steps=2 * INTERVAL, wandb="offline"),
        checkpoint=CheckpointConfig(keep=0),
        breakdown=False,
        num_steps=INTERVAL // 2 + 2 * INTERVAL * options.pairs,
    )
    with tempfile.TemporaryDirectory() as folder:
        launcher.launch(Measurement(config), 2, Path(folder))
        ends_s, logging_s = json.loads((Path(folder) / RESULT_FILE).read_text())
    print(f"{options.pairs} pairs of {INTERVAL} steps")
    for clock, times_s in zip(("the wall clock", "processor time"), zip(*ends_s, strict=True), strict=True):
        edges_s = times_s[INTERVAL // 2 - 1 :: INTERVAL]
        intervals_s = [stop - start for start, stop in itertools.pairwise(edges_s)]
        without_s, with_s = intervals_s[::2], intervals_s[1::2]
        changes = [100 * (one / other - 1) for one, other in zip(with_s, without_s, strict=True)]
        low, middle, high = statistics.quantiles(changes, n=4)
        print(
            f"by {clock}: {1e3 * statistics.median(without_s) / INTERVAL:.1f} ms a step, {middle:+.2f} % with a logged "
            f"one among {INTERVAL} (quartiles {low:+.2f} to {high:+.2f})"
        )
    intervals_s = [stop[0] - start[0] for start, stop in itertools.pairwise(ends_s[INTERVAL // 2 - 1 :: INTERVAL])]
    log_s = logging_s / (options.pairs + 1)  # the last step is logged too
    share_pct = 100 * log_s / statistics.median(intervals_s)
    print(f"spent on each log: {1e3 * log_s:.2f} ms, {share_pct:.3f} % of {INTERVAL} steps")


if __name__ == "__main__":
    main()
