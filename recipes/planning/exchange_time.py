"""The time of a pass over packed documents in one exchange and two kernel calls: `ring_attention.direct`.

Arrays are [R], one entry for each ring rank; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from recipes.planning.ring_simulator import RingCosts, Times
from ring_attention.backward_schedule import TileRows
from ring_attention.direct_routing import LocalRuns, Parcel, local_runs, parcels, tiles
from ring_attention.layout import Layout
from ring_attention.mask import Mask


class ExchangeTime:
    """One pass on all ranks.

    Args:
        batch: rows, which share their documents.
        costs: `gradient_bytes` are of the input's dtype, and `add_s_per_token` is not used.
        memory_s: reading and writing so many bytes.
        has_side_stream: whether the rest has a stream of its own, whose kernels come first.
    """

    def __init__(
        self,
        layout: Layout,
        mask: Mask,
        batch: int,
        costs: RingCosts,
        memory_s: Callable[[float], float],
        has_side_stream: bool,
    ) -> None:
        self._costs, self._memory_s, self._has_side_stream = costs, memory_s, has_side_stream
        ranks = range(layout.ring_degree)
        self._runs = [local_runs(layout, mask, rank) for rank in ranks]
        self._parcels = [parcels(layout, mask, rank) for rank in ranks]
        slowdown = np.array(costs.slowdown or [1.0] * layout.ring_degree)
        self._whole_s, self._rest_s = (
            slowdown * [costs.tiles_s(TileRows(tiles(part, mask), (0, batch))) for part in parts]
            for parts in zip(*((runs.of_whole, runs.of_rest) for runs in self._runs), strict=True)
        )

    def seconds(self, backward: bool) -> tuple[float, float, float]:
        """Of the slowest rank: kernels, copies and sums, and messages that nothing hides."""
        kernels = self._whole_s + self._rest_s
        copied = np.array([self._memory_s(self._copied_bytes(rank, backward)) for rank in range(len(kernels))])
        sent_s = np.array([self._transfer_s(rank) for rank in range(len(kernels))])
        end = np.maximum(self._whole_s, sent_s) + self._rest_s  # the whole documents are beside the keys
        if backward:  # on two streams, what is left of them is beside the gradients that return
            posted = sent_s + self._rest_s if self._has_side_stream else end
            end = np.maximum(end, self._last_post(posted) + sent_s)
        slowest = int((end + copied).argmax())
        return float(kernels[slowest]), float(copied[slowest]), float((end - kernels)[slowest])

    def _last_post(self, posted: Times) -> Times:
        """When a rank and those it exchanges with have all posted their messages."""
        peers = [[parcel.peer for parcel in (*own, *received)] for own, received in self._parcels]
        return np.array([max(posted[[rank, *of_rank]]) for rank, of_rank in enumerate(peers)])

    def _transfer_s(self, rank: int) -> float:
        """A rank's messages of K,V, or of as many dK,dV; it sends and receives at the same time."""
        return max(sum(self._message_s(rank, parcel) for parcel in some) for some in self._parcels[rank])

    def _message_s(self, rank: int, parcel: Parcel) -> float:
        costs = self._costs
        of_host = max(1, costs.ring_ranks_per_host)
        is_near = rank // of_host == parcel.peer // of_host
        speed = costs.within_bytes_per_s if is_near else costs.between_bytes_per_s
        return costs.latency_s + costs.token_bytes * parcel.num_tokens / speed

    def _copied_bytes(self, rank: int, backward: bool) -> float:
        """Read and written: entries that are sent, and copies for the kernel; then the sums of their gradients."""
        runs, (own, received) = self._runs[rank], self._parcels[rank]
        if not runs.of_rest:
            return 0.0
        rest, copies = _num_queries(runs), _num_queries(runs) + _num_copies(runs)
        sent, arrived = (sum(parcel.num_tokens for parcel in some) for some in (own, received))
        entries = 2 * (sent + copies)
        if backward:  # each copy's gradient is read once, for another rank's sum or the own one
            entries += copies + arrived + sent + rest
        return self._costs.token_bytes * entries


def _num_copies(runs: LocalRuns) -> int:
    """Keys before the first query of each run."""
    return sum(part.run.start - part.first_key for part in runs.of_rest)


def _num_queries(runs: LocalRuns) -> int:
    return sum(part.run.stop - part.run.start for part in runs.of_rest)
