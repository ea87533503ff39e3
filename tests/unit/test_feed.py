"""A run's data goes on after the last sequence read, and another corpus is noticed."""

from __future__ import annotations

import itertools

import pytest
import torch

from data.corpus import Corpus, LastRead, Pack
from data.feed import Feed, packs_after
from data.shard import IGNORED_LABEL, Sharder, TokenBatch
from data.source import CorpusError
from ring_attention.layout import Layout
from tests.corpora import byte_corpus
from tests.errors import refused

LENGTH = 13


def corpus(*documents: str) -> Corpus:
    return byte_corpus([*documents], LENGTH, packing="best_fit")


def take(packs, number: int) -> list[Pack]:
    return [*itertools.islice(packs, number)]


def test_data_goes_on_after_the_last_sequence_and_another_corpus_is_refused():
    packs = take(packs_after(corpus("a" * 60, "b" * 60), None), 25)
    last_read = LastRead(*packs[4].position, packs[4].sha256())
    again = take(packs_after(corpus("a" * 60, "b" * 60), last_read), 20)
    assert [pack.sha256() for pack in again] == [pack.sha256() for pack in packs[5:]]  # round the corpus's end
    with refused(CorpusError, "corpus", "sequence 4", "epoch 0"):
        next(packs_after(corpus("a" * 60, "c" * 60), last_read))


def test_a_balanced_layout_follows_each_sequence_and_ranks_together_hold_it_once():
    texts, degree = corpus("ring attention", "in", "DeepSpeed", "a" * 60, "b" * 7), 3
    layout = Layout("balanced", degree, LENGTH)
    feeds = [Feed(texts, Sharder(layout, rank, 0, 1, 1), 1).steps() for rank in range(degree)]
    for pack, *steps in itertools.islice(zip(texts.training(), *feeds, strict=False), 10):
        own = Layout("balanced", degree, LENGTH, documents=pack.boundaries)
        shards = [step.micro_batches[0] for step in steps]
        tokens, labels = pack.read(0, LENGTH)
        assert own.unshard([shard.tokens_BS[0] for shard in shards], 0).tolist() == tokens.tolist()
        assert own.unshard([shard.labels_BS[0] for shard in shards], 0).tolist() == labels.tolist()
        assert {shard.documents for shard in shards} == {(pack.boundaries,)}


@pytest.mark.parametrize("ulysses_degree", [1, 2])
@pytest.mark.parametrize(("name", "ring_degree"), [("zigzag", 1), ("zigzag", 2), ("zigzag", 3), ("contiguous", 2)])
def test_ranks_together_hold_every_sequence_once(name: str, ring_degree: int, ulysses_degree: int):
    layout = Layout(name, ring_degree, LENGTH, ulysses_degree)
    texts = corpus("ring attention", "in", "DeepSpeed", "a" * 60, "b" * 7)
    data_degree, micro_batch_size, accumulation_steps = 2, 2, 2
    step_of = {
        (data_rank, rank): next(
            Feed(texts, Sharder(layout, rank, data_rank, data_degree, micro_batch_size), accumulation_steps).steps()
        )
        for data_rank in range(data_degree)
        for rank in range(ring_degree * ulysses_degree)
    }
    packs = take(texts.training(), 8)
    assert all(step.last.position == packs[-1].position for step in step_of.values())
    for number, pack in enumerate(packs):
        micro_batch, data_rank, row = number // 4, number // 2 % 2, number % 2
        shards = [step_of[data_rank, rank].micro_batches[micro_batch] for rank in range(ring_degree * ulysses_degree)]

        def whole(part: str, shards: list[TokenBatch] = shards, row: int = row) -> list[int]:
            return layout.unshard([getattr(shard, part)[row] for shard in shards], 0).tolist()

        tokens, labels = (part.tolist() for part in pack.read(0, LENGTH))
        assert (whole("tokens_BS"), whole("labels_BS")) == (tokens, labels)
        starts = [max(start for start in pack.boundaries if start <= n) for n in range(LENGTH)]
        assert whole("positions_BS") == [n - start for n, start in enumerate(starts)]
        assert {shard.documents[row] for shard in shards if shard.documents} == {pack.boundaries}
    lengths = [
        sorted(stop - start for pack in packs[n:][:4] for start, stop in itertools.pairwise(pack.boundaries))
        for n in (0, 4)
    ]
    assert all([sorted(batch.lengths) for batch in step.micro_batches] == lengths for step in step_of.values())


def test_without_masks_a_sequence_is_one_document():
    sharder = Sharder(Layout("zigzag", 2, LENGTH), 1, 0, 1, 1, document_mask=False)
    batch = next(Feed(corpus("abc", "def", "a" * 60), sharder, 1).steps()).micro_batches[0]
    assert batch.documents is None
    assert torch.equal(batch.positions_BS, sharder.layout.positions(1)[None])
    assert len(batch.lengths) == 1


def test_where_validation_runs_out_a_rank_has_no_labels():
    texts = byte_corpus(["a" * 200], LENGTH, validation_sequences=3)
    batches = [
        [*Feed(texts, Sharder(Layout("zigzag", 1, LENGTH), 0, rank, 2, 1), 1).validation()["texts"]] for rank in (0, 1)
    ]
    assert [len(of_rank) for of_rank in batches] == [2, 2]
    assert all(of_rank[0].num_valid() == LENGTH for of_rank in batches)
    assert batches[0][1].num_valid() == LENGTH - 1  # the next token trains
    assert (batches[1][1].labels_BS == IGNORED_LABEL).all()
