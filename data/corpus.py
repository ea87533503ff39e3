"""The sequences of a run: packs of documents, a pure function of the token stores, the settings and a cursor.

A piece's n tokens are inputs, and its labels are the next tokens. So every token of a document is an input once per
epoch, and every token but its first is a label once. Each source holds out some documents for validation, or has a
store of its own for it. An epoch takes of every source its share of tokens, its weight; a source that comes to its end
begins again with its documents in a new order.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from conf.schema import DataConfig
from data.packing import Documents, PiecePack, generator, window_packs
from data.source import CorpusError
from data.store import TokenStore

LastRead = tuple[int, int, str]  # the last sequence that was read: its epoch, its number there, and its SHA-256
IGNORED_LABEL = -100  # torch's default ignore_index
# the first number of a key of random numbers: what they are for
HELD_OUT, ORDER, MIXTURE, PACKS, VALIDATION_PACKS = range(5)


class Cursor(NamedTuple):
    """Where training is: the number of the next pack of an epoch. It does not depend on the number of ranks."""

    epoch: int
    pack: int


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

    def num_pairs(self, masked: bool) -> int:
        """Pairs of a query and a key that it sees; masked: within its piece."""
        lengths = (stop - start for _, start, stop, _ in self.pieces) if masked else (self.num_tokens,)
        return sum(n * (n + 1) // 2 for n in lengths)

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


class Corpus:
    """Packs to train on, endlessly, and packs to validate on.

    Args:
        stores: the tokens of each source, by name.
        weights: each source's share of the tokens; None: there is one source.
        validation_stores: of sources that have documents of their own to validate on. The others hold some out.

    Raises:
        CorpusError: if there are not enough documents to validate on and for one sequence.
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
        self._stores = tuple(stores.values())
        weights = weights or dict.fromkeys(stores, 1.0)
        self.weights = tuple(weights[name] / sum(weights.values()) for name in stores)
        self._documents: list[Documents] = []  # of each source, to train on
        self._validation: dict[str, tuple[Documents, TokenStore]] = {}
        for source, (name, store) in enumerate(stores.items()):
            documents, own = usable_documents(store, source, config), (validation_stores or {}).get(name)
            check_size(documents, config, name, 0 if own else config.validation_sequences)
            if own:
                held_out = usable_documents(own, 0, config)
                check_size(held_out, config, name, 0)
            else:
                held_out, documents = hold_out(documents, config)
                held_out = held_out._replace(sources=held_out.sources * 0)
            self._validation[name] = held_out, own or store
            self._documents.append(documents)
        self.tokens_per_epoch = sum(int(documents.lengths.sum()) for documents in self._documents)

    def training(self, cursor: Cursor = Cursor(0, 0)) -> Iterator[Pack]:  # noqa: B008
        """Endless packs, from the cursor on."""
        skip = cursor.pack
        for epoch in itertools.count(cursor.epoch):
            key = (PACKS, self.config.shuffle_seed, epoch)
            packs = window_packs(self.epoch_documents(epoch), self.config, key, skip)
            yield from numbered(packs, epoch, skip, self.config.sequence_length, self._stores)
            skip = 0

    def validation(self) -> dict[str, list[Pack]]:
        """The packs to validate on, by source."""
        packs = {}
        for name, (documents, store) in self._validation.items():
            found = window_packs(documents, self.config, (VALIDATION_PACKS, self.config.shuffle_seed))
            if any(store is one for one in self._stores):  # held out
                found = itertools.islice(found, self.config.validation_sequences)
            packs[name] = list(numbered(found, 0, 0, self.config.sequence_length, (store,)))
        return packs

    def epoch_documents(self, epoch: int) -> Documents:
        """All documents of an epoch, in its order."""
        return self._documents[0][
            generator(ORDER, self.config.shuffle_seed, epoch).permutation(self._documents[0].count)
        ]


def numbered(
    packs: Iterator[PiecePack], epoch: int, first: int, length: int, stores: Sequence[TokenStore]
) -> Iterator[Pack]:
    """An epoch's packs from number `first` on, with their cursors: after the last comes the next epoch."""
    following, number = next(packs, None), first
    while (pieces := following) is not None:
        position = Cursor(epoch, number)
        following, number = next(packs, None), number + 1
        cursor = Cursor(epoch + 1, 0) if following is None else Cursor(epoch, number)
        yield Pack(pieces, length, position, cursor, stores)


def usable_documents(store: TokenStore, source: int, config: DataConfig) -> Documents:
    """A store's documents in their order, without empty ones and those that long_documents=drop drops."""
    stops = np.asarray(store.ends, np.int64)
    documents = Documents(np.full(len(stops), source), np.concatenate([[0], stops[:-1]]).astype(np.int64), stops)
    lengths = documents.lengths
    usable = lengths > 0
    if config.long_documents == "drop":
        usable &= lengths <= config.sequence_length
        if not usable.any() and len(stops):
            raise CorpusError(
                f"data.long_documents=drop drops every document of {store.name}: the shortest has {lengths.min():,} "
                f"tokens, more than data.sequence_length={config.sequence_length}: type data.long_documents=split"
            )
    return documents if usable.all() else documents[usable]


def check_size(documents: Documents, config: DataConfig, name: str, validation_sequences: int) -> None:
    """Raises CorpusError unless there is enough to hold out, and a sequence more."""
    found, needed = int(documents.lengths.sum()), (validation_sequences + 1) * config.sequence_length
    if found < needed:
        raise CorpusError(
            f"{name} has {found} tokens, but {validation_sequences} validation sequences and one to train on need "
            f"{needed}: give more text, or a smaller data.sequence_length or data.validation_sequences"
        )


def hold_out(documents: Documents, config: DataConfig) -> tuple[Documents, Documents]:
    """Documents to validate on, and the others: of a seeded order the shortest start with enough tokens.

    The last document held out is split if it is longer than a sequence: its rest trains.
    """
    order = generator(HELD_OUT, config.shuffle_seed).permutation(documents.count)
    needed = config.validation_sequences * config.sequence_length
    ends = np.cumsum(documents.lengths[order])
    last = int(np.searchsorted(ends, needed))
    held_out = documents[order[: last + 1]]
    is_training = np.ones(documents.count, bool)
    is_training[order[: last + 1]] = False
    rest = int(ends[last]) - needed
    if rest and held_out.lengths[-1] > config.sequence_length:
        held_out.stops[-1] -= rest
        starts = documents.starts.copy()
        starts[order[last]] = held_out.stops[-1]
        is_training[order[last]] = True
        documents = documents._replace(starts=starts)
    return held_out, documents[is_training]


def open_corpus(config: DataConfig, vocab_size: int | None = None, say: Callable[[str], None] = print) -> Corpus:
    """The configured corpus. Raises CorpusError if it cannot be opened.

    Args:
        vocab_size: of the model, which must know all tokens.
        say: told about tokenizing, which takes time.
    """
    from data.store import open_stores, open_validation_stores

    stores = open_stores(config, vocab_size, say)
    weights = {name: entry["weight"] for name, entry in config.sources.items()} if config.sources else None
    return Corpus(stores, config, weights, open_validation_stores(config, vocab_size, say))
