"""Does a model use its long context? The loss by position, and retrieval by length and depth, over the ring."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conf.schema import LOSS_TASK
from data.corpus import Pack, open_corpus
from data.tokenizer import open_tokenizer
from recipes.engine.build import build_engine, build_sharder
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.evaluation.cells import Cell, planned_cells
from recipes.evaluation.heatmap import draw
from recipes.evaluation.refusals import hay_source
from recipes.evaluation.report import retrieval, summary, tables
from recipes.evaluation.results import Evaluation, settings_of
from recipes.evaluation.scoring import decoded_answers, exact_answers, loss_by_position
from recipes.evaluation.tasks import make_samples, read_hay
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
    measure = Measurement(plan, engine, cells)

    work_done, started = 0.0, time.perf_counter()
    work = [measure.work(cell) for cell in cells]
    for number, (cell, flops) in enumerate(zip(cells, work, strict=True), 1):
        report_status("part", f"evaluating {cell}")
        row = measure(cell)
        found.add(cell, row)
        work_done += flops
        if reporter:
            found.elapsed_s, found.wandb_run_id = reporter.elapsed_s, reporter.wandb_run_id
            reporter.log(found.step, _metrics(cell, row))
            found.write(run_dir)
            reporter.advance()
            eta_s = (time.perf_counter() - started) * (sum(work) - work_done) / work_done
            reporter.say(f"{number}/{len(cells)} | {cell} | {_numbers(row)} | ETA {tqdm.format_interval(eta_s)}")
    if reporter:
        _conclude(reporter, found, plan, run_dir)
    return _result(found.cells)


class Measurement:
    """Measures one cell after the other. Every rank must call it with the same cells.

    Args:
        cells: all that will be measured.
    """

    def __init__(self, plan: Plan, engine: TrainingEngine, cells: list[Cell]) -> None:
        self._plan, self._engine, self._config = plan, engine, plan.config
        self._sharder = replace(build_sharder(plan, engine), micro_batch_size=1)
        data = self._config.data
        self._packs: dict[str, list[Pack]] = {}
        if any(cell.task == LOSS_TASK for cell in cells):
            self._packs = open_corpus(data, self._config.model.vocab_size).validation()
        self._tokenizer, self._hay = open_tokenizer(data), []
        if any(cell.task != LOSS_TASK for cell in cells):
            self._hay = read_hay(hay_source(data))

    def work(self, cell: Cell) -> float:
        """FLOPs, to tell how long the cells that are left will take."""
        if cell.source is None:
            return self._plan.work([cell.length] * self._config.evaluate.samples).flops
        passes = 1 if self._config.evaluate.context is None else 2
        return passes * self._plan.work(self._sharder.lengths(self._packs[cell.source])).flops

    def __call__(self, cell: Cell) -> Row:
        """The cell's numbers, as evaluation.json has them."""
        asked = self._config.evaluate
        if cell.source is None:
            arguments = cell.task, self._tokenizer, self._hay, cell.length, cell.depth, asked.samples, asked.seed
            samples = make_samples(*arguments)
            if asked.scoring == "generate":
                answers = decoded_answers(self._engine, self._sharder, samples, self._tokenizer)
            else:
                answers = exact_answers(self._engine, self._sharder, samples, cell.length)
                self._check_finite(cell, answers.answer_loss)
            return {"samples": asked.samples, **answers._asdict()}
        buckets = loss_by_position(self._engine, self._sharder, self._packs[cell.source], asked.context)
        tokens = sum(bucket.tokens for bucket in buckets)
        loss = math.fsum(bucket.loss * bucket.tokens for bucket in buckets) / tokens
        self._check_finite(cell, loss)
        rows = [bucket._asdict() for bucket in buckets]
        return {"loss": loss, "tokens": tokens, "context": asked.context, "buckets": rows}

    def _check_finite(self, cell: Cell, loss: float | None) -> None:
        if loss is not None and not math.isfinite(loss):
            dtype = self._config.engine.dtype
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
    figure = draw(found.cells, f"{plan.config.evaluate.model}: accuracy by length and depth", run_dir)
    columns = ["task", "length", "depth", "samples", "accuracy", "answer_loss"]
    if rows := [[row.get(name) for name in columns] for row in retrieval(found.cells)]:
        reporter.log_results("evaluation/retrieval", columns, rows, figure)
    reporter.write_summary(summary(found.cells))
    where = [f"heat map:              {figure}"] if figure else []
    reporter.say(*tables(found.cells), "", f"done: {found.step} cells", *where, *reporter.view_hints())


def _result(cells: list[Row]) -> float:
    accuracies = [row["accuracy"] for row in retrieval(cells)]
    return statistics.fmean(accuracies or [row["loss"] for row in cells])
