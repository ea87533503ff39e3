"""A block of query-key pairs with a band mask: the shape of every kernel call. Pure integers.

Query i and key j of a block attend if lower <= j - i <= upper; None is no bound. A full block is (None, None), a causal
square (None, 0). A trimmed block has no query and no key without a partner, so kernels never see a fully masked row,
and a bound that excludes nothing is None.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)  # thousands of them for packed documents
class MaskedBlock:
    """Queries [q_start, q_stop) against keys [k_start, k_stop), in a band that counts from the block's corner."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lower: int | None = None
    upper: int | None = None

    @property
    def num_queries(self) -> int:
        return self.q_stop - self.q_start

    @property
    def num_keys(self) -> int:
        return self.k_stop - self.k_start

    @property
    def is_full(self) -> bool:
        return self.lower is None and self.upper is None

    @property
    def is_causal_square(self) -> bool:
        return self.lower is None and self.upper == 0 and self.num_queries == self.num_keys

    @property
    def work(self) -> int:
        """Query-key pairs that attend."""
        work = self.num_queries * self.num_keys if self.upper is None else self._pairs_up_to(self.upper)
        return work if self.lower is None else work - self._pairs_up_to(self.lower - 1)

    def _pairs_up_to(self, bound: int) -> int:
        """Pairs with j - i <= bound: the sum over queries i of min(max(i + bound + 1, 0), num_keys)."""
        first = max(0, -bound)  # the first query that sees a key
        saturated = min(max(self.num_keys - bound - 1, first), self.num_queries)  # from here on queries see all keys
        if first >= self.num_queries:
            return 0
        rising = saturated - first
        triangle = rising * (first + bound + 1) + rising * (rising - 1) // 2
        return triangle + (self.num_queries - saturated) * self.num_keys

    def part(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> MaskedBlock | None:
        """The pairs within a smaller block, in the same coordinates and trimmed; None if there are none."""
        shift = (q_start - self.q_start) - (k_start - self.k_start)
        lower = None if self.lower is None else self.lower + shift
        upper = None if self.upper is None else self.upper + shift
        return MaskedBlock(q_start, q_stop, k_start, k_stop, lower, upper).trimmed()

    def with_keys_moved(self, shift: int) -> MaskedBlock:
        """The same block with its keys elsewhere: the band counts from the block's corner."""
        return MaskedBlock(self.q_start, self.q_stop, self.k_start + shift, self.k_stop + shift, self.lower, self.upper)

    def trimmed(self) -> MaskedBlock | None:
        """The smallest block with the same pairs; None if there are none."""
        lower, upper = self._band
        q_first, q_stop = max(0, -upper), min(self.num_queries, self.num_keys - lower)
        k_first, k_stop = max(0, lower + q_first), min(self.num_keys, upper + q_stop)
        if lower > upper or q_first >= q_stop or k_first >= k_stop:
            return None
        lower, upper = lower + q_first - k_first, upper + q_first - k_first
        return MaskedBlock(
            self.q_start + q_first,
            self.q_start + q_stop,
            self.k_start + k_first,
            self.k_start + k_stop,
            lower if lower > q_first - q_stop + 1 else None,
            upper if upper < k_stop - k_first - 1 else None,
        )

    def joined(self, other: MaskedBlock) -> MaskedBlock | None:
        """One block with the pairs of both, which must be disjoint; None if no block has exactly these pairs."""
        q_start, q_stop = min(self.q_start, other.q_start), max(self.q_stop, other.q_stop)
        k_start, k_stop = min(self.k_start, other.k_start), max(self.k_stop, other.k_stop)
        # the narrowest band around both; if it has as many pairs as both together, it has no others
        edges = []
        for part in (self, other):
            shift = (part.k_start - k_start) - (part.q_start - q_start)
            edges += [bound + shift for bound in part._band]
        candidate = MaskedBlock(q_start, q_stop, k_start, k_stop, min(edges), max(edges)).trimmed()
        return candidate if candidate is not None and candidate.work == self.work + other.work else None

    @property
    def _band(self) -> tuple[int, int]:
        """The bounds; in place of None those that just exclude nothing."""
        lower = 1 - self.num_queries if self.lower is None else self.lower
        upper = self.num_keys - 1 if self.upper is None else self.upper
        return lower, upper
