"""Which documents train, which validate, and in which order: pure integers."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np

from conf.schema import DataConfig
from data.source import CorpusError
from data.store import TokenStore

# the first number of a key of random numbers: what they are for
HELD_OUT, ORDER, MIXTURE, PACKS, VALIDATION_PACKS = range(5)


class Documents(NamedTuple):
    """N documents in an order; all int64 [N]. Document d is the tokens [starts[d], stops[d]) of source sources[d]."""

    sources: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    def take(self, index: slice | np.ndarray) -> Documents:
        """Those of a slice, a mask or an order."""
        return Documents(self.sources[index], self.starts[index], self.stops[index])

    @staticmethod
    def joined(parts: list[Documents]) -> Documents:
        return Documents(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([number % 2**64 for number in key])))


def usable_documents(store: TokenStore, source: int, config: DataConfig) -> Documents:
    """A store's documents in their order, without empty ones and those that data.long_documents=drop drops.

    Raises:
        CorpusError: if all are dropped.
    """
    stops = np.asarray(store.ends, np.int64)
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)
    documents = Documents(np.full(len(stops), source), starts[: len(stops)], stops)
    usable = documents.lengths > 0
    if config.long_documents == "drop":
        is_short = documents.lengths <= config.sequence_length
        if usable.any() and not (usable & is_short).any():
            raise all_dropped(store.name, int(documents.lengths[usable].min()), config)
        usable &= is_short
    return documents if usable.all() else documents.take(usable)


def all_dropped(name: str, shortest: int, config: DataConfig) -> CorpusError:
    return CorpusError(
        f"data.long_documents=drop drops every document of {name}: the shortest has {shortest:,} tokens, more than "
        f"data.sequence_length={config.sequence_length}: type data.long_documents=split, or a longer sequence"
    )


def check_size(found: int, config: DataConfig, name: str, validation_sequences: int) -> None:
    """Raises CorpusError unless `found` tokens are enough to hold out, and for a sequence more."""
    length = config.sequence_length
    if found >= (needed := (validation_sequences + 1) * length):
        return
    remedies = ["give more text"]
    if shorter := found // (validation_sequences + 1):
        remedies.append(f"type data.sequence_length={shorter} or less")
    if validation_sequences and found >= 2 * length:
        remedies.append(f"type data.validation_sequences={found // length - 1} or less")
    held_out = f"{validation_sequences} validation sequences and one to train on need" if validation_sequences else None
    raise CorpusError(
        f"{name} has {found:,} tokens, but {held_out or 'a sequence needs'} {needed:,} at "
        f"data.sequence_length={length}: {', or '.join(remedies)}"
    )


def hold_out(documents: Documents, config: DataConfig) -> tuple[Documents, Documents]:
    """The documents to validate on, and the others: of a seeded order the shortest start with enough tokens.

    The last one held out is split if it is longer than a sequence: its rest trains.
    """
    order = generator(HELD_OUT, config.shuffle_seed).permutation(documents.num_documents)
    needed = config.validation_sequences * config.sequence_length
    ends = np.cumsum(documents.lengths[order])
    last = int(np.searchsorted(ends, needed))
    held_out = documents.take(order[: last + 1])
    trains = np.ones(documents.num_documents, bool)
    trains[order[: last + 1]] = False
    rest = int(ends[last]) - needed
    if rest and held_out.lengths[-1] > config.sequence_length:
        held_out.stops[-1] -= rest
        starts = documents.starts.copy()
        starts[order[last]] = held_out.stops[-1]
        trains[order[last]] = True
        documents = documents._replace(starts=starts)
    return held_out, documents.take(trains)


class EndlessSource:
    """A source's documents again and again, each time in a new order.

    Where an epoch of a mixture begins in it depends on the epoch's number alone.
    """

    def __init__(self, documents: Documents, seed: int, source: int, weight: float = 1.0) -> None:
        self.documents, self.weight = documents, Fraction(weight)  # its share of the tokens
        self.num_tokens = int(documents.lengths.sum())
        self._key = (ORDER, seed, source)

    def epoch(self, epoch: int, tokens_per_epoch: int) -> Documents:
        """Its next documents, until its weight's share of all tokens up to the epoch's end is reached."""
        own_epoch, first = self._position(int(self.weight * tokens_per_epoch * epoch))
        last_epoch, last = self._position(int(self.weight * tokens_per_epoch * (epoch + 1)))
        parts = [self.documents.take(slice(0))]
        while own_epoch < last_epoch:
            parts.append(self._ordered(own_epoch).take(slice(first, None)))
            own_epoch, first = own_epoch + 1, 0
        if first < last:
            parts.append(self._ordered(own_epoch).take(slice(first, last)))
        return parts[1] if len(parts) == 2 else Documents.joined(parts)

    def _ordered(self, own_epoch: int) -> Documents:
        return self.documents.take(generator(*self._key, own_epoch).permutation(self.documents.num_documents))

    def _position(self, num_tokens: int) -> tuple[int, int]:
        """Its own epoch, and how many documents of that, after the fewest documents with `num_tokens` together."""
        if not num_tokens:
            return 0, 0
        own_epoch, rest = divmod(num_tokens - 1, self.num_tokens)
        if rest + 1 == self.num_tokens:
            return own_epoch + 1, 0
        num_documents = 1 + int(np.searchsorted(np.cumsum(self._ordered(own_epoch).lengths), rest + 1))
        return (own_epoch + 1, 0) if num_documents == self.documents.num_documents else (own_epoch, num_documents)
