"""The time of one layer's attention in one micro-batch, on the slowest rank: kernels, sums, exposed messages.

A ring's comes from `ring_simulator`, that of packed documents in one exchange from `exchange_time`. What else a method
sends is not overlapped: all-to-alls and gathers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from conf.schema import Degrees, ModelConfig
from recipes.planning.cluster_speed import ClusterSpeed
from recipes.planning.exchange_time import ExchangeTime
from recipes.planning.ring_simulator import RingCosts, simulate
from recipes.planning.ring_work import ring_work
from recipes.planning.speeds import HEAD_NUMBERS
from ring_attention.backward_schedule import KernelTiles, TileRows
from ring_attention.direct_routing import goes_direct
from ring_attention.kernels import KERNELS
from ring_attention.key_gradients import cuts_at_chunks
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, Mask
from ring_attention.masked_block import MaskedBlock
from ring_attention.schedule import work_per_rank
from ring_attention.streams import has_side_stream

BACKWARD_PRODUCTS = 2.5  # of a forward pass: scores again, and dq, dk, dv, dp
# PyTorch copies strided numbers of 2 bytes one by one. It explains what gathering takes longer where a micro-batch has
# several rows, as in `attention_10000_heads_512_*`, than for one row.
STRIDED_COPY = 4.0
ACCUMULATOR_BYTES = 10  # per number and pass over a sum in fp32: read and written, and the addend in half precision
# For each query of a call with several documents: half of a block of 128 keys on the diagonal, and the start of a block
# of queries, which a long sequence hides. Of one GPU's times it explained all to 5 %, and of another's, in
# `packed_65536_H200.json`, to 6 %; but documents of 256 tokens take 37 % longer than by it, with backward 16 %.
DOCUMENT_PAIRS = 400
# Two tiles' outputs, in half precision, join the sum in one pass. A ring of two has no such pair, and gains nothing.
MERGE_BYTES, MORE_MERGE_BYTES = 6, 8  # per number of a tile's output, and per number of the whole output


class AttentionSeconds(NamedTuple):
    """One pass of one layer.

    Args:
        host: what the device waits for the host, in a call by itself.
    """

    kernels: float
    sums: float
    copies: float
    messages: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Of a call by itself."""
        return sum(self)


@dataclass(frozen=True)
class AttentionTime:
    """Attention of one layer over whole sequences on a cluster.

    Args:
        layout: ring x Ulysses ranks.
        batch: rows of one micro-batch.
        size: bytes of a number.
        kernel: an attention kernel's name.
        kernel_tiles: its `AttentionKernel.split`.
        mask: with documents for packed sequences.
        slowdown: factors on the kernels of each ring rank, for stragglers.
        has_graphs: whether a ring's passes are CUDA graphs (`pass_graphs`).
        is_alone: whether the host issues nothing else, as in a benchmark. In a model it issues layers ahead.
    """

    model: ModelConfig = field(hash=False)  # compared by its values
    method: str
    degrees: Degrees
    layout: Layout
    batch: int
    size: int
    kernel: str
    kernel_tiles: KernelTiles
    speed: ClusterSpeed
    mask: Mask = CAUSAL
    slowdown: tuple[float, ...] | None = None
    has_graphs: bool = False
    is_alone: bool = False

    def pass_seconds(self, backward: bool) -> AttentionSeconds:
        """One pass."""
        seconds = _device_seconds(self, backward)
        return seconds._replace(host=max(0.0, self.issue_s(backward) - seconds.total)) if self.is_alone else seconds

    def issue_s(self, backward: bool) -> float:
        """What the host needs to issue one pass."""
        num_steps = 2 if self.degrees.ulysses > 1 or self._gathers else 0  # the calls before and after take as long
        if self.method in ("ring", "hybrid") and not self.has_graphs:
            # one exchange has the calls and messages of a ring of two
            num_steps += (2 if self._goes_direct else self.layout.ring_degree) + backward
        ms = self.speed.call_ms + self.speed.ring_step_ms * num_steps
        ms *= self.speed.backward_issue if backward else 1
        return (ms + self.has_graphs * self.speed.constants.graph_ms) / 1e3

    @property
    def _goes_direct(self) -> bool:
        return goes_direct(self.layout, self.mask)

    @property
    def _gathers(self) -> bool:
        return self.method == "all_gather" and self.degrees.ring > 1

    def device_seconds(self, backward: bool) -> AttentionSeconds:
        """One pass, as the device sees it."""
        seconds = self._gathered(backward) if self._gathers else self._ring(backward)
        if self.degrees.ulysses == 1:
            return seconds
        # q, k, v and out change between tokens and heads; each is copied before and after
        numbers = 2 * (self.model.num_heads + self.model.num_kv_heads) * self.model.head_dim * self._local_tokens
        return seconds._replace(
            copies=seconds.copies + self.speed.memory_s(4 * self.size * numbers),
            messages=seconds.messages + 4 * self.speed.all_to_all_s(self.size * numbers / 4, self.degrees.ulysses),
        )

    def tiles_s(self, tiles: TileRows, backward: bool) -> float:
        """The kernels of one step's tiles.

        Documents' tiles are one call, as fast as one on a long sequence, but for `DOCUMENT_PAIRS`.
        """
        rows, heads = tiles.rows[1] - tiles.rows[0], self.model.num_heads / self._shared_heads
        more = DOCUMENT_PAIRS if len(tiles.tiles) > 1 else 0
        blocks = [(tile.block, rows if tile.row is None else 1) for tile in tiles.tiles]
        of_call = sum(block.work * num_rows for block, num_rows in blocks)
        return sum(
            self._block_s((block.work + more * block.num_queries) * num_rows, of_call, heads, backward, block.is_full)
            for block, num_rows in blocks
        )

    @property
    def gradient_size(self) -> int:
        """Bytes of a number of dK,dV on their way."""
        is_grouped = self.model.num_kv_heads < self.model.num_heads
        has_sums = self.size == 2 and is_grouped and KERNELS[self.kernel].sums_keys
        return 4 if has_sums and cuts_at_chunks(self.layout, self.mask) else self.size

    @property
    def _shared_heads(self) -> int:
        return self.degrees.ulysses * self.degrees.tensor

    @property
    def _local_tokens(self) -> int:
        return self.batch * self.layout.local_length

    def _block_s(self, pairs: float, as_of: float, heads: float, backward: bool, is_full: bool) -> float:
        """Query-key pairs of all rows, at the speed of a call over as many as `as_of`."""
        numbers = heads * self.model.head_dim
        share = self.speed.constants.backward_share if backward else self.speed.constants.forward_share
        size = math.sqrt(2 * as_of * numbers / HEAD_NUMBERS)
        tflops = share * self.speed.kernel_tflops(self.kernel, self.model.head_dim, size, backward, is_full)
        return 4 * numbers * pairs * (BACKWARD_PRODUCTS if backward else 1) / tflops / 1e12

    def _ring(self, backward: bool) -> AttentionSeconds:
        """The slowest rank of a ring, also of one rank."""
        numbers = self.batch * self.model.head_dim / self._shared_heads  # per token and head
        kv_numbers, q_numbers = 2 * numbers * self.model.num_kv_heads, numbers * self.model.num_heads
        if self._goes_direct:
            costs = self._costs(lambda tiles: self.tiles_s(tiles, backward), kv_numbers, self.size)
            num_queries = self.batch * self.layout.ring_length * self.model.num_heads // self._shared_heads
            two_streams = has_side_stream(self.speed.cluster.gpu != "cpu", num_queries)
            exchange = ExchangeTime(self.layout, self.mask, self.batch, costs, self.speed.memory_s, two_streams)
            kernels, copies, exposed = exchange.seconds(backward)
            return AttentionSeconds(kernels, 0.0, copies, exposed)
        work = ring_work(self.layout, self.mask, self.batch, self.kernel_tiles if backward else None)

        def tiles_s(tiles: TileRows) -> float:
            kernels = self.tiles_s(tiles, backward)
            if work.ring_degree == 1:
                return kernels
            # each tile's output joins a sum; in the backward pass its dk and dv
            merge_bytes = MERGE_BYTES + MORE_MERGE_BYTES / work.ring_degree
            moved = [
                ACCUMULATOR_BYTES * kv_numbers * tile.block.num_keys
                if backward
                else merge_bytes * q_numbers * tile.block.num_queries
                for tile in tiles.tiles
            ]
            return kernels + self.speed.memory_s(sum(moved))

        times = simulate(work, self._costs(tiles_s, kv_numbers, self.gradient_size))
        slowest = int(times.end_s.argmax())
        kernels, sums = float(times.compute_s[slowest]), float(times.add_s[slowest])
        copies = 0.0
        if self.has_graphs:  # of q, k, v and out; in the backward pass of dout, q, k, v and out, and of dq, dk and dv
            passed = 4 * q_numbers + 2 * kv_numbers if backward else 2 * q_numbers + kv_numbers
            copies = self.speed.memory_s(2 * self.size * passed * self.layout.ring_length)
        return AttentionSeconds(kernels, sums, copies, times.exposed_total_s)

    def _costs(self, tiles_s: Callable[[TileRows], float], kv_numbers: float, gradient_size: int) -> RingCosts:
        """Given the numbers of one token's K and V, and the bytes of one of its dK,dV."""
        cluster = self.speed.cluster
        return RingCosts(
            tiles_s,
            self.size * kv_numbers,
            gradient_size * kv_numbers,
            self.speed.memory_s(ACCUMULATOR_BYTES * kv_numbers),
            1e9 * cluster.link_within_gb_per_s,
            1e9 * cluster.link_between_gb_per_s,
            cluster.latency_us / 1e6,
            cluster.gpus_per_host // self._shared_heads,
            self.slowdown,
        )

    def _gathered(self, backward: bool) -> AttentionSeconds:
        """A rank's queries against all keys, which are gathered in both passes; the backward pass sums gradients."""
        model, layout, degree = self.model, self.layout, self.layout.ring_degree
        numbers = 2 * model.num_kv_heads * model.head_dim * self.batch * layout.padded_length
        pairs = self.batch * self._pairs_of_the_busiest
        kernels = self._block_s(pairs, pairs, model.num_heads, backward, is_full=False)
        sent = self.size * numbers / degree * (degree - 1)
        messages = self.speed.collective_s(sent, degree)
        # into the order of positions; of several rows, a kernel's keys are copied once more, half of them on average
        copies = self.speed.memory_s(2 * self.size * numbers) * (1.5 * STRIDED_COPY if self.batch > 1 else 1)
        if not backward:
            return AttentionSeconds(kernels, 0.0, copies, messages)
        # sums in fp32 are zeroed and added to, put in the order of ranks, and reduced
        sums = self.speed.memory_s((4 + ACCUMULATOR_BYTES) * numbers)
        copies += self.speed.memory_s(8 * numbers)
        messages += self.speed.collective_s(4 * numbers / degree * (degree - 1), degree)
        return AttentionSeconds(kernels, sums, copies, messages)

    @property
    def _pairs_of_the_busiest(self) -> float:
        """Query-key pairs of one row, of the ring rank that has most."""
        layout, degree = self.layout, self.layout.ring_degree
        if self.mask != CAUSAL:
            return max(map(sum, work_per_rank(layout, self.mask)))
        pairs = MaskedBlock(0, layout.padded_length, 0, layout.padded_length, None, 0).work
        few = work_per_rank(Layout(layout.name, degree, 128 * degree))  # the same shares of fewer tokens
        return pairs * max(map(sum, few)) / sum(map(sum, few))


@functools.lru_cache(maxsize=8192)
def _device_seconds(attention: AttentionTime, backward: bool) -> AttentionSeconds:
    """`AttentionTime.device_seconds`, once for all settings of the engine that a search tries."""
    return attention.device_seconds(backward)
