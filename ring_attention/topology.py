"""How the ranks that share a sequence are arranged over hosts. Pure: `hosts` names the host of each rank of the group.

Links within a host are several times faster than links between hosts. So the ring visits all ranks of a host before it
crosses to the next, and Ulysses, whose all-to-all sends most of its bytes to every peer, stays within a host if it can.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def ring_order(hosts: Sequence[Hashable]) -> list[int]:
    """The group's ranks in ring order: hosts in the order of their first ranks, ranks ascending within a host."""
    return sorted(range(len(hosts)), key=lambda rank: hosts.index(hosts[rank]))


def hybrid_split(hosts: Sequence[Hashable], ulysses_degree: int) -> tuple[tuple[int, ...], ...]:
    """The group's ranks as ``grid[ring_rank][ulysses_rank]``: rows are Ulysses groups, columns are rings.

    A row is neighbours in ring order, so it lies within one host if the degree divides the host's ranks.

    Raises:
        ValueError: if the degree does not divide the ranks.
    """
    num_ranks = len(hosts)
    if ulysses_degree < 1 or num_ranks % ulysses_degree:
        legal = [degree for degree in range(1, num_ranks + 1) if num_ranks % degree == 0]
        raise ValueError(f"ulysses_degree={ulysses_degree} does not divide the {num_ranks} ranks: use one of {legal}")
    order = ring_order(hosts)
    starts = range(0, num_ranks, ulysses_degree)
    # ascending within a row, as process groups number their ranks
    return tuple(tuple(sorted(order[start : start + ulysses_degree])) for start in starts)
