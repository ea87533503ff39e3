"""The rows of a source as documents of tokens, in batches: texts, chats, and tokens that are there already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from conf.schema import DataConfig
from data.chat import ChatEncoder, unknown_roles
from data.source import (
    BadRow,
    Conversation,
    CorpusError,
    MegatronFile,
    Position,
    Row,
    Source,
    files_setting,
    open_source,
)
from data.tokenizer import Tokenizer, open_tokenizer

_BATCH_ROWS = 8192
_MEGATRON_BATCH = 2**22  # tokens


class Encoded(NamedTuple):
    """Some documents."""

    tokens: np.ndarray  # [t]
    lengths: np.ndarray  # [n]
    trained: np.ndarray | None  # [t]
    problems: list[str]  # of rows left out
    num_empty: int
    following: Position
    bytes_read: int
    unknown_roles: tuple[str, ...] = ()  # of chats, each once a row


class TextEncoder:
    """Texts to tokens."""

    has_mask = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.dtype = np.dtype(tokenizer.dtype)

    def fingerprint(self) -> str:
        return self._tokenizer.fingerprint()

    def encoded(self, source: Source, start: Position) -> Iterator[Encoded]:
        for rows in batches(source.rows(start), self._tokenizer.batch_characters, _BATCH_ROWS):
            texts, problems = [], []
            for row in rows:
                if isinstance(row.content, BadRow):
                    problems.append(_problem(source, row, row.content))
                else:
                    texts.append(row.content)
            documents = self._tokenizer.encode(texts) if texts else []
            full = [document for document in documents if len(document) > 1]  # more than the separator
            yield Encoded(
                np.concatenate([*full, np.zeros(0, self.dtype)]),
                np.array([len(document) for document in full], np.int64),
                None,
                problems,
                len(documents) - len(full),
                rows[-1].following,
                rows[-1].bytes_read,
            )


class ConversationEncoder:
    """Conversations to tokens and what is trained."""

    has_mask = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._chats = tokenizer, ChatEncoder(tokenizer)
        self.dtype = np.dtype(tokenizer.dtype)

    def fingerprint(self) -> str:
        return f"{self._tokenizer.fingerprint()} {self._chats.fingerprint()}"

    def encoded(self, source: Source, start: Position) -> Iterator[Encoded]:
        for rows in batches(source.rows(start), self._tokenizer.batch_characters // 4, _BATCH_ROWS):
            chats = iter(self._chats.encode([row.content for row in rows if isinstance(row.content, Conversation)]))
            documents, problems, roles = [], [], []
            for row in rows:
                chat = next(chats) if isinstance(row.content, Conversation) else row.content
                if isinstance(chat, BadRow):
                    problems.append(_problem(source, row, chat))
                elif isinstance(row.content, Conversation):
                    documents.append(chat)
                    roles += sorted(unknown_roles(row.content))
            yield Encoded(
                np.concatenate([*(document.tokens for document in documents), np.zeros(0, self.dtype)]),
                np.array([len(document.tokens) for document in documents], np.int64),
                np.concatenate([*(document.trained for document in documents), np.zeros(0, bool)]),
                problems,
                0,
                rows[-1].following,
                rows[-1].bytes_read,
                tuple(roles),
            )


class MegatronEncoder:
    """Tokens that are there already."""

    has_mask = False

    def __init__(self, source: Source) -> None:
        files = [MegatronFile(name, files_setting(source.config)) for name in source.files]
        is_small = all(file.tokens.dtype in (np.uint8, np.uint16) for file in files)
        self.dtype = np.dtype(np.uint16 if is_small else np.int32)

    def fingerprint(self) -> str:
        return "megatron"

    def encoded(self, source: Source, start: Position) -> Iterator[Encoded]:
        num_bytes = 0
        for index, name in enumerate(source.files):
            if index < start.file:
                num_bytes += os.path.getsize(name)
                continue
            file, size = MegatronFile(name), os.path.getsize(name)
            first = start.rows if index == start.file else 0
            while first < len(file.ends):
                begin = int(file.ends[first - 1]) if first else 0
                stop = max(first + 1, int(np.searchsorted(file.ends, begin + _MEGATRON_BATCH, "right")))
                end = int(file.ends[stop - 1])
                tokens, lengths = file.tokens[begin:end], np.diff(file.ends[first:stop], prepend=begin)
                if len(tokens) and (tokens.min() < 0 or tokens.max() >= 2**31):
                    raise CorpusError(
                        f"{name}: documents {first + 1:,} to {stop:,} have tokens from {tokens.min()} to "
                        f"{tokens.max()}, but tokens are from 0 to 2**31 - 1: write the file again"
                    )
                full, first = lengths[lengths > 0], stop
                num_read = num_bytes + size * end // max(1, int(file.ends[-1]))
                num_empty, following = len(lengths) - len(full), Position(index, stop)
                yield Encoded(tokens.astype(self.dtype), full, None, [], num_empty, following, num_read)
            num_bytes += size


Encoder = TextEncoder | ConversationEncoder | MegatronEncoder


def open_encoder(config: DataConfig) -> Encoder:
    if config.source == "megatron":
        return MegatronEncoder(open_source(config))
    tokenizer = open_tokenizer(config)
    return ConversationEncoder(tokenizer) if config.source == "chat" else TextEncoder(tokenizer)


def _problem(source: Source, row: Row, bad: BadRow) -> str:
    advice = "" if "data.bad_rows=skip" in bad.problem else ": leave out such rows with data.bad_rows=skip"
    return f"{source.where(row.file, row.number)}: {bad.problem}{advice}"


def batches(rows: Iterator[Row], num_characters: int, num_rows: int) -> Iterator[list[Row]]:
    """Rows of together `num_characters` or more, or so many rows."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row.content) if isinstance(row.content, str) else 1000
        if size >= num_characters or len(batch) == num_rows:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
