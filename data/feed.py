"""The steps of a run on this rank, made in a thread while the steps before them run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from data.corpus import Corpus, Cursor, Pack
from data.read_ahead import read_ahead
from data.shard import Sharder, Step, TokenBatch
from data.source import CorpusError

NUM_AHEAD = 2  # steps


class Feed:
    """What a recipe trains and validates on.

    Args:
        sharder: of this rank.
    """

    def __init__(self, corpus: Corpus, sharder: Sharder, accumulation_steps: int) -> None:
        self._corpus, self._sharder, self._accumulation_steps = corpus, sharder, accumulation_steps

    def steps(
        self, accumulation_steps: int | None = None, last: tuple[int, int] | None = None, sha256: str = ""
    ) -> Iterator[Step]:
        """Endless.

        Args:
            accumulation_steps: micro-batches of a step; None: those of the run.
            last: epoch and number of the last sequence that was read; None: start with the first.
            sha256: of that sequence.

        Raises:
            CorpusError: from `next`, if that sequence is another one.
        """
        packs = packs_after(self._corpus, last, sha256)
        return read_ahead(self._sharder.steps(packs, accumulation_steps or self._accumulation_steps), NUM_AHEAD)

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the validation loss of each source in that of all; their sum is 1."""
        return self._corpus.validation_weights

    def validation(self) -> Mapping[str, Iterator[TokenBatch]]:
        """By the name of the source."""
        return {name: self._sharder.validation(packs) for name, packs in self._corpus.validation().items()}


def packs_after(corpus: Corpus, last: tuple[int, int] | None, sha256: str) -> Iterator[Pack]:
    """As `Feed.steps` takes them."""
    packs = corpus.training(Cursor(*last) if last else Cursor(0, 0))
    if last and next(packs).sha256() != sha256:
        raise CorpusError(
            f"the corpus has changed since the checkpoint: sequence {last[1]:,} of epoch {last[0]} is another one; use "
            "the same documents, or another hydra.run.dir"
        )
    yield from packs
