"""Which global positions each ring rank holds. Pure integers; `schedule` and `data.shard` build on it.

A sequence of `length` tokens is padded at its end to `2 * ring_degree` equal chunks, so that every rank holds the
same number of tokens whatever the length. Padding sits behind all real tokens: a causal query never sees it, and
its labels are ignored.

- ``contiguous``: rank r holds chunks 2r and 2r+1, one run of positions. Causal work is uneven: the last rank has most.
- ``zigzag``: rank r holds chunk r and chunk 2P-1-r, so that early and late positions, and so causal work, balance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Layout:
    """How `length` tokens lie over `ring_degree` ranks.

    Raises:
        ValueError: for an unknown name, a ring degree below 1 or a length below 1.
    """

    name: str
    ring_degree: int
    length: int

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(f"layout={self.name!r} is unknown: use one of {', '.join(LAYOUTS)}")
        if self.ring_degree < 1:
            raise ValueError(f"ring_degree={self.ring_degree} must be at least 1")
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1 token")

    @property
    def chunk_length(self) -> int:
        """Tokens in each of the 2P chunks, padding included."""
        return -(-self.length // (2 * self.ring_degree))

    @property
    def local_length(self) -> int:
        """Tokens on each rank, padding included: the same on all ranks."""
        return 2 * self.chunk_length

    @property
    def padded_length(self) -> int:
        """Tokens on all ranks together, padding included."""
        return self.ring_degree * self.local_length

    def chunks(self, ring_rank: int) -> tuple[int, int]:
        """The two chunk numbers that a rank holds, in the order in which it holds them."""
        if self.name == "contiguous":
            return 2 * ring_rank, 2 * ring_rank + 1
        return ring_rank, 2 * self.ring_degree - 1 - ring_rank

    def positions(self, ring_rank: int) -> Tensor:
        """Global positions [S] (int64) of a rank's tokens; those >= `length` are padding."""
        first, second = self.chunks(ring_rank)
        chunk = torch.arange(self.chunk_length)
        return torch.cat([first * self.chunk_length + chunk, second * self.chunk_length + chunk])

    def shard(self, global_tensor: Tensor, ring_rank: int, dim: int, pad_value: float = 0) -> Tensor:
        """The part of `global_tensor` that a rank holds: `length` on `dim` becomes `local_length`.

        Raises:
            ValueError: if the tensor does not have `length` entries on `dim`.
        """
        if global_tensor.shape[dim] != self.length:
            raise ValueError(f"dim {dim} has {global_tensor.shape[dim]} entries, the layout is for {self.length}")
        padding_shape = list(global_tensor.shape)
        padding_shape[dim] = self.padded_length - self.length
        padded = torch.cat([global_tensor, global_tensor.new_full(padding_shape, pad_value)], dim)
        return padded.index_select(dim, self.positions(ring_rank).to(padded.device))

    def unshard(self, local_tensors: Sequence[Tensor], dim: int) -> Tensor:
        """The inverse of `shard`: the tensors of ring ranks 0..P-1 become one of `length`, padding removed."""
        positions = torch.cat([self.positions(rank) for rank in range(self.ring_degree)])
        gathered = torch.cat(list(local_tensors), dim)
        order = torch.argsort(positions)[: self.length].to(gathered.device)
        return gathered.index_select(dim, order)
