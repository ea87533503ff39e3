"""The sequences of a run: packs of documents, a pure function of the token stores, the settings and a cursor.

A piece's n tokens are inputs, and its labels are the next tokens. So every token of a document is an input once per
epoch, and every token but its first is a label once. Each source holds out some documents for validation, or has a
store of its own for it. An epoch takes of every source its share of tokens, its weight; a source that comes to its end
begins again with its documents in a new order. A pack in which nothing is trained, as a part of a long prompt, is left
out of training: in a step of such packs the loss would be 0, and the optimizer would go on by its momentum.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from conf.schema import DataConfig
from data.documents import (
    MIXTURE,
    PACKS,
    VALIDATION_PACKS,
    Documents,
    EndlessSource,
    check_size,
    generator,
    hold_out,
    usable_documents,
)
from data.packing import PiecePack, window_packs
from data.source import CorpusError
from data.store import TokenStore, open_stores, open_validation_stores

IGNORED_LABEL = -100  # torch's default ignore_index


class Cursor(NamedTuple):
    """Where training is: the number of the next pack of an epoch. It does not depend on the number of ranks."""

    epoch: int
    pack: int


START = Cursor(0, 0)


class LastRead(NamedTuple):
    """The last pack that training has read, and what recognises it."""

    epoch: int
    pack: int
    sha256: str


@dataclass(frozen=True)
class Pack:
    """One sequence of `length` positions: pieces, then padding. Its tokens are read when they are asked for."""

    pieces: PiecePack
    length: int
    position: Cursor  # its own
    cursor: Cursor  # of the pack after this one
    stores: Sequence[TokenStore] = field(repr=False, compare=False)  # of which only slices of tokens are taken

    @functools.cached_property
    def boundaries(self) -> tuple[int, ...]:
        """0, then the end of each piece in the pack. Positions after the last are padding."""
        return tuple(itertools.accumulate((stop - start for _, start, stop, _ in self.pieces), initial=0))

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return self.boundaries[-1]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of positions [start, stop), both int64 [stop - start]; nothing else is read.

        A label is the document's next token, or IGNORED_LABEL at a document's end and where the next token is not
        trained. Padding has token 0.
        """
        tokens, labels = np.zeros(stop - start, np.int64), np.full(stop - start, IGNORED_LABEL, np.int64)
        for piece, first, last in zip(self.pieces, self.boundaries, self.boundaries[1:], strict=False):
            begin, end = max(start, first), min(stop, last)
            if begin >= end:
                continue
            shift, store = piece.start - first, self.stores[piece.source]
            end_of_labels = min(end + 1, last + piece.has_next)
            read = np.asarray(store.tokens[begin + shift : end_of_labels + shift])
            tokens[begin - start : end - start] = read[: end - begin]
            following = read[1:].astype(np.int64)
            if store.trained is not None:
                following[~np.asarray(store.trained[begin + 1 + shift : end_of_labels + shift])] = IGNORED_LABEL
            labels[begin - start : begin - start + len(following)] = following
        return tokens, labels

    def sha256(self) -> str:
        """Of the tokens and boundaries."""
        tokens, _ = self.read(0, self.num_tokens)
        return hashlib.sha256(np.concatenate([tokens, self.boundaries]).astype("<i8").tobytes()).hexdigest()


def validation_name(name: str) -> str:
    """The name of a source's own documents to validate on."""
    return f"{name}, validation"


class Corpus:
    """Packs to train on, endlessly, and packs to validate on.

    Args:
        stores: the tokens of each source, by name.
        weights: each source's share of the tokens; None: there is one source.
        validation_stores: of sources that have documents of their own to validate on. The others hold some out.

    Raises:
        CorpusError: if there are not enough documents to validate on and for one sequence, or if none of their tokens
            is trained.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        config: DataConfig,
        weights: Mapping[str, float] | None = None,
        validation_stores: Mapping[str, TokenStore] | None = None,
    ) -> None:
        self.names = tuple(stores)
        self.config = config
        self.stores = tuple(stores.values())
        weights = weights or dict.fromkeys(stores, 1.0)
        total = sum(weights[name] for name in stores)
        self.weights = tuple(weights[name] / total for name in stores)
        self.sources: list[EndlessSource] = []
        self._validation: dict[str, list[Pack]] = {}
        self.validation_stores = validation_stores or {}
        for number, (name, store) in enumerate(stores.items()):
            documents = usable_documents(store, number, config)
            if own := self.validation_stores.get(name):
                check_size(int(documents.lengths.sum()), config, name, 0)
                self._validation[name] = validation_packs(usable_documents(own, 0, config), own, config, None)
            else:
                check_size(int(documents.lengths.sum()), config, name, config.validation_sequences)
                held_out, documents = hold_out(documents, config)
                self._validation[name] = validation_packs(held_out, store, config, config.validation_sequences)
            self.sources.append(EndlessSource(documents, config.shuffle_seed, number, self.weights[number]))
        self.tokens_per_epoch = sum(source.num_tokens for source in self.sources)
        self.says_what_is_trained = any(store.trained is not None for store in self.stores)
        if self.says_what_is_trained:
            next(self.training())

    def training(self, cursor: Cursor = START) -> Iterator[Pack]:
        """Endless packs, from the cursor on. Where documents say what is trained, only packs with labels.

        Raises:
            CorpusError: from `next`, if an epoch has none.
        """
        skip = cursor.pack
        for epoch in itertools.count(cursor.epoch):
            packs = window_packs(self.epoch_documents(epoch), self.config, self.key_of_packs(epoch), skip)
            of_stores, is_empty = ((pieces, self.stores) for pieces in packs), skip == 0
            for pack in numbered(of_stores, epoch, skip, self.config.sequence_length):
                if not self.says_what_is_trained or num_labels(pack.pieces, self.stores):
                    is_empty = False
                    yield pack
            if is_empty:
                raise CorpusError(
                    f"none of the {self.tokens_per_epoch:,} tokens to train on is to be learned: give other documents, "
                    f"or longer sequences, such as data.sequence_length={2 * self.config.sequence_length}"
                )
            skip = 0

    def of_length(self, sequence_length: int) -> Corpus:
        """The same documents in the same order, in packs of another length; validation stays as it is."""
        corpus = copy.copy(self)
        corpus.config = replace(self.config, sequence_length=sequence_length, stages=None)
        return corpus

    def digests(self) -> dict[str, str] | None:
        """Of the documents of each source, and of those that it has to validate on. None if a store has no digest."""
        digests = {store.name: store.digest for store in self.stores}
        digests |= {validation_name(name): store.digest for name, store in self.validation_stores.items()}
        return digests if all(digests.values()) else None

    def validation(self) -> dict[str, list[Pack]]:
        """The packs to validate on, by source."""
        return self._validation

    def epoch_documents(self, epoch: int) -> Documents:
        """All documents of an epoch, in its order."""
        parts = [source.epoch(epoch, self.tokens_per_epoch) for source in self.sources]
        if len(parts) == 1:
            return parts[0]
        joined = Documents.joined(parts)
        key = (MIXTURE, self.config.shuffle_seed, epoch)
        return joined.take(generator(*key).permutation(joined.num_documents))

    def key_of_packs(self, epoch: int) -> tuple[int, ...]:
        """The key of the order of packs within a window."""
        return PACKS, self.config.shuffle_seed, epoch


def numbered(
    packs: Iterator[tuple[PiecePack, Sequence[TokenStore]]], epoch: int, first: int, length: int
) -> Iterator[Pack]:
    """An epoch's packs from number `first` on, with their cursors: after the last comes the next epoch."""
    following, number = next(packs, None), first
    while (current := following) is not None:
        position = Cursor(epoch, number)
        following, number = next(packs, None), number + 1
        cursor = Cursor(epoch + 1, 0) if following is None else Cursor(epoch, number)
        yield Pack(current[0], length, position, cursor, current[1])


def num_labels(pieces: PiecePack, stores: Sequence[TokenStore]) -> int:
    """The trained tokens of a pack. The first token of a piece is nobody's label."""
    total = 0
    for piece in pieces:
        labels, trained = slice(piece.start + 1, piece.stop + piece.has_next), stores[piece.source].trained
        total += labels.stop - labels.start if trained is None else int(np.count_nonzero(trained[labels]))
    return total


def validation_packs(documents: Documents, store: TokenStore, config: DataConfig, num: int | None) -> list[Pack]:
    """The first `num` packs of documents of `store` in a seeded order; None: all."""
    packs = window_packs(documents, config, (VALIDATION_PACKS, config.shuffle_seed))
    pieces = [tuple(piece._replace(source=0) for piece in pack) for pack in itertools.islice(packs, num)]
    if not pieces:
        raise CorpusError("there is no text to validate on: check data.validation_files or data.validation_split")
    numbered_packs = list(numbered(((pack, (store,)) for pack in pieces), 0, 0, config.sequence_length))
    # a loss of no labels would be 0
    if store.trained is not None and not any(num_labels(pack, (store,)) for pack in pieces):
        longer = f"longer sequences, such as data.sequence_length={2 * config.sequence_length}"
        more = "other documents" if num is None else f"more, as data.validation_sequences={2 * num}"
        raise CorpusError(
            f"no token of the {len(pieces):,} validation sequences of {store.name} is trained: give {more}, or {longer}"
        )
    return numbered_packs


def open_corpus(config: DataConfig, vocab_size: int | None = None) -> Corpus:
    """The configured corpus. Raises CorpusError if it cannot be opened.

    Args:
        vocab_size: of the model, which must know all tokens.
    """
    stores = open_stores(config, vocab_size, print)
    weights = {name: entry["weight"] for name, entry in config.sources.items()} if config.sources else None
    return Corpus(stores, config, weights, open_validation_stores(config, vocab_size, print))
