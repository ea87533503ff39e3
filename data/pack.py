"""Documents to tokens to sequences of L+1 tokens: deterministic, and resumable from one number, the token cursor.

The corpus is an endless stream of tokens: each document's tokens and a separator, repeated in every epoch. The first
`validation_sequences` sequences are held out from all epochs. A sequence has L+1 tokens, so that each of its first L
has a next token to predict. Sequences do not overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from conf.schema import DataConfig
from data.read_ahead import read_ahead
from data.source import CorpusError, open_documents
from data.tokenizer import BYTES, Tokenizer, Tokens, open_tokenizer, tokenizer_problem

NUM_AHEAD = 4  # sequences that are read while a step runs


class Corpus:
    """Sequences of `sequence_length` + 1 tokens.

    Training tokens are numbered from 0 without end; number 0 is the first after the held-out ones.

    Args:
        documents: can be iterated again and again, with the same result.
    """

    def __init__(
        self,
        documents: Iterable[str],
        sequence_length: int,
        validation_sequences: int,
        tokenizer: Tokenizer = BYTES,
        vocab_size: int | None = None,
    ) -> None:
        self._documents, self._tokenizer, self._vocab_size = documents, tokenizer, vocab_size
        self.sequence_tokens = sequence_length + 1
        self._validation_sequences = validation_sequences
        self._held_out_tokens = validation_sequences * self.sequence_tokens

    def check(self) -> None:
        """Raises CorpusError unless the model knows all tokens, and there are enough to validate and for a sequence."""
        if self._vocab_size is not None and (problem := tokenizer_problem(self._tokenizer, self._vocab_size)):
            raise CorpusError(problem)
        needed, found = self._held_out_tokens + self.sequence_tokens, 0
        for tokens in self._epoch(0):
            found += len(tokens)
            if found >= needed:
                return
        raise CorpusError(
            f"the corpus has {found} tokens, but {self._validation_sequences} validation sequences and one to train on "
            f"need {needed}: give more text, or a smaller data.sequence_length or data.validation_sequences"
        )

    def validation(self) -> Iterator[Tokens]:
        """The held-out sequences, [L+1] each."""
        return itertools.islice(self._sequences(self._epoch(0)), self._validation_sequences)

    def training(self, cursor: int) -> Iterator[Tokens]:
        """Endless training sequences, [L+1] each; the first starts at training token number `cursor`.

        A thread reads the next ones while a step runs.
        """
        return read_ahead(self._sequences(self._training_tokens(cursor)), NUM_AHEAD)

    def _epoch(self, skip: int) -> Iterator[Tokens]:
        """All tokens once, document by document, without the first `skip`."""
        for texts in _batches(self._documents, self._tokenizer.batch_characters):
            for tokens in self._tokenizer.encode(texts):
                if self._vocab_size is not None and tokens.max() >= self._vocab_size:  # else one rank's lookup fails
                    raise CorpusError(
                        f"a document has token {tokens.max()} of data.tokenizer={self._tokenizer.name}, but the model "
                        f"has {self._vocab_size}: take the text of that added token out of the documents"
                    )
                if skip < len(tokens):
                    yield tokens[skip:]
                skip = max(0, skip - len(tokens))

    def _training_tokens(self, cursor: int) -> Iterator[Tokens]:
        epoch_tokens = 0
        for tokens in self._epoch(self._held_out_tokens):
            epoch_tokens += len(tokens)
            if epoch_tokens > cursor:
                yield tokens[max(0, len(tokens) - (epoch_tokens - cursor)) :]
        # the length of an epoch is known now, so a large cursor skips whole epochs without reading them
        skip = cursor % epoch_tokens if cursor >= epoch_tokens else 0
        while True:
            yield from self._epoch(self._held_out_tokens + skip)
            skip = 0

    def _sequences(self, pieces: Iterator[Tokens]) -> Iterator[Tokens]:
        parts, num_tokens = [], 0
        for piece in pieces:
            parts.append(piece)
            num_tokens += len(piece)
            if num_tokens >= self.sequence_tokens:
                joined = np.concatenate(parts)
                end = num_tokens // self.sequence_tokens * self.sequence_tokens
                yield from joined[:end].reshape(-1, self.sequence_tokens)
                parts, num_tokens = [joined[end:]], num_tokens - end


def _batches(documents: Iterable[str], num_characters: int) -> Iterator[list[str]]:
    """Documents of together `num_characters` or more."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= num_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def open_corpus(config: DataConfig, vocab_size: int | None = None) -> Corpus:
    """The configured corpus. Raises CorpusError if it cannot be opened.

    Args:
        vocab_size: of the model. Reading a document with a token that it lacks raises CorpusError, on every rank.
    """
    documents, tokenizer = open_documents(config), open_tokenizer(config)
    return Corpus(documents, config.sequence_length, config.validation_sequences, tokenizer, vocab_size)
