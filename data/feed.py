"""The steps of a run on this rank, made in a thread while the steps before them run."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING

from data.corpus import Corpus, Cursor, LastRead, Pack
from data.read_ahead import read_ahead
from data.shard import Sharder, Step, TokenBatch
from data.source import CorpusError

if TYPE_CHECKING:
    from data.shared_stream import SharedStream

    AnyCorpus = Corpus | SharedStream

NUM_AHEAD = 2  # steps


class Feed:
    """What a recipe trains and validates on.

    Args:
        sharder: of this rank.
    """

    def __init__(self, corpus: AnyCorpus, sharder: Sharder, accumulation_steps: int) -> None:
        self._corpus, self._sharder, self._accumulation_steps = corpus, sharder, accumulation_steps

    def steps(self, accumulation_steps: int | None = None, last_read: LastRead | None = None) -> Generator[Step]:
        """Endless. Close it where it is no longer needed: ranks that share a stream wait for each other.

        Args:
            accumulation_steps: micro-batches of a step; None: those of the run.
            last_read: None: start with the first sequence.

        Raises:
            CorpusError: from `next`, if the last sequence read is not the one in the corpus.
        """
        packs = packs_after(self._corpus, last_read)
        return read_ahead(self._sharder.steps(packs, accumulation_steps or self._accumulation_steps), NUM_AHEAD)

    @property
    def weights(self) -> Mapping[str, float]:
        """Each source's share of the tokens; their sum is 1."""
        return dict(zip(self._corpus.names, self._corpus.weights, strict=True))

    def validation(self) -> Mapping[str, Iterator[TokenBatch]]:
        """By the name of the source."""
        return {name: self._sharder.validation(packs) for name, packs in self._corpus.validation().items()}


def packs_after(corpus: AnyCorpus, last_read: LastRead | None) -> Iterator[Pack]:
    """As `Feed.steps` takes them."""
    if last_read is None:
        yield from corpus.training()
        return
    epoch, number, sha256 = last_read
    packs = corpus.training(Cursor(epoch, number))
    if next(packs).sha256() != sha256:
        raise CorpusError(
            f"the corpus has changed since the checkpoint: sequence {number:,} of epoch {epoch} is another one; use "
            "the same documents, or another hydra.run.dir"
        )
    yield from packs
