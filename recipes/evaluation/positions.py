"""Buckets of positions within documents, and documents cut to a shorter context. Pure integers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from data.corpus import Pack
from data.packing import Piece

FIRST_BUCKET = 256  # tokens; each bucket after the first is as long as all before it together


def bucket_edges(length: int) -> list[int]:
    """The buckets of `length` positions: 0, 256, 512, 1024, ... and the first power of two that reaches `length`."""
    edges = [0, FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return edges


def bucket_of(positions: Tensor, edges: list[int]) -> Tensor:
    """The bucket of each position, int64."""
    return torch.bucketize(positions, torch.tensor(edges), right=True) - 1


def cut_pack(pack: Pack, context: int) -> Pack:
    """The pack with its documents cut after every `context` tokens. All tokens and labels stay."""
    return replace(pack, pieces=tuple(itertools.chain.from_iterable(_cut(piece, context) for piece in pack.pieces)))


def _cut(piece: Piece, context: int) -> Iterable[Piece]:
    for start in range(piece.start, piece.stop, context):
        stop = min(start + context, piece.stop)
        yield Piece(piece.source, start, stop, stop < piece.stop or piece.has_next)
