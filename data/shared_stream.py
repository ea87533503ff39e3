"""Packs that one rank of a sequence group reads from a stream, dealt out to the others.

Of each pack a rank gets the boundaries and the tokens and labels of its own positions. All ranks of the group must take
equally many packs, and each closes its iterator at the same point: the ranks agree before every pack that all go on.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data.corpus import START, Cursor, Pack
from data.source import CorpusError

if TYPE_CHECKING:
    from data.stream import StreamCorpus
    from ring_attention.layout import Layout

PACK, END, ERROR = 1, 2, 3  # what the reading rank announces
Spans = tuple[tuple[int, int], ...]


class SharedStream:
    """A StreamCorpus for the ranks that share a sequence, with the methods of `Corpus`.

    Every rank constructs it at the same point, because the packs to validate on are read and dealt out at once.

    Args:
        corpus: used on sequence rank 0 alone.
        group: of gloo, of these ranks, and used for nothing else: training packs may come in a thread.
        layout: which positions a rank holds; None: each rank gets whole packs.

    Raises:
        CorpusError: on all ranks, if the stream cannot be read or is too short.
    """

    def __init__(self, corpus: StreamCorpus, group: Any, sequence_rank: int, layout: Layout | None = None) -> None:
        self.names, self.weights, self.config = corpus.names, corpus.weights, corpus.config
        self.counts = corpus.counts  # on other sequence ranks than 0 nothing is read, nor counted
        self._corpus, self._arguments = corpus, (group, sequence_rank, layout)
        self._is_read = threading.Lock()  # by an iterator that was closed, whose thread has not noticed that yet
        read = (pack for name in self.names for pack in corpus.validation()[name])  # nothing is read here
        self._validation = list(shared_stream(read, *self._arguments))

    def training(self, cursor: Cursor = START) -> Iterator[Pack]:
        """Endless packs, from the cursor on. The first is read when the iterator before this one has ended."""
        with self._is_read:  # messages of two would mix
            yield from shared_stream(self._corpus.training(cursor), *self._arguments)

    def validation(self) -> dict[str, list[Pack]]:
        """The packs to validate on."""
        return {self.names[0]: self._validation}


@dataclass(frozen=True)
class PackPart(Pack):
    """A pack of which this rank has the tokens and labels of some positions."""

    spans: Spans = ()  # positions [start, stop), one after the other
    digest: str = ""
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False, compare=False)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32), repr=False, compare=False)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of positions [start, stop), which must be of this rank."""
        local = 0
        for first, last in self.spans:
            if first <= start <= stop <= last:
                there = slice(local + start - first, local + stop - first)
                return self.tokens[there].astype(np.int64), self.labels[there].astype(np.int64)
            local += last - first
        raise AssertionError(f"positions {start} to {stop} are not of this rank, which has {self.spans}")

    def sha256(self) -> str:
        return self.digest


def shared_stream(
    packs: Iterable[Pack], group: Any, sequence_rank: int, layout: Layout | None = None
) -> Generator[Pack]:
    """The packs that sequence rank 0 reads, on every rank of the group.

    Args:
        packs: iterated on sequence rank 0 alone.
        group: of gloo, of the ranks that share a sequence, and used for nothing else while this is.
        layout: which positions a rank holds; None: each rank gets whole packs.

    Raises:
        CorpusError: on all ranks, where reading raises an error.
    """
    if group.size() == 1:
        yield from packs
        return
    sequence_ranks = _summed(group, [sequence_rank if rank == group.rank() else 0 for rank in range(group.size())])
    reader, spans = sequence_ranks.index(0), _spans(layout)
    source = iter(packs)
    is_open = True  # the others wait for what this rank announces
    try:
        while True:
            pack, kind, message = _next(source) if sequence_rank == 0 else (None, 0, b"")
            is_closing, kind, size = _summed(group, [0, kind, len(message)])
            if is_closing:
                is_open = False
                return
            header = pickle.loads(_broadcast(group, reader, message, size))
            if kind != PACK:
                is_open = False
                if kind == ERROR:
                    raise CorpusError(header)
                return
            held = spans[sequence_rank] if spans else ((0, header["length"]),)
            if pack is not None:
                parts = [_part(pack, spans[rank] if spans else held) for rank in sequence_ranks]
                _deal(group, reader, parts, layout is not None, 0)
                yield pack
            else:
                num_tokens = sum(stop - start for start, stop in held)
                tokens, labels = _deal(group, reader, None, layout is not None, num_tokens)
                yield PackPart(**header, stores=(), spans=held, tokens=tokens, labels=labels)
    except GeneratorExit:
        if is_open:
            with contextlib.suppress(Exception):  # the others may be gone
                _summed(group, [1, 0, 0])
        raise


def _next(source: Iterator[Pack]) -> tuple[Pack | None, int, bytes]:
    """The next pack, what to announce, and its header or the error's text."""
    try:
        pack = next(source)
        header = {"pieces": pack.pieces, "length": pack.length, "digest": pack.sha256()}
        header |= {"position": pack.position, "cursor": pack.cursor}
    except StopIteration:
        return None, END, pickle.dumps(None)
    except Exception as error:
        is_told = isinstance(error, CorpusError)
        text = str(error) if is_told else f"the stream cannot be read ({type(error).__name__}: {error})"
        return None, ERROR, pickle.dumps(text)
    return pack, PACK, pickle.dumps(header)


def _spans(layout: Layout | None) -> list[Spans] | None:
    """The positions of each sequence rank, in its local order."""
    if layout is None:
        return None
    spans = []
    for rank in range(layout.ring_degree * layout.ulysses_degree):
        positions = layout.positions(rank).numpy()
        runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        spans.append(tuple((int(run[0]), int(run[-1]) + 1) for run in runs))
    return spans


def _part(pack: Pack, spans: Spans) -> np.ndarray:
    """Tokens and labels of positions, int32 [2, S]."""
    return np.concatenate([np.stack(pack.read(start, stop)) for start, stop in spans], axis=1).astype(np.int32)


def _summed(group: Any, numbers: list[int]) -> list[int]:
    """The sums over all ranks of the group."""
    import torch

    tensor = torch.tensor(numbers)
    group.allreduce(tensor).wait()
    return tensor.tolist()


def _broadcast(group: Any, reader: int, message: bytes, size: int) -> bytes:
    """The reader's message of `size` bytes."""
    import torch

    tensor = torch.empty(size, dtype=torch.uint8)
    if message:
        tensor.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
    group.broadcast(tensor, reader).wait()
    return tensor.numpy().tobytes()


def _deal(group: Any, reader: int, parts: list[np.ndarray] | None, is_cut: bool, num_tokens: int) -> np.ndarray:
    """This rank's part, int32 [2, S], of the reader's parts; uncut: all ranks have the first."""
    import torch

    tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts or ()]
    received = torch.empty_like(tensors[0]) if tensors else torch.empty(2, num_tokens, dtype=torch.int32)
    if is_cut:
        group.scatter(received, tensors, reader).wait()
    else:
        received = tensors[0] if tensors else received
        group.broadcast(received, reader).wait()
    return received.numpy()
