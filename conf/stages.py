"""Stages of growing length: which step of a run has sequences of which length. Pure integers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

from conf.schema import DataConfig

ENDLESS = sys.maxsize


class Stage(NamedTuple):
    """Steps with sequences of one length, up to the first step of the next stage. Steps count from 1."""

    first_step: int
    sequence_length: int


def stages_of(data: DataConfig) -> list[Stage]:
    """In their order; one of all steps unless data.stages has more."""
    return [Stage(*stage) for stage in data.stages or [[1, data.sequence_length]]]


def steps_by_length(data: DataConfig, first: int, last: int = ENDLESS) -> Iterator[tuple[int, int]]:
    """(sequence length, number of steps) of the steps `first` to `last`, stage by stage."""
    for stage, following in itertools.pairwise([*stages_of(data), Stage(ENDLESS, 0)]):
        num_steps = min(last, following.first_step - 1) - max(first, stage.first_step) + 1
        if num_steps > 0:
            yield stage.sequence_length, num_steps


def length_at(data: DataConfig, step: int) -> int:
    """The sequence length of a step."""
    return next(steps_by_length(data, step))[0]
