"""Stages of growing length: their arithmetic, their documents, and how a run goes on in the middle of one."""

from __future__ import annotations

import itertools

import pytest

from conf.schema import Config, DataConfig, EngineConfig
from conf.stages import Stage, length_at, stages_of, steps_by_length
from data.corpus import Corpus, LastRead
from data.feed import Feed
from data.shard import Sharder, Step
from data.source import CorpusError
from recipes.planning.plan import Plan
from recipes.planning.throughput import training_flops_per_token
from ring_attention.layout import Layout
from tests.corpora import byte_corpus
from tests.errors import refused

STAGES = [[1, 8], [4, 24], [6, 40]]
LENGTH, NUM_STEPS = 40, 9
STAGED = DataConfig(sequence_length=LENGTH, stages=STAGES)
TEXTS = ["".join(chr(ord("a") + (number + i) % 26) for i in range(5 + 7 * number)) for number in range(30)]


def test_which_steps_have_which_length():
    assert stages_of(STAGED) == [Stage(1, 8), Stage(4, 24), Stage(6, 40)]
    assert [length_at(STAGED, step) for step in range(1, 9)] == [8, 8, 8, 24, 24, 40, 40, 40]
    assert [*steps_by_length(STAGED, 1, 7)] == [(8, 3), (24, 2), (40, 2)]
    assert [*steps_by_length(STAGED, 3, 4)] == [(8, 1), (24, 1)]
    assert [*steps_by_length(STAGED, 5, 5)] == [(24, 1)]
    assert [*steps_by_length(STAGED, 8, 7)] == []
    plain = DataConfig(sequence_length=LENGTH)
    assert stages_of(plain) == [Stage(1, LENGTH)]
    assert [*steps_by_length(plain, 3, 7)] == [(LENGTH, 5)]


def test_tokens_and_remaining_time_count_each_stage():
    config = Config(data=STAGED, engine=EngineConfig(gradient_accumulation_steps=2), num_steps=NUM_STEPS)
    plan = Plan(config, 1, "cpu", "CPU", None, ranks_per_host=1)
    assert plan.tokens_of_steps(1, 3) == 3 * 2 * 8
    assert plan.tokens_of_steps(3, 6) == 2 * (8 + 24 + 24 + 40)
    per_sequence = {length: length * training_flops_per_token(config.model, length) for length in (24, 40)}
    assert plan.steps_left(4) == pytest.approx(1 + 4 * per_sequence[40] / per_sequence[24])
    assert plan.steps_left(6) == 3
    assert plan.steps_left(NUM_STEPS) == 0
    assert plan.throughput([2.0, 6.0, 20.0], lengths=[8, 24, 40]).tpot_ms == 250


def corpus(texts: list[str] = TEXTS, **settings) -> Corpus:
    return byte_corpus(texts, LENGTH, validation_sequences=2, stages=STAGES, **settings)


def feed(texts: Corpus, data_rank: int = 0, data_degree: int = 1, accumulation_steps: int = 2) -> Feed:
    return Feed(texts, Sharder(Layout("zigzag", 1, LENGTH), 0, data_rank, data_degree, 1), accumulation_steps)


def tokens(steps: list[Step]) -> list[list[list[int]]]:
    return [[batch.tokens_BS[0].tolist() for batch in step.micro_batches] for step in steps]


def last_read(step: Step) -> LastRead:
    return LastRead(*step.last.position, step.last.sha256())


@pytest.mark.parametrize("packing", ["concatenate", "best_fit", "none"])
def test_a_run_goes_on_after_any_step(packing: str):
    steps = [*itertools.islice(feed(corpus(packing=packing)).steps(), NUM_STEPS)]
    assert [step.last.length for step in steps] == [8, 8, 8, 24, 24, 40, 40, 40, 40]
    epochs = [step.last.position.epoch for step in steps]
    assert epochs[3] == epochs[2] + 1  # a stage begins with documents in another order
    assert epochs[5] == epochs[4] + 1
    assert steps[3].micro_batches[0].tokens_BS.shape == (1, 24)
    for done in range(1, NUM_STEPS):
        again = feed(corpus(packing=packing)).steps(last_read=last_read(steps[done - 1]), first_step=done + 1)
        assert tokens([*itertools.islice(again, NUM_STEPS - done)]) == tokens(steps[done:])


def test_more_data_ranks_read_the_same_sequences():
    alone = tokens([*itertools.islice(feed(corpus()).steps(), NUM_STEPS)])
    ranks = [feed(corpus(), rank, 2, accumulation_steps=1).steps() for rank in (0, 1)]
    both = [tokens([*itertools.islice(steps, NUM_STEPS)]) for steps in ranks]
    assert [[*first, *second] for first, second in zip(*both, strict=True)] == alone


@pytest.mark.parametrize("done", [2, 3])  # within a stage, and at its end
def test_another_corpus_is_noticed(done: int):
    steps = [*itertools.islice(feed(corpus()).steps(), done)]
    with refused(CorpusError, "corpus", "changed"):
        next(feed(corpus([text.upper() for text in TEXTS])).steps(None, last_read(steps[-1]), done + 1))


def test_documents_to_validate_on_are_those_of_the_longest_stage_and_never_train():
    staged, plain = corpus(), byte_corpus(TEXTS, LENGTH, validation_sequences=2)
    assert staged.validation()["texts"] == plain.validation()["texts"]
    batches = [*feed(staged).validation()["texts"]]
    assert [batch.tokens_BS.shape[1] for batch in batches] == [LENGTH, LENGTH]
    held_out = {(piece.start, piece.stop) for pack in staged.validation()["texts"] for piece in pack.pieces}
    for length in (8, 24, LENGTH):
        for pack in itertools.takewhile(lambda pack: pack.position.epoch == 0, staged.of_length(length).training()):
            assert all(piece.stop <= start or stop <= piece.start for piece in pack.pieces for start, stop in held_out)
