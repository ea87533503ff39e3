"""The steps of a run on this rank, made in a thread while the steps before them run."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from conf.stages import length_at, steps_by_length
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

    def steps(
        self, accumulation_steps: int | None = None, last_read: LastRead | None = None, first_step: int = 1
    ) -> Generator[Step]:
        """Endless. Close it where it is no longer needed: ranks that share a stream wait for each other.

        Args:
            accumulation_steps: micro-batches of a step; None: those of the run.
            last_read: in the step before; None: start with the first sequence.
            first_step: the number of the first step, which decides its stage.

        Raises:
            CorpusError: from `next`, if the last sequence read is not the one in the corpus.
        """
        steps = self._steps(accumulation_steps or self._accumulation_steps, last_read, first_step)
        return read_ahead(steps, NUM_AHEAD)

    def _steps(self, accumulation_steps: int, last_read: LastRead | None, first_step: int) -> Iterator[Step]:
        data = self._corpus.config
        length = length_at(data, first_step - 1 if last_read else first_step)
        packs, epoch = packs_after(self._of_length(length), last_read), last_read.epoch if last_read else 0
        for next_length, num_steps in steps_by_length(data, first_step):
            if next_length != length:  # a stage begins an epoch: packs of another length have other cursors
                length = next_length
                packs = self._of_length(length).training(Cursor(epoch + 1, 0))
            sharder = replace(self._sharder, layout=replace(self._sharder.layout, length=length))
            for step in itertools.islice(sharder.steps(packs, accumulation_steps), num_steps):
                epoch = step.last.position.epoch
                yield step

    def _of_length(self, sequence_length: int) -> AnyCorpus:
        if sequence_length == self._corpus.config.sequence_length:
            return self._corpus
        assert isinstance(self._corpus, Corpus)  # a stream has no stages
        return self._corpus.of_length(sequence_length)

    @property
    def weights(self) -> Mapping[str, float]:
        """Each source's share of the tokens; their sum is 1."""
        return dict(zip(self._corpus.names, self._corpus.weights, strict=True))

    def validation(self) -> Mapping[str, Iterator[TokenBatch]]:
        """By the name of the source."""
        return {name: self._sharder.validation(packs) for name, packs in self._corpus.validation().items()}


def packs_after(corpus: AnyCorpus, last_read: LastRead | None) -> Iterator[Pack]:
    """As `Feed.steps` takes them. Reads the last one again; raises CorpusError if it is another."""
    if last_read is None:
        return corpus.training()
    epoch, number, sha256 = last_read
    packs = corpus.training(Cursor(epoch, number))
    if next(packs).sha256() != sha256:
        has_labels_only = isinstance(corpus, Corpus) and corpus.says_what_is_trained
        also = " (older versions also trained on sequences in which nothing is trained)" if has_labels_only else ""
        raise CorpusError(
            f"the corpus has changed since the checkpoint: sequence {number:,} of epoch {epoch} is another one{also}; "
            "use the same documents, or another hydra.run.dir"
        )
    return packs
