"""How long the cells of an evaluation that are left will take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def remaining_s(left: Sequence[float], measured: Sequence[tuple[float, float]]) -> float:
    """Seconds, from the cells that were measured.

    A cell takes as long per FLOP as those of the nearest work: short cells spend more of their time on the host than
    long ones. The median ignores the first cell, which loads kernels.

    Args:
        left: FLOPs of each cell that is left.
        measured: (FLOPs, seconds) of each cell measured, at least one.
    """
    return sum(flops * _seconds_per_flop(flops, measured) for flops in left)


def _seconds_per_flop(flops: float, measured: Sequence[tuple[float, float]]) -> float:
    nearest = min((own for own, _ in measured), key=lambda own: abs(math.log(own / flops)))
    return statistics.median(time_s / own for own, time_s in measured if own == nearest)
