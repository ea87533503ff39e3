"""Decoding: the keys and values of a sequence stay cut over the ranks, and one query at a time sees all of them.

    cached = CachedAttention(attention)
    cached.start(num_tokens, num_new)    # then a forward pass over this rank's shard: each layer's k, v are kept
    cached.step(position)                # then a forward pass over one token, the same on every rank

The model calls `cached` in place of its attention module. Each rank attends to the keys that it holds, and the partial
results are merged by their lse. The k, v of new tokens go to the ranks in turn, so a rank's memory is O(L / P).

Shapes: B batch, S local tokens, T keys of this rank, H query heads, K key-value heads, G query heads of a key-value
head, D head size, E value head size, P ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels import Scores
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, Mask
from ring_attention.sequence_attention import SequenceAttention
from ring_attention.sinks import join_sinks
from ring_attention.transport.collectives import all_gather

TILE_KEYS = 8192  # that are in fp32 at the same time


class CachedAttention:
    """An attention module that keeps the keys and values of one sequence. Every rank must make the same calls.

    Args:
        attention: computes the forward pass over the sequence; any method, layout and kernel.
    """

    def __init__(self, attention: SequenceAttention) -> None:
        self.attention, self.sequence_rank, self._group = attention, attention.sequence_rank, attention._group
        self._num_ranks = attention.ring_degree * attention.ulysses_degree
        self._layers: list[_LayerCache] = []
        self._num_calls = 0  # of layers in this forward pass
        self._num_tokens = self._num_new = 0
        self._position: int | None = None  # of the one token of this forward pass; None: it is over a shard

    def layout(self, length: int, documents: tuple[int, ...] | None = None) -> Layout:
        """How the sequence must be spread over the ranks."""
        return self.attention.layout(length, documents)

    def start(self, num_tokens: int, num_new: int) -> None:
        """Forget everything. The next forward pass is over shards of `num_tokens` tokens, by `layout`.

        Args:
            num_tokens: 0 if there is none, and `step` begins at position 0.
            num_new: at most so many calls of `step` follow.
        """
        self._layers, self._num_calls, self._position = [], 0, None
        self._num_tokens, self._num_new = num_tokens, num_new

    def step(self, position: int) -> None:
        """The next forward pass is over the one token at `position`, which follows all tokens so far.

        Raises:
            ValueError: if the pass before did not call every layer's attention once, or `start` was told of fewer.
        """
        if not self._num_tokens <= position < self._num_tokens + self._num_new:
            raise ValueError(
                f"position {position} is none of the {self._num_new} after {self._num_tokens} tokens that `start` was "
                "told of: give it a larger num_new"
            )
        if self._num_calls != len(self._layers):
            raise ValueError(f"{self._num_calls} of {len(self._layers)} layers called their attention in the last pass")
        self._num_calls, self._position = 0, position

    @property
    def max_position(self) -> int:
        """The largest position that rotary embeddings must know of: that of the first query over all that is kept."""
        return self._num_tokens if self._position is None else self._position

    @property
    def num_bytes(self) -> int:
        """Of keys and values on this rank."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def from_first_rank(self, value: Tensor) -> Tensor:
        """What the first rank holds of a tensor of one element, on every rank: they must go on with the same token."""
        return value if self._group is None else all_gather(value.reshape(1), self._group)[0].reshape(value.shape)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        *,
        mask: Mask = CAUSAL,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """As `SequenceAttention.forward`, for causal masks and windows.

        Raises:
            ValueError: for documents, a mask that is not causal, or tokens by batch_dim_idx=1; else as that does.
        """
        if mask.documents is not None or mask.right != 0 or batch_dim_idx != 0:
            raise ValueError("decoding is for one causal document of [B, S, H, D]: give a causal mask, or a window")
        if self._position is None:
            options: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap, "sinks": sinks}
            out = self.attention(query, key, value, 0, mask=mask, dropout_p=dropout_p, **options)
            self._layers.append(self._kept(key, value, mask))
            self._num_calls += 1
            return out
        if self._num_calls == len(self._layers):  # nothing came before the first step
            self._layers.append(self._kept(key[:, :0], value[:, :0], mask))
        layer = self._layers[self._num_calls]
        self._num_calls += 1
        if self._position % self._num_ranks == self.sequence_rank:
            layer.append(key, value, self._position)
        keys, values = layer.visible(0 if mask.left is None else self._position - mask.left)
        scale = 1 / math.sqrt(query.shape[-1]) if softmax_scale is None else softmax_scale
        out, lse = attend_to_keys(query[:, 0], keys, values, Scores(scale, softcap))
        if self._group is not None:
            out, lse = self._merged(out, lse)
        out_B1HE, lse_BH1 = out.unsqueeze(1), lse.unsqueeze(2)
        if sinks is not None:
            out_B1HE, _ = join_sinks(out_B1HE, lse_BH1, sinks.to(lse.dtype))
        return out_B1HE.to(query.dtype)

    def _kept(self, k_BSKD: Tensor, v_BSKE: Tensor, mask: Mask) -> _LayerCache:
        """What later queries may see of a layer's local k and v: no padding, and a window's last tokens alone."""
        if not k_BSKD.shape[1]:
            positions = torch.empty(0, dtype=torch.int64)
        else:
            positions = self.layout(self._num_tokens).positions(self.sequence_rank)
        first = 0 if mask.left is None else self._num_tokens - mask.left
        start, stop = torch.searchsorted(positions, torch.tensor([first, self._num_tokens])).tolist()
        num_new = math.ceil(self._num_new / self._num_ranks)
        return _LayerCache(k_BSKD[:, start:stop], v_BSKE[:, start:stop], positions[start:stop], num_new)

    def _merged(self, out_BHE: Tensor, lse_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Over all ranks, by the online softmax; the same on every rank."""
        gathered = all_gather(torch.cat((out_BHE.flatten(), lse_BH.flatten())), self._group)
        outs, lses = gathered.split((out_BHE.numel(), lse_BH.numel()), 1)
        return merge_parts(outs.unflatten(1, out_BHE.shape), lses.unflatten(1, lse_BH.shape))


class _LayerCache:
    """One layer's keys [B, K, C, D] and values [B, K, C, E] on this rank, `num` of C filled. Positions grow."""

    def __init__(self, k_BTKD: Tensor, v_BTKE: Tensor, positions_T: Tensor, num_new: int) -> None:
        batch, self.num, num_heads, _ = k_BTKD.shape
        capacity = self.num + num_new
        self.keys = k_BTKD.new_empty(batch, num_heads, capacity, k_BTKD.shape[-1])
        self.values = v_BTKE.new_empty(batch, num_heads, capacity, v_BTKE.shape[-1])
        self.keys[:, :, : self.num] = k_BTKD.transpose(1, 2)
        self.values[:, :, : self.num] = v_BTKE.transpose(1, 2)
        self.positions = positions_T.new_empty(capacity)  # on the CPU
        self.positions[: self.num] = positions_T

    def append(self, k_B1KD: Tensor, v_B1KE: Tensor, position: int) -> None:
        self.keys[:, :, self.num], self.values[:, :, self.num] = k_B1KD[:, 0], v_B1KE[:, 0]
        self.positions[self.num] = position
        self.num += 1

    def visible(self, first_position: int) -> tuple[Tensor, Tensor]:
        """Keys [B, K, T, D] and values [B, K, T, E] from `first_position` on."""
        start = int(torch.searchsorted(self.positions[: self.num], first_position))
        return self.keys[:, :, start : self.num], self.values[:, :, start : self.num]


def attend_to_keys(q_BHD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """One query's out [B, H, E] and lse [B, H] over T keys, in fp32 (fp64 for fp64). Without keys 0 and -inf."""
    dtype = torch.promote_types(q_BHD.dtype, torch.float32)
    q_BKGD = q_BHD.to(dtype).unflatten(1, (k_BKTD.shape[1], -1))
    tiles = [q_BKGD @ tile.to(dtype).mT for tile in k_BKTD.split(TILE_KEYS, 2)]
    scores_BKGT = scores.scale * torch.cat(tiles, -1)
    if scores.softcap is not None:
        scores_BKGT = scores.softcap * torch.tanh(scores_BKGT / scores.softcap)
    lse_BKG = scores_BKGT.logsumexp(-1)
    weights = torch.exp(scores_BKGT - lse_BKG[..., None]).split(TILE_KEYS, -1)
    out_BKGE = torch.stack(
        [weight @ tile.to(dtype) for weight, tile in zip(weights, v_BKTE.split(TILE_KEYS, 2), strict=True)]
    ).sum(0)
    return out_BKGE.flatten(1, 2), lse_BKG.flatten(1, 2)


def merge_parts(outs_PBHE: Tensor, lses_PBH: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, E] and lse [B, H] over P disjoint sets of keys, of which one at least is not empty."""
    lse_BH = lses_PBH.logsumexp(0)
    return (outs_PBHE * torch.exp(lses_PBH - lse_BH)[..., None]).sum(0), lse_BH
