"""What attention's backward pass holds where packed documents travel in one exchange: `ring_attention.direct`.

Other tensors than a ring's, and more or fewer of them: copies of keys instead of two shards on their way. `K,V` stands
for the bytes of a token's keys and values, or of their gradients, which travel in the same dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ring_attention.balance import most_shards


class ExchangedTokens(NamedTuple):
    """Of one rank, all rows of a micro-batch together.

    Args:
        whole: in whole documents, which are computed by themselves.
        rest: the others of its own.
        copied: earlier keys of the rest's documents, once for each run of queries that sees them.
        received: keys of other ranks.
        sent: own keys that other ranks get, once for each of them.
    """

    whole: float
    rest: float
    copied: float
    received: float
    sent: float


def most_exchanged(local_tokens: float, ring_degree: int) -> tuple[ExchangedTokens, ExchangedTokens]:
    """Bounds for unknown documents: of a rank whose own tokens are all rest, and of one with next to no rest."""
    most = most_shards(ring_degree) * local_tokens
    return ExchangedTokens(0, local_tokens, most, most, most), ExchangedTokens(local_tokens, 0, most, most, most)


def symmetric_buffer_shards(ring_degree: int) -> int:
    """Shards in the receive buffers of K,V, and as many for gradients: an exchange's, and a second one for rings."""
    return math.ceil(most_shards(ring_degree)) + (ring_degree > 2)


@dataclass(frozen=True)
class ExchangeMemory:
    """Bytes that attention's backward pass allocates in one layer, the output's gradient and results included.

    What the allocator keeps for a second stream (`ring_attention.streams`) is not counted: about 0.5 GiB for 16,384
    tokens with the heads of Llama 3.1 8B, from the tenth of a GPU that plans leave free.

    Args:
        num_heads: query heads.
        queries, keys: numbers of a token in all query heads, and in all key-value heads.
        size: bytes of a number.
        has_varlen: whether the kernel is flash-attn-4, which takes all documents in one call and keeps fp32 sums. Other
            kernels copy keys to all heads, and their calls' gradients are summed.
        receives: whether each pass allocates buffers to receive in. The copy engine has symmetric ones for all passes.
    """

    num_heads: int
    queries: int
    keys: int
    size: int
    has_varlen: bool
    receives: bool

    def peak_bytes(self, tokens: ExchangedTokens) -> float:
        """In the order of `ring_attention.direct.direct_backward`."""
        whole, rest, copied, received, sent = tokens
        kv, dq, num_local = 2 * self.size * self.keys, self.size * self.queries, whole + rest
        copies = rest + copied
        sending = kv * (sent + (received if self.receives else 0))
        # gradients of the copies, of which sums are sent to others, and what is received from them
        returning = kv * (copies + received + (sent if self.receives else 0))
        points = (
            sending + max(kv * copies, self._kernel_bytes(whole, whole)),
            kv * copies + self._kernel_bytes(rest, copies) + kv * copies * self.has_varlen,
            returning,
        )
        results = (dq + kv) * num_local
        return dq * num_local + results + max(points)

    def _kernel_bytes(self, queries: float, keys: float) -> float:
        """What computes the gradients of so many queries and keys, beside results that flash-attn-4 writes in place."""
        dq, dkv = self.size * self.queries, 2 * self.size * self.keys
        is_grouped = self.keys < self.queries
        if self.has_varlen:
            rows = 8 * self.num_heads  # lse and the row sums of dout * out
            return queries * (rows + 4 * self.queries) + keys * (8 * self.keys if is_grouped else 0)
        # the largest call, which sees all keys at most: K and V and three gradients for all heads. Beside it are the
        # sums of all calls, rounded at last.
        call = dq * queries + (4 * dq + (dkv if is_grouped else 0)) * keys
        rounded = dq * queries + dkv * keys if self.size == 2 else 0
        return call + 4 * self.queries * queries + 8 * self.keys * keys + rounded
