"""attention=auto: the ways to spread a sequence over ranks, by the forecast of their steps."""

from __future__ import annotations

from conf.schema import Config, Degrees
from recipes.planning.cluster import Cluster
from recipes.planning.step_time import StepTime


def rank_methods(config: Config, num_ranks: int, data_degree: int, kernel: str, cluster: Cluster) -> list[StepTime]:
    """All splits of a sequence's ranks into ring x Ulysses whose Ulysses degree divides the key-value heads.

    Each sequence counts as one document. The fastest step comes first; of equals the longer ring.
    """
    share, kv_heads = num_ranks // data_degree, config.model.num_kv_heads
    splits = [Degrees(data_degree, share // n, n) for n in range(1, share + 1) if share % n == 0 and kv_heads % n == 0]
    steps = [StepTime(config, degrees, method_of(degrees), kernel, cluster) for degrees in splits]
    return sorted(steps, key=lambda step: round(step.parts.total, 9))


def method_of(degrees: Degrees) -> str:
    """The attention method that has these degrees."""
    if degrees.ulysses == 1:
        return "local" if degrees.ring == 1 else "ring"
    return "ulysses" if degrees.ring == 1 else "hybrid"
