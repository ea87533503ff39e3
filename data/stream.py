"""A corpus whose documents are tokenized while training, and stored nowhere (data.stream=true).

A window of `data.shuffle_window` documents is shuffled and packed while the next one is read. The documents to validate
on are the stream's first. Resuming reads an epoch from its start up to the cursor.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from conf.schema import DataConfig
from data.corpus import START, Cursor, Pack, numbered, validation_packs
from data.documents import ORDER, PACKS, Documents, all_dropped, check_size, generator, usable_documents
from data.encoders import batches
from data.packing import PiecePack, pack_documents, window_packs
from data.read_ahead import read_ahead
from data.source import BadRow, CorpusError, open_source
from data.store import TokenStore, open_validation_stores
from data.tokenizer import Tokenizer, open_tokenizer, tokenizer_problem

_BATCH_ROWS = 1024  # that wait for each other: the first packs should not wait for many
Tokens = np.ndarray
StoredPack = tuple[PiecePack, Sequence[TokenStore]]


class StreamCorpus:
    """Packs of a stream of documents, with the methods of `Corpus`.

    Args:
        restart: gives the stream from its start, an epoch: each row's tokens, of which an empty document has none, or
            a row that is skipped. Called once an epoch, at its first pack; validation and the first epoch after it
            share a stream.
        validation_store: documents to validate on; None: the stream's first.

    Attributes:
        counts: of the rows read so far, each once however many epochs read it: `documents` that are used, rows that
            were `skipped`, `empty` ones, and those `dropped` as too long.
    """

    def __init__(
        self,
        restart: Callable[[], Iterable[Tokens | BadRow]],
        config: DataConfig,
        name: str = "hub",
        validation_store: TokenStore | None = None,
    ) -> None:
        self.names, self.weights = (name,), (1.0,)
        self.config, self.counts = config, Counter[str]()
        self._restart, self._own = restart, validation_store
        self._started: tuple[list[Tokens], Iterator[Tokens]] | None = None  # held out, and the stream after that
        self._validation: list[Pack] | None = None

    def training(self, cursor: Cursor = START) -> Iterator[Pack]:
        """Endless packs, from the cursor on. Raises CorpusError where the stream cannot be read."""
        skip = cursor.pack
        for epoch in itertools.count(cursor.epoch):
            _, documents = self._started or self._start()
            self._started = None
            packs = itertools.islice(self._packs(documents, epoch), skip, None)
            yield from numbered(packs, epoch, skip, self.config.sequence_length)
            skip = 0

    def validation(self) -> dict[str, list[Pack]]:
        """The packs to validate on. Raises CorpusError if the stream has not enough documents for them."""
        if self._validation is None:
            if self._own is not None:
                documents, store, num = usable_documents(self._own, 0, self.config), self._own, None
            else:
                self._started = self._start()
                documents, store = _stored(self._started[0])
                num = self.config.validation_sequences
            self._validation = validation_packs(documents, store, self.config, num)
        return {self.names[0]: self._validation}

    def _start(self) -> tuple[list[Tokens], Iterator[Tokens]]:
        """The documents held out, and the stream of the others, which has a sequence or more."""
        length = self.config.sequence_length
        num_held_out = 0 if self._own is not None else self.config.validation_sequences
        stream, head, found = self._usable(), [], 0
        for document in stream:
            head.append(document)
            found += len(document)
            if found >= (num_held_out + 1) * length:
                break
        check_size(found, self.config, self.names[0], num_held_out)
        held_out, needed = [], num_held_out * length
        while needed > 0:
            document = head.pop(0)
            if len(document) > max(needed, length):
                document, rest = document[:needed], document[needed:]
                head.insert(0, rest)
            held_out.append(document)
            needed -= len(document)
        return held_out, itertools.chain(head, stream)

    def _usable(self) -> Iterator[Tokens]:
        """All documents but empty ones, and those that data.long_documents=drop drops. Counts all rows."""
        shortest, has_any = None, False
        for number, row in enumerate(self._restart(), 1):
            kind = self._kind(row)
            if number > self.counts.total():  # else an epoch before has counted it
                self.counts[kind] += 1
            if isinstance(row, BadRow):
                continue
            if kind == "documents":
                has_any = True
                yield row
            elif kind == "dropped":
                shortest = min(shortest or len(row), len(row))
        if shortest is not None and not has_any:
            raise all_dropped(self.names[0], shortest, self.config)

    def _kind(self, row: Tokens | BadRow) -> str:
        """What `counts` counts a row as."""
        if isinstance(row, BadRow):
            return "skipped"
        if not len(row):
            return "empty"
        is_dropped = self.config.long_documents == "drop" and len(row) > self.config.sequence_length
        return "dropped" if is_dropped else "documents"

    def _packs(self, stream: Iterator[Tokens], epoch: int) -> Iterator[StoredPack]:
        """All packs of an epoch."""
        seed, left_over = self.config.shuffle_seed, []
        # else ranks would wait for a whole window, perhaps for so long that they seem to hang
        ahead = read_ahead(stream, self.config.shuffle_window)
        for window in itertools.count():
            documents = list(itertools.islice(ahead, self.config.shuffle_window))
            order = generator(ORDER, seed, epoch, window).permutation(len(documents))
            documents, store = _stored([*left_over, *(documents[number] for number in order.tolist())])
            if self.config.packing != "concatenate":
                packs = window_packs(documents, self.config, (PACKS, seed, epoch, window))
            else:
                packs = pack_documents(documents, self.config.sequence_length, "concatenate")
                is_short = bool(packs) and sum(p.stop - p.start for p in packs[-1]) < self.config.sequence_length
                last = packs.pop() if is_short and len(order) else ()  # the next window's documents fill it
                left_over = [store.tokens[piece.start : piece.stop] for piece in last]
            yield from ((pieces, (store,)) for pieces in packs)
            if not len(order):
                return


def _stored(documents: list[Tokens]) -> tuple[Documents, TokenStore]:
    """Documents in memory."""
    stops = np.cumsum([len(document) for document in documents], dtype=np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *documents])
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int64)[: len(stops)]
    return Documents(np.zeros_like(stops), starts, stops), TokenStore("stream", tokens, stops)


def open_stream(config: DataConfig, vocab_size: int | None = None) -> StreamCorpus:
    """The configured stream. Opens its tokenizer, and its documents only when packs are asked for.

    Raises:
        CorpusError: if the tokenizer cannot be opened, or the model lacks one of its tokens.
    """
    validation_store = open_validation_stores(config, vocab_size, print).get(config.source)
    tokenizer = open_tokenizer(config)
    if vocab_size is not None and (problem := tokenizer_problem(tokenizer, vocab_size)):
        raise CorpusError(problem)
    return StreamCorpus(lambda: _documents(config, tokenizer, vocab_size), config, config.source, validation_store)


def _documents(config: DataConfig, tokenizer: Tokenizer, vocab_size: int | None) -> Iterator[Tokens | BadRow]:
    """Each row's tokens, which the model has. Raises CorpusError for a bad row, unless they are skipped."""
    source = open_source(config)
    for rows in batches(source.rows(), tokenizer.batch_characters, _BATCH_ROWS):
        texts = []
        for row in rows:
            if isinstance(row.content, str):
                texts.append(row.content)
            elif isinstance(row.content, BadRow):
                if config.bad_rows == "stop":
                    raise CorpusError(f"{source.where(row.file, row.number)}: {row.content.problem}")
                yield row.content
        for tokens in tokenizer.encode(texts) if texts else ():
            if vocab_size is not None and tokens.max() >= vocab_size:
                raise CorpusError(
                    f"a document has token {tokens.max()} of data.tokenizer={config.tokenizer}, but the model has "
                    f"{vocab_size}: take the text of that added token out of the documents"
                )
            yield tokens if len(tokens) > 1 else tokens[:0]  # more than the separator
