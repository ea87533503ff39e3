"""Packing and dealing out: on literal documents, without ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from conf.schema import Config, DataConfig, EngineConfig, ParallelismConfig
from data.batch import IGNORED_LABEL
from data.pack import SEPARATOR, Corpus, tokenize
from data.shard import Sharder
from data.source import CorpusError
from recipes.planning.plan import Plan
from ring_attention import Layout

DOCUMENTS = ["abc", "", "defgh", "ij"]  # 3+1, 0+1, 5+1, 2+1 = 14 tokens a round
ROUND = [*b"abc", SEPARATOR, SEPARATOR, *b"defgh", SEPARATOR, *b"ij", SEPARATOR]


def take(sequences, count: int) -> list[list[int]]:
    return [sequence.tolist() for sequence in itertools.islice(sequences, count)]


def test_tokens_are_utf8_bytes_and_a_separator():
    assert tokenize("aé").tolist() == [0x61, 0xC3, 0xA9, SEPARATOR]


def test_a_lone_surrogate_does_not_stop_a_run():
    assert tokenize("a\ud800b").tolist() == [*b"a?b", SEPARATOR]


def test_the_head_is_held_out_and_training_goes_round_and_round():
    corpus = Corpus(DOCUMENTS, sequence_length=2, validation_sequences=1)
    endless = ROUND[3:] + ROUND[3:] + ROUND[3:]
    assert take(corpus.validation(), 5) == [ROUND[:3]]
    assert take(corpus.training(cursor=0), 9) == [endless[i : i + 3] for i in range(0, 27, 3)]


@pytest.mark.parametrize("cursor", [*range(26), 100, 11 * 10**6 + 5])
def test_training_resumes_at_any_cursor(cursor: int):
    corpus = Corpus(DOCUMENTS, sequence_length=2, validation_sequences=1)
    endless = ROUND[3:] * 3
    start = cursor % 11
    assert take(corpus.training(cursor), 4) == [endless[start + i : start + i + 3] for i in range(0, 12, 3)]


def test_a_run_that_resumes_at_the_logged_cursor_reads_what_came_next():
    config = Config(
        data=DataConfig(sequence_length=3),
        parallelism=ParallelismConfig(data_degree=2),
        engine=EngineConfig(gradient_accumulation_steps=2),
    )
    plan = Plan(config, num_ranks=4, device_type="cpu", device_name="CPU", capability=None, ranks_per_host=4)
    corpus = Corpus(DOCUMENTS, sequence_length=3, validation_sequences=1)
    uninterrupted = take(corpus.training(cursor=0), 5 * plan.sequences_per_step)
    resumed = take(corpus.training(cursor=2 * plan.data_tokens_per_step), 3 * plan.sequences_per_step)
    assert resumed == uninterrupted[2 * plan.sequences_per_step :]


def test_validation_does_not_depend_on_what_was_read():
    corpus = Corpus(DOCUMENTS, sequence_length=3, validation_sequences=2)
    take(corpus.training(0), 3)
    assert take(corpus.validation(), 9) == take(corpus.validation(), 9) == [ROUND[0:4], ROUND[4:8]]


def test_a_corpus_that_is_too_short_says_how_much_it_needs():
    Corpus(DOCUMENTS, sequence_length=6, validation_sequences=1).check()
    with pytest.raises(
        CorpusError, match="the corpus has 14 tokens, but 1 validation sequences and one to train on need 16"
    ):
        Corpus(DOCUMENTS, sequence_length=7, validation_sequences=1).check()


def sharder(ring_rank: int, data_rank: int, length: int = 5) -> Sharder:
    return Sharder(Layout("zigzag", 2, length), ring_rank, data_rank, data_degree=2, micro_batch_size=2)


def test_labels_are_the_successors_and_padding_does_not_count():
    sequences = np.arange(12).reshape(2, 6)
    first, second = (sharder(rank, 0).token_batch(sequences) for rank in range(2))
    # 5 tokens in chunks of 2 over 8 places: rank 0 holds chunks 0 and 3, rank 1 chunks 1 and 2
    assert first.tokens_BS.tolist() == [[0, 1, 0, 0], [6, 7, 0, 0]]
    assert first.labels_BS.tolist() == [[1, 2, IGNORED_LABEL, IGNORED_LABEL], [7, 8, IGNORED_LABEL, IGNORED_LABEL]]
    assert first.positions_1S.tolist() == [[0, 1, 6, 7]]
    assert second.tokens_BS.tolist() == [[2, 3, 4, 0], [8, 9, 10, 0]]
    assert second.labels_BS.tolist() == [[3, 4, 5, IGNORED_LABEL], [9, 10, 11, IGNORED_LABEL]]


def test_every_sequence_of_a_step_goes_to_exactly_one_data_rank_in_order():
    sequences = [np.full(6, number) for number in range(17)]  # two whole steps of 8, and one left over
    by_rank = [list(sharder(0, rank).steps(iter(sequences), accumulation_steps=2)) for rank in range(2)]
    dealt = [[[batch.tokens_BS[:, 0].tolist() for batch in step] for step in steps] for steps in by_rank]
    assert dealt[0] == [[[0, 1], [4, 5]], [[8, 9], [12, 13]]]
    assert dealt[1] == [[[2, 3], [6, 7]], [[10, 11], [14, 15]]]


def test_validation_counts_every_sequence_once_whatever_the_data_degree():
    sequences = [np.arange(6) + 10 * number for number in range(3)]
    batches = [list(sharder(ring, data).validation(sequences)) for ring in range(2) for data in range(2)]
    assert {len(rank) for rank in batches} == {2}  # equally many on every rank, or their collectives would not meet
    assert sum(int(batch.num_valid()) for rank in batches for batch in rank) == 3 * 5
    counted = torch.cat([batch.labels_BS[batch.labels_BS != IGNORED_LABEL] for rank in batches for batch in rank])
    assert sorted(counted.tolist()) == sorted(int(label) for sequence in sequences for label in sequence[1:])
