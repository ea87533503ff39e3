"""The one exchange of `direct`: entries of own tokens, some of which are sent, and those that arrive.

Shapes: B batch, T tokens, K key-value heads, D head size, E value head size; N entries (`direct_indices`), F = K*D or
K*E numbers of a part of an entry.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ring_attention.direct_routing import Parcel
from ring_attention.kv import KeysValues
from ring_attention.row_sums import sum_rows
from ring_attention.trace import profiler_range
from ring_attention.transport import P2PMessage, P2PTransport, Transfer


class Entries:
    """Keys and values, or their gradients: own ones, numbered row after row, and behind them those of other ranks.

    They stay where they are, own ones in their tensors and the others, K and V side by side, in a receive buffer.

    Args:
        arriving: the parcels that other ranks send.
    """

    def __init__(self, own: KeysValues, arriving: Sequence[Parcel]) -> None:
        self._own = own.k_BTKD.flatten(2), own.v_BTKE.flatten(2)
        self._sizes = [part.shape[2] for part in self._own]
        self._arriving, self._numel = arriving, len(own.k_BTKD) * sum(self._sizes)  # of a token
        self._received = own.k_BTKD.new_empty(0)
        self._transfer: Transfer | None = None

    def exchange(
        self,
        transport: P2PTransport | None,
        purpose: str,
        buffer: str,
        leaving: Sequence[Parcel],
        addends: Tensor,
        starts: Tensor | None = None,
    ) -> None:
        """Start to send copies or sums of own entries (`sum_rows`) to the ranks of `leaving`, and to receive."""
        if not leaving and not self._arriving:
            return
        assert transport is not None, "several ranks need a transport"
        sent = self._received.new_empty(self._num_numbers(leaving))
        if leaving:
            self._write([part[None] for part in self._parts(sent)], addends, starts)
        num_received = self._num_numbers(self._arriving)
        self._received = transport.receive_buffer(buffer, num_received, sent.dtype, sent.device)
        messages = (
            self._messages(vector, buffer, parcels)
            for vector, parcels in ((sent, leaving), (self._received, self._arriving))
        )
        self._transfer = transport.post(purpose, *messages)

    def wait(self) -> None:
        """Until all entries are there."""
        if self._transfer is not None:
            self._transfer.wait()

    def write(self, target: KeysValues, addends: Tensor, starts: Tensor | None = None) -> None:
        """Write copies or sums of entries to `target`, after `wait`."""
        self._write([target.k_BTKD.flatten(2), target.v_BTKE.flatten(2)], addends, starts)

    def _write(self, targets_BTF: Sequence[Tensor], addends: Tensor, starts: Tensor | None) -> None:
        with profiler_range("merge"):
            for target, own, received in zip(targets_BTF, self._own, self._parts(self._received), strict=True):
                sum_rows(target, own, received, addends, starts)

    def _parts(self, vector: Tensor) -> tuple[Tensor, ...]:
        """[N, F]: K and V of the entries in a vector."""
        return vector.view(-1, sum(self._sizes)).split(self._sizes, 1)

    def _num_numbers(self, parcels: Sequence[Parcel]) -> int:
        return self._numel * sum(parcel.num_tokens for parcel in parcels)

    def _messages(self, vector: Tensor, buffer: str, parcels: Sequence[Parcel]) -> list[P2PMessage]:
        parts = vector.split([self._numel * parcel.num_tokens for parcel in parcels])
        return [
            P2PMessage((part,), parcel.peer, buffer, self._numel * parcel.start_at_peer)
            for part, parcel in zip(parts, parcels, strict=True)
        ]
