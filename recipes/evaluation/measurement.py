"""Measures the cells of an evaluation on an engine, whose weights may be read from a file or still in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from conf.schema import LOSS_TASK
from data.corpus import Pack
from data.tokenizer import open_tokenizer
from recipes.engine.build import build_sharder
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.evaluation.cells import Cell
from recipes.evaluation.refusals import hay_source
from recipes.evaluation.scoring import decoded_answers, exact_answers, loss_by_position
from recipes.evaluation.tasks import make_samples, read_hay
from recipes.planning.plan import Plan
from recipes.run.run_dir import Row


class Measurement:
    """Measures one cell after the other. Every rank must call it with the same cells.

    It draws no random numbers, and leaves the engine's weights as they are, so that training can go on.

    Args:
        cells: all that will be measured.
        packs: of held-out documents, by source; read for the cells of a source alone.
    """

    def __init__(
        self, plan: Plan, engine: TrainingEngine, cells: Sequence[Cell], packs: Mapping[str, Sequence[Pack]]
    ) -> None:
        self._plan, self._engine, self._config, self._packs = plan, engine, plan.config, packs
        self._sharder = replace(build_sharder(plan, engine), micro_batch_size=1)
        data = self._config.data
        self._tokenizer, self._hay = open_tokenizer(data), []
        if any(cell.task != LOSS_TASK for cell in cells):
            self._hay = read_hay(hay_source(data))

    def work(self, cell: Cell) -> float:
        """FLOPs, to tell how long the cells that are left will take."""
        passes = 1 if self._config.evaluate.context is None else 2
        if cell.source is None:
            return passes * self._plan.work([cell.length] * self._config.evaluate.samples).flops
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
                answers = exact_answers(self._engine, self._sharder, samples, cell.length, asked.context)
            return {"samples": asked.samples, "context": asked.context, **answers._asdict()}
        buckets = loss_by_position(self._engine, self._sharder, self._packs[cell.source], asked.context)
        tokens = sum(bucket.tokens for bucket in buckets)
        loss = math.fsum(bucket.loss * bucket.tokens for bucket in buckets) / tokens
        rows = [bucket._asdict() for bucket in buckets]
        return {"loss": loss, "tokens": tokens, "context": asked.context, "buckets": rows}
