"""Documents to byte tokens to sequences of L+1, deterministic and resumable by one number: the global token cursor.

The corpus is one endless run of tokens: each document's UTF-8 bytes, then a separator, and again from the start after
the last. Its first `validation_sequences` sequences are held out in every round. A sequence holds L+1 tokens, so that
each of its first L has a successor to predict; sequences do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from conf.schema import DataConfig
from data.source import CorpusError, open_documents

SEPARATOR = 256  # the token after each document; bytes are 0..255
Tokens = np.ndarray


def tokenize(text: str) -> Tokens:
    """UTF-8 bytes and the separator, int16."""
    return np.append(np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int16), np.int16(SEPARATOR))


class Corpus:
    """Sequences of `sequence_length` + 1 tokens from documents that can be iterated again and again.

    Training tokens are numbered from 0 without end; number 0 is the first after the held-out ones.
    """

    def __init__(self, documents: Iterable[str], sequence_length: int, validation_sequences: int) -> None:
        self._documents = documents
        self.sequence_tokens = sequence_length + 1  # that a sequence takes of the corpus
        self._validation_sequences = validation_sequences
        self._held_out_tokens = validation_sequences * self.sequence_tokens

    def check(self) -> None:
        """Raises CorpusError unless there are tokens for validation and for one training sequence."""
        needed, found = self._held_out_tokens + self.sequence_tokens, 0
        for document in self._documents:
            found += len(tokenize(document))
            if found >= needed:
                return
        raise CorpusError(
            f"the corpus has {found} tokens, but {self._validation_sequences} validation sequences and one to train on "
            f"need {needed}: give more text, or a smaller data.sequence_length or data.validation_sequences"
        )

    def validation(self) -> Iterator[Tokens]:
        """The held-out sequences, [L+1] each."""
        head = self._cut(self._round(0))
        return (next(head) for _ in range(self._validation_sequences))

    def training(self, cursor: int) -> Iterator[Tokens]:
        """Endless training sequences, [L+1] each, the first of which starts at training token number `cursor`."""
        return self._cut(self._training_tokens(cursor))

    def _round(self, skip: int) -> Iterator[Tokens]:
        """The corpus once, in pieces, without its first `skip` tokens."""
        for document in self._documents:
            tokens = tokenize(document)
            if skip < len(tokens):
                yield tokens[skip:]
            skip = max(0, skip - len(tokens))

    def _training_tokens(self, cursor: int) -> Iterator[Tokens]:
        round_tokens = 0
        for tokens in self._round(self._held_out_tokens):
            round_tokens += len(tokens)
            if round_tokens > cursor:
                yield tokens[max(0, len(tokens) - (round_tokens - cursor)) :]
        # the length of a round is known now, so whole rounds of a large cursor are skipped by arithmetic
        skip = cursor % round_tokens if cursor >= round_tokens else 0
        while True:
            yield from self._round(self._held_out_tokens + skip)
            skip = 0

    def _cut(self, pieces: Iterator[Tokens]) -> Iterator[Tokens]:
        parts, num_tokens = [], 0
        for piece in pieces:
            parts.append(piece)
            num_tokens += len(piece)
            if num_tokens >= self.sequence_tokens:
                joined = np.concatenate(parts)
                num_whole = num_tokens // self.sequence_tokens * self.sequence_tokens
                yield from joined[:num_whole].reshape(-1, self.sequence_tokens)
                parts, num_tokens = [joined[num_whole:]], num_tokens - num_whole


def open_corpus(config: DataConfig) -> Corpus:
    """The configured one.

    Raises:
        CorpusError: if there is nothing to open.
    """
    return Corpus(open_documents(config), config.sequence_length, config.validation_sequences)
