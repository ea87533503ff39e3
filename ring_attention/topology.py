"""How the ranks that share a sequence are arranged over hosts. Pure: `hosts` names the host of each rank of the group.

Links within a host are several times faster than between hosts, so the ring visits all ranks of a host before it
crosses to the next, and Ulysses, whose all-to-all sends most of its bytes to every peer, stays within a host while it
can.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


def ring_order(hosts: Sequence[Hashable]) -> list[int]:
    """The group's ranks in ring order: hosts in the order of their first ranks, ranks rising within a host."""
    first_rank: dict[Hashable, int] = {}
    for rank, host in enumerate(hosts):
        first_rank.setdefault(host, rank)
    return sorted(range(len(hosts)), key=lambda rank: first_rank[hosts[rank]])


@dataclass(frozen=True)
class Split:
    """The group's ranks as a grid: ``grid[ring_rank][ulysses_rank]``. Rows are Ulysses groups, columns rings."""

    grid: tuple[tuple[int, ...], ...]

    def place(self, group_rank: int) -> tuple[int, int]:
        """(ring rank, Ulysses rank) of one of the group's ranks."""
        return next((row, ranks.index(group_rank)) for row, ranks in enumerate(self.grid) if group_rank in ranks)

    def ring(self, ulysses_rank: int) -> list[int]:
        """The ranks of one ring, in ring order."""
        return [ranks[ulysses_rank] for ranks in self.grid]


def hybrid_split(hosts: Sequence[Hashable], ulysses_degree: int) -> Split:
    """Ulysses groups of neighbours in ring order, so within a host where the degree divides its ranks; rings across.

    Raises:
        ValueError: if the degree does not divide the ranks.
    """
    num_ranks = len(hosts)
    if ulysses_degree < 1 or num_ranks % ulysses_degree:
        legal = [degree for degree in range(1, num_ranks + 1) if num_ranks % degree == 0]
        raise ValueError(f"ulysses_degree={ulysses_degree} does not divide the {num_ranks} ranks: use one of {legal}")
    order = ring_order(hosts)
    # rising within a Ulysses group: process groups number their ranks so
    return Split(
        tuple(tuple(sorted(order[start : start + ulysses_degree])) for start in range(0, num_ranks, ulysses_degree))
    )
