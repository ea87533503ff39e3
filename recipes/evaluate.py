"""Does a model use its long context? The loss by position, and retrieval by length and depth, over the ring."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conf.schema import LOSS_TASK
from data.corpus import open_corpus
from recipes.engine.build import build_engine
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.evaluation.cells import Cell, planned_cells
from recipes.evaluation.heatmap import draw
from recipes.evaluation.measurement import Measurement
from recipes.evaluation.remaining import remaining_s
from recipes.evaluation.report import retrieval, summary, tables
from recipes.evaluation.results import Evaluation, settings_of
from recipes.inference.source import load_weights
from recipes.monitor.reporter import Reporter
from recipes.planning.explain import banner
from recipes.planning.plan import Plan
from recipes.run.errors import RunFailed
from recipes.run.run_dir import Row
from ring_attention.trace import report_status


def evaluate(plan: Plan, run_dir: Path, reporter: Reporter | None, resumed: Evaluation | None = None) -> float:
    """Measure all cells that `resumed` lacks. Returns the mean accuracy or, without retrieval, the mean loss in nats.

    Every rank must call it with the same `resumed`; `reporter` is rank 0's, and None on all others.

    Raises:
        RunFailed: on every rank, if a loss is not finite.
    """
    config = plan.config
    if reporter:
        reporter.say(*banner(plan, run_dir), "", "loading the model ...")
    report_status("part", "building the model and the engine")
    engine = build_engine(plan)
    assert isinstance(engine, TrainingEngine)
    assert config.evaluate.model  # by `resolve_source`
    load_weights(engine.model, config.evaluate.model)
    if reporter and engine.notes:
        reporter.say(*engine.notes)
    found = resumed or Evaluation(settings_of(config))
    cells = [cell for cell in planned_cells(config) if not found.has(cell)]
    report_status("part", "reading data")
    reads_packs = any(cell.task == LOSS_TASK for cell in cells)
    packs = open_corpus(config.data, config.model.vocab_size).validation() if reads_packs else {}
    measure = Measurement(plan, engine, cells, packs)

    work = [measure.work(cell) for cell in cells]
    measured: list[tuple[float, float]] = []
    for number, (cell, flops) in enumerate(zip(cells, work, strict=True), 1):
        report_status("part", f"evaluating {cell}")
        started = time.perf_counter()
        row = measure(cell)
        measured.append((flops, time.perf_counter() - started))
        _check_finite(cell, row, config.engine.dtype)
        found.add(cell, row)
        if reporter:
            found.elapsed_s, found.wandb_run_id = reporter.elapsed_s, reporter.wandb_run_id
            reporter.log(found.step, _metrics(cell, row))
            found.write(run_dir)
            reporter.advance()
            eta = tqdm.format_interval(remaining_s(work[number:], measured))
            reporter.say(f"{number}/{len(cells)} | {cell} | {_numbers(row)} | ETA {eta}")
    if reporter:
        _conclude(reporter, found, plan, run_dir)
    return _result(found.cells)


def _check_finite(cell: Cell, row: Row, dtype: str) -> None:
    loss = row["loss"] if cell.task == LOSS_TASK else row["answer_loss"]
    if loss is not None and not math.isfinite(loss):
        raise RunFailed(
            f"{cell}: the loss is {loss}: the weights are damaged, or engine.dtype={dtype} is too narrow for them; "
            "try engine.dtype=fp32",
            of_all_ranks=True,
        )


def _metrics(cell: Cell, row: Row) -> dict[str, Any]:
    """As metrics.jsonl and wandb have them."""
    if cell.source is not None:
        return {f"evaluation/loss/{cell.source}": row["loss"], "evaluation/length": cell.length}
    numbers = {f"evaluation/{name}/{cell.task}": row[name] for name in ("accuracy", "answer_loss")}
    return {**numbers, "evaluation/length": cell.length, "evaluation/depth": cell.depth}


def _numbers(row: Row) -> str:
    if "accuracy" in row:
        loss = row["answer_loss"]
        return f"accuracy {100 * row['accuracy']:.1f} %{'' if loss is None else f', answer {loss:.4f} nats/token'}"
    return f"loss {row['loss']:.4f} over {row['tokens']:,} tokens"


def _conclude(reporter: Reporter, found: Evaluation, plan: Plan, run_dir: Path) -> None:
    """The tables, the figure and the summary of all cells."""
    figure = draw(found.cells, str(plan.config.evaluate.model), run_dir)
    columns = ["task", "length", "depth", "samples", "accuracy", "answer_loss"]
    if rows := [[row.get(name) for name in columns] for row in retrieval(found.cells)]:
        reporter.log_results("evaluation/retrieval", columns, rows, figure)
    reporter.write_summary(summary(found.cells))
    where = [f"heat map:              {figure}"] if figure else []
    reporter.say(*tables(found.cells), "", f"done: {found.step} cells", *where, *reporter.view_hints())


def _result(cells: list[Row]) -> float:
    accuracies = [row["accuracy"] for row in retrieval(cells)]
    return statistics.fmean(accuracies or [row["loss"] for row in cells])
