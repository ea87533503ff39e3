"""The cells of an evaluation: one task at one length and depth, or the loss of one source. Pure, without torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from conf.schema import LOSS_TASK, Config, source_configs
from recipes.evaluation.puzzles import WITHOUT_DEPTH

NUM_SPARE = 32  # tokens that a decoded text may have beside the answer


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Args:
        depth: of the needle, 0 start .. 1 end; None for tasks without depth.
        source: of the documents whose loss it is; None for retrieval.
    """

    task: str
    length: int
    depth: float | None = None
    source: str | None = None

    def named(self) -> dict[str, Any]:
        """What it is by name, as evaluation.json has it, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        where = self.source or ("" if self.depth is None else f"depth {self.depth:.2f}")
        return ", ".join(filter(None, [f"{self.task}, {self.length:,} tokens", where]))


def resolve(config: Config) -> Config:
    """A copy in which data.sequence_length is the longest of evaluate.lengths, and num_steps counts cells."""
    resolved = copy.deepcopy(config)
    resolved.evaluate.lengths = lengths_of(config)
    resolved.data.sequence_length = resolved.evaluate.lengths[-1]
    resolved.num_steps = len(planned_cells(resolved))
    return resolved


def lengths_of(config: Config) -> list[int]:
    """The lengths of retrieval, the shortest first. The loss is measured at data.sequence_length."""
    return sorted(config.evaluate.lengths) or [config.data.sequence_length]


def depths(num: int) -> list[float]:
    """`num` depths from 0 to 1; a single one is the middle."""
    return [0.5] if num == 1 else [number / (num - 1) for number in range(num)]


def planned_cells(config: Config) -> list[Cell]:
    """All cells, in their order: the loss, then retrieval from the shortest length on."""
    return [*_loss_cells(config), *_retrieval_cells(config)]


def _loss_cells(config: Config) -> Iterator[Cell]:
    if LOSS_TASK in config.evaluate.tasks:
        for source in source_configs(config.data):
            yield Cell(LOSS_TASK, config.data.sequence_length, source=source)


def _retrieval_cells(config: Config) -> Iterator[Cell]:
    asked = config.evaluate
    for length in lengths_of(config):
        for task in asked.tasks:
            if task != LOSS_TASK:
                for depth in [None] if task in WITHOUT_DEPTH else depths(asked.depths):
                    yield Cell(task, length, depth)
