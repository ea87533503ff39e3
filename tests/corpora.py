"""Corpora of literal texts, in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from conf.schema import DataConfig
from data.corpus import Corpus, Cursor, Pack
from data.packing import Piece
from data.store import TokenStore
from data.tokenizer import BYTES


def store_of(documents: list[Any], name: str = "texts", trained: np.ndarray | None = None) -> TokenStore:
    """The tokens of documents that are lists of tokens."""
    tokens = np.concatenate([np.asarray(document, np.int32) for document in documents])
    return TokenStore(name, tokens, np.cumsum([len(document) for document in documents]), trained)


def byte_corpus(texts: list[str], sequence_length: int, validation_sequences: int = 1, **settings: Any) -> Corpus:
    """A corpus of texts as bytes, each with a separator; `settings` are others of `data`."""
    config = DataConfig(sequence_length=sequence_length, validation_sequences=validation_sequences, **settings)
    return Corpus({"texts": store_of(BYTES.encode(texts))}, config)


def packs_of(sequences: np.ndarray) -> list[Pack]:
    """One pack for each sequence [L+1], of L tokens that all have a label."""
    num, length = sequences.shape[0], sequences.shape[1] - 1
    store = store_of([*sequences])
    starts = [row * (length + 1) for row in range(num)]
    return [
        Pack((Piece(0, start, start + length, True),), length, Cursor(0, row), Cursor(0, row + 1), (store,))
        for row, start in enumerate(starts)
    ]
