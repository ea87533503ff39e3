"""The one exchange of `direct`: entries of own tokens, some of which are sent, and those that arrive.

Shapes: B batch, T tokens, K key-value heads, D head size, E value head size; F = K*D or K*E.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ring_attention.direct_routing import Parcel
from ring_attention.row_sums import KeysAndValues, entries, sum_rows
from ring_attention.trace import profiler_range
from ring_attention.transport import P2PMessage, P2PTransport, Transfer


class Entries:
    """Keys and values, or their gradients: own ones, numbered row after row, and behind them those of other ranks.

    They stay where they are, own ones in their tensors and the others, K and V side by side, in a receive buffer.

    Args:
        arriving: the parcels that other ranks send.
    """

    def __init__(self, k_BTKD: Tensor, v_BTKE: Tensor, arriving: Sequence[Parcel]) -> None:
        self._own = _rows(k_BTKD), _rows(v_BTKE)
        self._arriving = arriving
        self._numel = k_BTKD.shape[0] * (self._own[0].shape[2] + self._own[1].shape[2])  # of a token
        self._received = _nothing(k_BTKD.dtype, k_BTKD.device)
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
            k_NF, v_NF = entries(sent, self._own)
            self._write((k_NF[None], v_NF[None]), addends, starts)
        num_received = self._num_numbers(self._arriving)
        self._received = transport.receive_buffer(buffer, num_received, sent.dtype, sent.device)
        sends = self._messages(sent, buffer, leaving)
        self._transfer = transport.post(purpose, sends, self._messages(self._received, buffer, self._arriving))

    def wait(self) -> None:
        """Until all entries are there."""
        if self._transfer is not None:
            self._transfer.wait()

    def write(self, k_BTKD: Tensor, v_BTKE: Tensor, addends: Tensor, starts: Tensor | None = None) -> None:
        """Write copies or sums of entries there, after `wait`."""
        self._write((k_BTKD.flatten(2), v_BTKE.flatten(2)), addends, starts)

    def _write(self, target: KeysAndValues, addends: Tensor, starts: Tensor | None) -> None:
        with profiler_range("merge"):
            sum_rows(target, self._own, self._received, addends, starts)

    def _num_numbers(self, parcels: Sequence[Parcel]) -> int:
        return self._numel * sum([parcel.num_tokens for parcel in parcels])

    def _messages(self, vector: Tensor, buffer: str, parcels: Sequence[Parcel]) -> list[P2PMessage]:
        parts = vector.split_with_sizes([self._numel * parcel.num_tokens for parcel in parcels]) if parcels else ()
        return [
            P2PMessage((part,), parcel.peer, buffer, self._numel * parcel.start_at_peer)
            for part, parcel in zip(parts, parcels, strict=True)
        ]


@functools.cache
@torch.inference_mode(False)  # tensors made in that mode are of no use outside it
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def _rows(x_BTKD: Tensor) -> Tensor:
    """[B, T, F], with the numbers of a token side by side."""
    rows_BTF = x_BTKD.flatten(2)
    return rows_BTF if rows_BTF.stride(2) == 1 else rows_BTF.contiguous()
