"""What people see and keep of a run: lines on the console, JSON lines in a file, and wandb. Rank 0 only."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from conf.schema import LoggingConfig
from recipes.checkpoint.manifest import Manifest
from recipes.monitor.metric_registry import minutes
from recipes.planning.plan import Plan
from recipes.planning.throughput import Throughput
from recipes.run.errors import Preempted
from recipes.run.run_dir import METRICS_FILE, SUMMARY_FILE


def start_wandb(
    logging: LoggingConfig, run_dir: Path, config: dict[str, Any], say: Callable[[str], None], run_id: str | None = None
) -> Any:
    """A wandb run in `run_dir`, online or offline as `logging.wandb` says; `say` tells people of a forced choice.

    Args:
        run_id: of an earlier one to go on with.
    """
    import wandb  # takes a second, which an error before any run shall not wait for

    mode = logging.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "")
    if not mode:
        try:
            mode = "online" if wandb.login(prompt=False) else "offline"
            return _init_wandb(logging, run_dir, config, mode, run_id)
        except wandb.Error as error:  # a cluster without internet must not cost the run
            say(f"wandb: offline, for its server cannot be reached or did not take the login ({error})")
            mode = "offline"
    return _init_wandb(logging, run_dir, config, mode, run_id)


def _init_wandb(logging: LoggingConfig, run_dir: Path, config: dict[str, Any], mode: str, run_id: str | None) -> Any:
    import wandb

    return wandb.init(
        project=logging.project,
        group=logging.group,
        tags=logging.tags,
        mode=mode,  # pyright: ignore[reportArgumentType]
        dir=run_dir,
        name=run_dir.name,
        config=config,
        id=run_id,
        resume="allow" if run_id else None,  # offline, each start has a folder; wandb joins them by the id
        settings=wandb.Settings(silent=True, console="off"),
    )


def wandb_hints(run: Any) -> list[str]:
    """Commands that show a wandb run."""
    if run.settings.mode == "offline":
        folder = Path(run.dir).parent
        of_this_run = sorted(str(path) for path in folder.parent.glob(f"offline-run-*-{run.id}"))
        return [
            f"look at it here:       wandb leet {shlex.quote(str(folder))}",
            f"send it to wandb:      wandb sync {shlex.join(of_this_run)}",
        ]
    return [f"look at it:            {run.url}"] if run.settings.mode == "online" else []


class Reporter:
    """Use as a context manager; ends the wandb run as failed if the block raises.

    Args:
        console: where lines for people go; a progress bar is drawn only if it is a terminal.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(self, plan: Plan, run_dir: Path, console: TextIO, resumed: Manifest | None = None) -> None:
        self._plan, self._config, self._run_dir, self._console = plan, plan.config, run_dir, console
        self._resumed = resumed
        self._started = time.perf_counter() - (resumed.elapsed_s if resumed else 0.0)
        self._conclusions: dict[str, float | None] = {}

    def __enter__(self) -> Reporter:
        path = self._run_dir / METRICS_FILE
        if path.exists() and path.stat().st_size:
            self._begin_behind(path)
        self._file = path.open("a", encoding="utf-8")
        self._wandb = start_wandb(
            self._config.logging,
            self._run_dir,
            {**asdict(self._config), "device": self._plan.device_name, "kernel": self._plan.kernel_choice()[0]},
            self.say,
            self._resumed.wandb_run_id if self._resumed else None,
        )
        self._wandb.define_metric("step")
        self._wandb.define_metric("*", step_metric="step")
        self._wandb.define_metric("train/loss", step_metric="step", summary="last")
        self._wandb.define_metric("validation/loss", step_metric="step", summary="min")
        self._bar = tqdm(
            total=self._config.num_steps,
            initial=self._resumed.step if self._resumed else 0,
            file=self._console,
            disable=not self._console.isatty(),
            unit="step",
            leave=False,
        )
        return self

    def _begin_behind(self, path: Path) -> None:
        """Go on with an earlier run's rows, up to the checkpoint; without one keep them apart from what comes."""
        if self._resumed:
            drop_rows_after(path, self._resumed.step)
            return
        aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"metrics.earlier-{n}.jsonl")).exists())
        path.rename(aside)
        self.say(f"an earlier run here left no checkpoint to go on from; its {METRICS_FILE} is {aside.name} now")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if kind is Preempted:
            self._wandb.mark_preempting()
        self._wandb.finish(exit_code=0 if kind is None else 1)

    @property
    def elapsed_s(self) -> float:
        """Since the start, the time between an interruption and its checkpoint left out."""
        return round(time.perf_counter() - self._started, 3)

    @property
    def wandb_run_id(self) -> str:
        return self._wandb.id

    def say(self, *lines: str) -> None:
        """Lines for people, now."""
        for line in lines:
            if self._console.isatty():
                tqdm.write(line, file=self._console)
            else:
                print(line, file=self._console, flush=True)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """The numbers of one step to the file and to wandb, in one call each; None is left out."""
        known = {"step": step, **{name: value for name, value in metrics.items() if value is not None}}
        # a loss that is no number is null: JSON has neither nan nor infinity
        line = {name: value if math.isfinite(value) else None for name, value in known.items()}
        line["elapsed_s"] = self.elapsed_s
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()  # a crash loses nothing
        self._wandb.log(known)

    def write_summary(self, numbers: dict[str, float | None]) -> None:
        """Numbers of the run as a whole: to RUN_DIR/summary.json, beside earlier ones, and to wandb's summary."""
        known = {name: value for name, value in numbers.items() if value is not None}
        self._conclusions |= {name: value if math.isfinite(value) else None for name, value in known.items()}
        path = self._run_dir / SUMMARY_FILE
        new = path.with_suffix(".new")  # whole or not at all: a sweep takes the file for the end of the run
        new.write_text(json.dumps(self._conclusions, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        new.replace(path)
        self._wandb.summary.update(known)

    def step_line(self, step: int, metrics: dict[str, float | None]) -> str:
        """The console's line of a logged step; the keys are those of the recipes, after their prefix."""
        value = {name.rpartition("/")[2]: number for name, number in metrics.items()}
        mfu = "n/a" if value["mfu_pct"] is None else f"{value['mfu_pct']:.1f}%"
        digits = len(str(self._config.num_steps))
        return " | ".join(
            [
                f"step {step:>{digits}}/{self._config.num_steps}",
                f"loss {value['loss']:.4f}",
                *([f"grad norm {value['grad_norm']:.3f}"] if "grad_norm" in value else []),
                f"{value['tokens_per_s']:,.0f} tok/s",
                f"{value['tokens_per_s_per_rank']:,.0f} tok/s/rank",
                f"TPOT {value['tpot_ms']:.3f} ms",
                f"MFU {mfu}",
                f"step p50 {value['step_time_p50_s']:.3f} p95 {value['step_time_p95_s']:.3f} s",
                f"peak {value['peak_memory_gib']:.2f} GiB",
                f"ETA {minutes(value['eta_s'] or 0)}",
            ]
        )

    def summary(self, throughput: Throughput) -> list[str]:
        """The last lines of a run: its throughput, and how to look at it."""
        mfu = "" if throughput.mfu_pct is None else f", MFU {throughput.mfu_pct:.1f} %"
        return [
            f"median throughput: {throughput.tokens_per_s:,.0f} tok/s, "
            f"{throughput.tokens_per_s_per_rank:,.0f} tok/s/rank, TPOT {throughput.tpot_ms:.3f} ms, "
            f"{throughput.model_tflops_per_rank:.3g} model TFLOP/s per rank{mfu}",
            *self.view_hints(),
        ]

    def view_hints(self) -> list[str]:
        """Commands that show the run that just ended."""
        lines = [
            f"metrics as JSON lines: {self._run_dir / METRICS_FILE}",
            f"as a page of plots:    python -m recipes.dashboard {shlex.quote(str(self._run_dir))}",
        ]
        if self._config.profile:
            lines.append(f"traces for Perfetto:   {self._run_dir / 'profile'}")
        if self._config.memory_snapshot:
            where = self._run_dir / "profile" if self._plan.device_type == "cuda" else "none, which is for GPUs"
            lines.append(f"memory snapshots:      {where}")
        lines += wandb_hints(self._wandb)
        return lines


def drop_rows_after(path: Path, step: int) -> None:
    """Of a metrics file, those of later steps and a last line that was cut off: they come again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # a crash cut it off; what follows would be of a later start
        if row["step"] <= step:
            kept.append(line)
    new = path.with_suffix(".new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(path)
