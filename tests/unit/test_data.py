"""Packing and sharding of literal documents, without ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from conf.schema import Config, DataConfig, EngineConfig, ParallelismConfig
from data.pack import Corpus
from data.shard import IGNORED_LABEL, Sharder
from data.source import CorpusError
from data.tokenizer import BYTES, SEPARATOR
from recipes.planning.plan import Plan
from ring_attention import Layout
from tests.errors import refused

DOCUMENTS = ["abc", "", "defgh", "ij"]  # 3+1, 0+1, 5+1, 2+1 = 14 tokens an epoch
EPOCH = [*b"abc", SEPARATOR, SEPARATOR, *b"defgh", SEPARATOR, *b"ij", SEPARATOR]


def take(sequences, count: int) -> list[list[int]]:
    return [sequence.tolist() for sequence in itertools.islice(sequences, count)]


def test_tokens_are_utf8_bytes_and_a_separator():
    assert BYTES.encode(["aé"])[0].tolist() == [0x61, 0xC3, 0xA9, SEPARATOR]


def test_a_lone_surrogate_is_replaced():
    assert BYTES.encode(["a\ud800b"])[0].tolist() == [*b"a?b", SEPARATOR]


def test_the_first_sequences_are_held_out_from_all_epochs():
    corpus = Corpus(DOCUMENTS, sequence_length=2, validation_sequences=1)
    endless = EPOCH[3:] + EPOCH[3:] + EPOCH[3:]
    assert take(corpus.validation(), 5) == [EPOCH[:3]]
    assert take(corpus.training(cursor=0), 9) == [endless[i : i + 3] for i in range(0, 27, 3)]


@pytest.mark.parametrize("cursor", [*range(26), 100, 11 * 10**6 + 5])
def test_training_resumes_at_any_cursor(cursor: int):
    corpus = Corpus(DOCUMENTS, sequence_length=2, validation_sequences=1)
    endless = EPOCH[3:] * 3
    start = cursor % 11
    assert take(corpus.training(cursor), 4) == [endless[start + i : start + i + 3] for i in range(0, 12, 3)]


def test_resuming_at_the_logged_cursor_continues_the_sequences():
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


def test_validation_does_not_depend_on_what_was_read_before():
    corpus = Corpus(DOCUMENTS, sequence_length=3, validation_sequences=2)
    take(corpus.training(0), 3)
    assert take(corpus.validation(), 9) == take(corpus.validation(), 9) == [EPOCH[0:4], EPOCH[4:8]]


def test_the_error_of_a_short_corpus_says_how_many_tokens_it_needs():
    Corpus(DOCUMENTS, sequence_length=6, validation_sequences=1, vocab_size=257).check()
    with refused(CorpusError, "14 tokens", "1 validation", 16):
        Corpus(DOCUMENTS, sequence_length=7, validation_sequences=1, vocab_size=257).check()


def sharder(ring_rank: int, data_rank: int, length: int = 5) -> Sharder:
    return Sharder(Layout("zigzag", 2, length), ring_rank, data_rank, data_degree=2, micro_batch_size=2)


def test_labels_are_the_next_tokens_and_padding_is_ignored():
    sequences = np.arange(12).reshape(2, 6)
    first, second = (sharder(rank, 0).token_batch(sequences) for rank in range(2))
    # 5 tokens, padded to 4 chunks of 2: rank 0 holds chunks 0 and 3, rank 1 chunks 1 and 2
    assert first.tokens_BS.tolist() == [[0, 1, 0, 0], [6, 7, 0, 0]]
    assert first.labels_BS.tolist() == [[1, 2, IGNORED_LABEL, IGNORED_LABEL], [7, 8, IGNORED_LABEL, IGNORED_LABEL]]
    assert first.positions_1S.tolist() == [[0, 1, 6, 7]]
    assert second.tokens_BS.tolist() == [[2, 3, 4, 0], [8, 9, 10, 0]]
    assert second.labels_BS.tolist() == [[3, 4, 5, IGNORED_LABEL], [9, 10, 11, IGNORED_LABEL]]


def test_each_sequence_of_a_step_goes_to_one_data_rank_in_order():
    sequences = [np.full(6, number) for number in range(17)]  # two full steps of 8, and one left over
    by_rank = [list(sharder(0, rank).steps(iter(sequences), accumulation_steps=2)) for rank in range(2)]
    first_tokens = [[[batch.tokens_BS[:, 0].tolist() for batch in step] for step in steps] for steps in by_rank]
    assert first_tokens[0] == [[[0, 1], [4, 5]], [[8, 9], [12, 13]]]
    assert first_tokens[1] == [[[2, 3], [6, 7]], [[10, 11], [14, 15]]]


def test_validation_counts_each_sequence_once_even_where_data_ranks_do_not_divide_them():
    sequences = [np.arange(6) + 10 * number for number in range(3)]
    batches = [list(sharder(ring, data).validation(sequences)) for ring in range(2) for data in range(2)]
    assert {len(rank) for rank in batches} == {2}  # equally many on every rank, so that collectives match
    assert sum(int(batch.num_valid()) for rank in batches for batch in rank) == 3 * 5
    counted = torch.cat([batch.labels_BS[batch.labels_BS != IGNORED_LABEL] for rank in batches for batch in rank])
    assert sorted(counted.tolist()) == sorted(int(label) for sequence in sequences for label in sequence[1:])
