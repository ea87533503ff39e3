"""The one exchange of `direct`: entries of own tokens, some of which are sent, and behind them those that arrive.

Shapes: B batch, T tokens, K key-value heads, D head size, E value head size; N entries (`direct_indices`), F = K*D +
K*E numbers of an entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ring_attention.direct_routing import Parcel
from ring_attention.transport import P2PMessage, P2PTransport, Transfer


class Entries:
    """Keys and values, or their gradients, side by side: own ones, and behind them those that other ranks send.

    Args:
        arriving: the parcels that they send.
    """

    def __init__(self, k_BTKD: Tensor, v_BTKE: Tensor, arriving: Sequence[Parcel]) -> None:
        parts = k_BTKD.flatten(2), v_BTKE.flatten(2)
        batch, num_tokens = k_BTKD.shape[:2]
        self._arriving, self._numel = arriving, batch * sum(part.shape[2] for part in parts)  # of a token
        shape = num_tokens + sum(parcel.num_tokens for parcel in arriving), self._numel
        self._all_NF = k_BTKD.new_empty(shape).view(-1, self._numel // batch)
        self.own_NF = self._all_NF[: batch * num_tokens]
        torch.cat(parts, -1, out=self.own_NF.view(batch, num_tokens, -1))
        self._transfer: Transfer | None = None

    def exchange(
        self, transport: P2PTransport | None, purpose: str, buffer: str, sent_NF: Tensor, leaving: Sequence[Parcel]
    ) -> None:
        """Start to send entries to the ranks of `leaving`, and to receive in the buffer of that name."""
        if not leaving and not self._arriving:
            return
        assert transport is not None, "several ranks need a transport"
        num_received = self._numel * sum(parcel.num_tokens for parcel in self._arriving)
        self._received = transport.receive_buffer(buffer, num_received, sent_NF.dtype, sent_NF.device)
        messages = (
            self._messages(vector, buffer, parcels)
            for vector, parcels in ((sent_NF.view(-1), leaving), (self._received, self._arriving))
        )
        self._transfer = transport.post(purpose, *messages)

    def arrived(self) -> Tensor:
        """All entries, own ones first. To be called once."""
        if self._transfer is not None:
            self._transfer.wait()
            self._all_NF[len(self.own_NF) :].view(-1).copy_(self._received)
        return self._all_NF

    def _messages(self, vector: Tensor, buffer: str, parcels: Sequence[Parcel]) -> list[P2PMessage]:
        parts = vector.split([self._numel * parcel.num_tokens for parcel in parcels])
        return [
            P2PMessage((part,), parcel.peer, buffer, self._numel * parcel.start_at_peer)
            for part, parcel in zip(parts, parcels, strict=True)
        ]
