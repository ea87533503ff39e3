"""Which keys a query may see, by global positions: a band and, within it, packed documents. Pure integers.

A query at position p sees a key at position k if p - left <= k <= p + right and both are in one document. Causal is
right=0, full has neither bound, and a sliding window has a left one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """A band around the diagonal, cut into documents.

    Args:
        left: how many tokens before itself a query sees; None is all.
        right: how many tokens after itself a query sees; 0, the default, is causal, None is all.
        documents: set by `packed` and `packed_by_ids`. Boundaries 0 = b0 <= b1 <= ... of each row of the batch, or one
            tuple for all rows. Tokens after the last boundary are padding: they see each other, and no other token
            sees them.

    Raises:
        ValueError: for a negative bound, or boundaries that decrease or do not start at 0.
    """

    left: int | None = None
    right: int | None = 0
    documents: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            bound = getattr(self, name)
            if bound is not None and bound < 0:
                raise ValueError(f"{name}={bound} must be 0 or more tokens, or None for all")
        if self.documents == ():
            raise ValueError("documents=() has no row: pass one tuple of boundaries for all rows, or one per row")
        for boundaries in self.documents or ():
            if not boundaries or boundaries[0] != 0:
                raise ValueError(f"document boundaries {boundaries} must start at 0, as cu_seqlens do")
            for before, after in itertools.pairwise(boundaries):
                if after < before:
                    raise ValueError(f"document boundaries must not decrease, but {after} follows {before}")

    def packed(self, cu_seqlens: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Mask:
        """The same band within packed documents.

        Args:
            cu_seqlens: cumulative document lengths over the WHOLE sequence, not this rank's part: 0, then the end of
                each document. Equal neighbours are an empty document. Or one such list per row of the batch. Reading a
                GPU tensor waits for the GPU, so pass a CPU tensor.
        """
        values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
        rows = values if len(values) and isinstance(values[0], Sequence) else [values]
        return replace(self, documents=tuple(tuple(int(boundary) for boundary in row) for row in rows))  # pyright: ignore[reportGeneralTypeIssues]

    def packed_by_ids(self, document_ids: Tensor) -> Mask:
        """The same band within packed documents, given one id per token.

        Args:
            document_ids: [G] or [B, G] integers over the whole sequence; a document is one run of equal ids.

        Raises:
            ValueError: if an id occurs in two runs, whose tokens would not see each other.
        """
        rows = []
        for ids in document_ids.reshape(-1, document_ids.shape[-1]).cpu():
            values, lengths = torch.unique_consecutive(ids, return_counts=True)
            if len(values) > len(values.unique()):
                raise ValueError("a document id occurs in two runs: each document must be one run of tokens")
            rows.append([0, *lengths.cumsum(0).tolist()])
        return self.packed(rows)

    def within(self, length: int) -> Mask:
        """The same mask on `length` tokens, without what excludes no key.

        Bounds beyond all tokens go, because some kernels have no windows. Documents go if each row is a single one,
        because passes over packed documents are no CUDA graphs.
        """
        left, right = (None if b is not None and b >= length - 1 else b for b in (self.left, self.right))
        documents = self.documents
        if documents is not None and all(row == (0, length) for row in documents):
            documents = None
        return replace(self, left=left, right=0 if self.right == 0 else right, documents=documents)

    def spans(self, length: int) -> list[list[tuple[int, int]]]:
        """Each row's documents as [start, stop), without empty ones. Tokens after the last are one more document.

        Raises:
            ValueError: if documents reach beyond `length`.
        """
        rows = []
        for boundaries in self.documents or ((),):
            if boundaries and boundaries[-1] > length:
                raise ValueError(
                    f"the documents end at {boundaries[-1]}, but the sequence has {length} tokens over all ranks"
                )
            ends = [0, *boundaries, length]
            rows.append([(start, stop) for start, stop in itertools.pairwise(ends) if start < stop])
        return rows

    def allows(self, query_positions: Tensor, key_positions: Tensor, row: int = 0) -> Tensor:
        """[S, T] bool: the definition, for tests and for printing a mask."""
        distance = key_positions[None, :] - query_positions[:, None]
        left, right = (math.inf if bound is None else bound for bound in (self.left, self.right))
        allowed = (distance >= -left) & (distance <= right)
        if self.documents is not None:
            ends = torch.tensor(self.documents[row % len(self.documents)])
            queries, keys = (torch.bucketize(x, ends, right=True) for x in (query_positions, key_positions))
            allowed &= queries[:, None] == keys[None, :]
        return allowed


CAUSAL = Mask()
FULL = Mask(right=None)
