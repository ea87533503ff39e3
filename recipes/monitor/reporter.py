"""The logs of a run: lines on the console, metrics.jsonl, summary.json and wandb. Rank 0 only."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from conf.schema import LoggingConfig
from recipes.planning.plan import Plan
from recipes.planning.throughput import Throughput
from recipes.run.errors import Preempted
from recipes.run.run_dir import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, read_json_lines, replace_file


def start_wandb(
    logging: LoggingConfig, run_dir: Path, config: dict[str, Any], say: Callable[[str], None], run_id: str | None = None
) -> Any:
    """A wandb run in `run_dir`, or `run_id` resumed. logging.wandb=auto is offline without a login or a server.

    Offline, each start has its own folder, to be uploaded in place of earlier ones of the same id.
    """
    import wandb  # takes a second, which errors before the run should not wait for

    def init(mode: Any) -> Any:
        is_offline = str(mode) in ("offline", "dryrun")  # the old name
        return wandb.init(
            project=logging.project,
            group=logging.group,
            tags=logging.tags,
            dir=run_dir,
            name=run_dir.name,
            config=config,
            id=run_id,
            resume="allow" if run_id and not is_offline else None,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )

    mode: Any = os.environ.get("WANDB_MODE", "") if logging.wandb == "auto" else logging.wandb
    if mode:
        return init(mode=mode)
    try:
        return init(mode="online" if wandb.login(prompt=False) else "offline")
    except wandb.Error as error:  # a cluster without internet must not cost the run
        say(f"wandb: offline, because its server cannot be reached or refused the login ({error})")
        return init(mode="offline")


def wandb_hints(run: Any) -> list[str]:
    """Commands that show a wandb run."""
    if run.settings.mode == "offline":
        folder = Path(run.dir).parent
        return [
            f"view in the terminal:  wandb leet {shlex.quote(str(folder))}",
            f"upload to wandb:       wandb sync {shlex.quote(str(folder))}",
        ]
    return [f"view online:           {run.url}"] if run.settings.mode == "online" else []


class Resumed(Protocol):
    """What a run resumes from: a checkpoint's manifest, or the results of an evaluation."""

    @property
    def step(self) -> int: ...
    @property
    def elapsed_s(self) -> float: ...
    @property
    def wandb_run_id(self) -> str: ...


class Reporter:
    """A context manager. If its block raises, the wandb run ends as failed.

    Args:
        console: for lines for people. The progress bar is drawn only on a terminal.
        resumed: what the run resumes from.
    """

    def __init__(self, plan: Plan, run_dir: Path, console: TextIO, resumed: Resumed | None = None) -> None:
        self._plan, self._config, self._run_dir, self._console = plan, plan.config, run_dir, console
        self._resumed = resumed
        self._started = time.perf_counter() - (resumed.elapsed_s if resumed else 0.0)
        self._summary: dict[str, float | str] = {}

    def __enter__(self) -> Reporter:
        path = self._run_dir / METRICS_FILE
        if path.exists() and path.stat().st_size:
            self._keep_earlier_rows(path)
        self._file = path.open("a", encoding="utf-8")
        self._wandb = start_wandb(
            self._config.logging,
            self._run_dir,
            {**asdict(self._config), "device": self._plan.device_name, "kernel": self._plan.kernel_choice()[0]},
            self.say,
            self._resumed.wandb_run_id if self._resumed else None,
        )
        self.wandb_run_id: str = self._wandb.id
        self._wandb.define_metric("step")
        self._wandb.define_metric("*", step_metric="step")
        self._wandb.define_metric("train/loss", step_metric="step", summary="last")
        self._wandb.define_metric("validation/loss", step_metric="step", summary="min")
        if self._resumed and self._wandb.offline:
            for _, row in read_json_lines(path):
                self._wandb.log(_known({name: value for name, value in (row or {}).items() if name != "elapsed_s"}))
        self._bar = tqdm(
            total=self._config.num_steps,
            initial=self._resumed.step if self._resumed else 0,
            file=self._console,
            disable=None,  # unless the console is a terminal
            unit="step",
            leave=False,
        )
        return self

    def _keep_earlier_rows(self, path: Path) -> None:
        """A resumed run appends to the rows up to its checkpoint. Any other run moves earlier rows to a file apart."""
        if self._resumed:
            drop_rows_after(path, self._resumed.step)
            return
        names = (path.with_name(f"metrics.earlier-{number}.jsonl") for number in itertools.count(1))
        earlier = next(name for name in names if not name.exists())
        path.rename(earlier)
        self.say(f"an earlier run here left no checkpoint to resume from: its {METRICS_FILE} is now {earlier.name}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # another rank's end may have brought us here before our own Ctrl-C, which must not cut this short
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._bar.close()
        self._file.close()
        if kind is Preempted:
            self._wandb.mark_preempting()
        self._wandb.finish(exit_code=0 if kind is None else 1)
        signal.signal(signal.SIGINT, before)

    @property
    def elapsed_s(self) -> float:
        """Since the start. Excludes interruptions, and steps that an interruption lost."""
        return round(time.perf_counter() - self._started, 3)

    def say(self, *lines: str) -> None:
        """Print lines for people."""
        tqdm.write("\n".join(lines), file=self._console)
        self._console.flush()

    def stream(self, text: str) -> None:
        """Print a part of a line, as it comes."""
        self._bar.clear()
        self._console.write(text)
        self._console.flush()

    def advance(self) -> None:
        """Count one finished step."""
        self._bar.update()

    def log(self, step: int, metrics: dict[str, float | None]) -> None:
        """Write the metrics of a step to the file and to wandb, without those that are None."""
        row = {"step": step, **_known(metrics)}
        self._file.write(_as_json({**row, "elapsed_s": self.elapsed_s}))
        self._file.flush()  # a crash loses no row
        self._wandb.log(row)

    def write_summary(self, metrics: Mapping[str, float | str | None]) -> None:
        """Add results of the whole run to RUN_DIR/summary.json and to wandb's summary."""
        self._summary |= {name: value for name, value in metrics.items() if value is not None}
        replace_file(self._run_dir / SUMMARY_FILE, _as_json(self._summary, indent=1))
        self._wandb.summary.update(self._summary)

    def log_results(self, name: str, columns: list[Any], rows: list[Any], figure: Path | None) -> None:
        """Add a table, and a figure of it, to wandb."""
        import wandb

        shown: dict[str, Any] = {name: wandb.Table(columns=columns, data=rows)}
        if figure is not None:
            shown[f"{name}_figure"] = wandb.Image(str(figure))
        self._wandb.log(shown)

    def log_transport(self, used: str, reason: str) -> None:
        """Add what carries the ring's messages, known once it has sent, to RUN_DIR/config.yaml and wandb's config."""
        with (self._run_dir / CONFIG_FILE).open("a", encoding="utf-8") as file:
            print(f"# the transport that ran: {used}" + (f", because {reason}" if reason else ""), file=file)
        self._wandb.config.update({"transport_used": used}, allow_val_change=True)  # a resumed run has it already

    def step_line(self, step: int, metrics: dict[str, Any]) -> str:
        """The console line of a logged step."""
        num_steps = self._config.num_steps
        grad_norm = f"grad norm {metrics['grad_norm']:.3f} | " if "grad_norm" in metrics else ""
        mfu = "n/a" if metrics["mfu_pct"] is None else f"{metrics['mfu_pct']:.1f}%"
        return (
            f"step {step:>{len(str(num_steps))}}/{num_steps} | loss {metrics['loss']:.4f} | {grad_norm}"
            f"{metrics['tokens_per_s']:,.0f} tok/s | {metrics['tokens_per_s_per_rank']:,.0f} tok/s/rank | "
            f"TPOT {metrics['tpot_ms']:.3f} ms | MFU {mfu} | "
            f"step p50 {metrics['step_time_p50_s']:.3f} p95 {metrics['step_time_p95_s']:.3f} s | "
            f"peak {metrics['peak_memory_gib']:.2f} GiB | ETA {tqdm.format_interval(metrics['eta_s'])}"
        )

    def summary(self, throughput: Throughput) -> list[str]:
        """The last lines of a run: its throughput, and commands that show its results."""
        mfu = "" if throughput.mfu_pct is None else f", MFU {throughput.mfu_pct:.1f} %"
        return [
            f"median throughput: {throughput.tokens_per_s:,.0f} tok/s, "
            f"{throughput.tokens_per_s_per_rank:,.0f} tok/s/rank, TPOT {throughput.tpot_ms:.3f} ms, "
            f"{throughput.model_tflops_per_rank:.3g} model TFLOP/s per rank{mfu}",
            *self.view_hints(),
        ]

    def view_hints(self) -> list[str]:
        """Where the results of the run are, and commands that show them."""
        lines = [
            f"metrics (JSON lines):  {self._run_dir / METRICS_FILE}",
            f"dashboard:             python -m recipes.dashboard {shlex.quote(str(self._run_dir))}",
        ]
        if self._config.profile:
            lines.append(f"traces for Perfetto:   {self._run_dir / 'profile'}")
        if self._config.memory_snapshot:
            where = self._run_dir / "profile" if self._plan.device_type == "cuda" else "none, they need a GPU"
            lines.append(f"memory snapshots:      {where}")
        return [*lines, *self.wandb_hints()]

    def wandb_hints(self) -> list[str]:
        """Commands that show the wandb run: all there is to see of a run without steps."""
        return wandb_hints(self._wandb)


def _known(metrics: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def _as_json(metrics: Mapping[str, float | str], indent: int | None = None) -> str:
    """With null for nan and infinity, which JSON does not have."""
    finite = {
        name: value if isinstance(value, str) or math.isfinite(value) else None for name, value in metrics.items()
    }
    return json.dumps(finite, indent=indent, allow_nan=False) + "\n"


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of later steps from a metrics file, and rows that a crash cut off. They will be logged again."""
    lines = [line.rstrip() for line, row in read_json_lines(path) if row and row["step"] <= step]
    replace_file(path, "".join(f"{line}\n" for line in lines))
