"""The loss by position and exact answers on ranks equal those of one process, token by token."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ModelConfig,
    ParallelismConfig,
)
from data.corpus import IGNORED_LABEL, START, Pack
from data.packing import Piece
from recipes.evaluation.positions import bucket_edges
from recipes.evaluation.scoring import Answers, Bucket
from recipes.evaluation.tasks import Sample
from recipes.model.pretrained import resolve
from recipes.model.transformer import Transformer
from recipes.planning.plan import Plan
from ring_attention import LocalAttention
from tests.corpora import store_of
from tests.families import VOCAB_SIZE, tiny_model
from tests.pool import WorkerPool, parallel_groups

MODEL = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64)
LENGTH, CONTEXT = 700, 100  # three buckets
SAMPLE_LENGTH, SAMPLE_CONTEXT, NUM_EXACT, NUM_SAMPLES = 60, 8, 4, 7
GRIDS = [  # data, ring, ulysses, layout
    pytest.param((1, 2, 1, "zigzag"), marks=pytest.mark.slow),
    (1, 3, 1, "zigzag"),
    (2, 2, 1, "zigzag"),  # three packs on two data ranks
    (1, 2, 1, "balanced"),
    pytest.param((1, 2, 2, "contiguous"), marks=pytest.mark.slow),
]


def evaluated(path: str | None, grid: tuple[int, int, int, str]) -> tuple[list[Bucket], Answers, Answers, Answers]:
    """The loss by position, and the answers of samples packed together, one by one, and decoded."""
    from recipes.engine.build import build_engine, build_sharder
    from recipes.engine.deepspeed_engine import TrainingEngine
    from recipes.evaluation.scoring import decoded_answers, exact_answers, loss_by_position

    data, ring, ulysses, layout = grid
    config = Config(
        model=MODEL,
        attention=AttentionConfig(method="ring" if ulysses == 1 else "hybrid", layout=layout),
        parallelism=ParallelismConfig(data_degree=data, ring_degree=ring, ulysses_degree=ulysses),
        engine=EngineConfig(dtype="fp32", tile_tokens=32),
        data=DataConfig(sequence_length=LENGTH),
        evaluate=EvaluateConfig(model=path or "nothing to read"),
        recipe="evaluate",
    )
    if path:
        config.model = ModelConfig(path=path)  # as `resolve_source` does
    num_ranks = data * ring * ulysses
    plan = Plan(resolve(config), num_ranks, "cpu", "CPU", None, ranks_per_host=num_ranks)
    engine = build_engine(plan, parallel_groups(data, ring * ulysses))
    assert isinstance(engine, TrainingEngine)
    sharder = build_sharder(plan, engine)
    vocab_size = plan.config.model.vocab_size
    samples = samples_of(reference_model(path), vocab_size)
    packed = exact_answers(engine, sharder, samples, SAMPLE_LENGTH, SAMPLE_CONTEXT)
    alone = exact_answers(engine, sharder, samples, LENGTH, SAMPLE_CONTEXT)
    decoded = decoded_answers(engine, sharder, samples, NUMBERS)
    return loss_by_position(engine, sharder, packs(vocab_size), CONTEXT), packed, alone, decoded


def reference_model(path: str | None) -> torch.nn.Module:
    """One process's. Its call gives logits [1, S, V] of tokens [1, S]."""
    if path is None:
        model = Transformer(MODEL, LocalAttention("reference"))
        return Logits(lambda tokens: model(tokens, torch.arange(tokens.shape[1]).unsqueeze(0)))
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    return Logits(lambda tokens: loaded(tokens).logits)


class Logits(torch.nn.Module):
    def __init__(self, of_tokens) -> None:
        super().__init__()
        self.of_tokens = of_tokens

    @torch.no_grad()
    def forward(self, tokens: list[int]) -> torch.Tensor:
        """[S, V] in fp64."""
        return self.of_tokens(torch.tensor([tokens]))[0].double()


def packs(vocab_size: int) -> list[Pack]:
    """Three sequences of documents of several lengths; the last has padding."""
    tokens = random.Random(1).choices(range(vocab_size), k=3 * LENGTH)
    store = store_of([tokens])
    ends = [[650, 700], [20, 30, 700], [310, 680]]
    return [
        Pack(
            tuple(
                Piece(0, number * LENGTH + start, number * LENGTH + stop, False)
                for start, stop in zip([0, *stops], stops, strict=False)
            ),
            LENGTH,
            START,
            START,
            (store,),
        )
        for number, stops in enumerate(ends)
    ]


def samples_of(model: torch.nn.Module, vocab_size: int) -> list[Sample]:
    """Prompts of several lengths with what greedy decoding gives, and others whose last token is another one."""
    samples = []
    for number in range(NUM_SAMPLES):
        prompt = random.Random(number).choices(range(vocab_size), k=SAMPLE_LENGTH - 3 - number)
        tokens = [*prompt]
        for _ in range(3):
            tokens.append(int(model(tokens)[-1].argmax()))
        if number >= NUM_EXACT:
            tokens[-1] = (tokens[-1] + 1) % vocab_size
        answer = tokens[len(prompt) :]
        samples.append(
            Sample(
                "niah_single", SAMPLE_LENGTH, 0.5, tuple(prompt), tuple(answer), tuple(f"({token})" for token in answer)
            )
        )
    return samples


def losses_of(model: torch.nn.Module, tokens: list[int], labels: list[int]) -> list[float]:
    losses = torch.nn.functional.cross_entropy(model(tokens), torch.tensor(labels), reduction="none")
    return [loss for loss, label in zip(losses.tolist(), labels, strict=True) if label != IGNORED_LABEL]


@functools.cache
def expected_buckets(path: str | None, vocab_size: int) -> list[Bucket]:
    model, edges = reference_model(path), bucket_edges(LENGTH)
    sums = {start: [0, 0.0, 0.0] for start in edges[:-1]}
    for whole in packs(vocab_size):
        tokens, labels = (array.tolist() for array in whole.read(0, LENGTH))
        for first, last in zip(whole.boundaries, whole.boundaries[1:], strict=False):
            of_cut: list[float] = []
            for start in range(first, last, CONTEXT):
                stop = min(start + CONTEXT, last)
                of_cut += losses_of(model, tokens[start:stop], labels[start:stop])
            for position, losses in enumerate(
                zip(losses_of(model, tokens[first:last], labels[first:last]), of_cut, strict=True)
            ):
                bucket = sums[max(edge for edge in edges if edge <= position)]
                for column, value in enumerate((1, *losses)):
                    bucket[column] += value
    return [
        Bucket(start, stop, num, loss / num, cut / num)
        for (start, (num, loss, cut)), stop in zip(sums.items(), edges[1:], strict=True)
        if num
    ]


class Numbers:
    """A tokenizer whose texts are numbers in parentheses. Its separator is no token of any model."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[-1] for _ in texts]

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(f"({token})" for token in tokens.tolist())


NUMBERS: Any = Numbers()


@functools.cache
def expected_share(path: str | None, vocab_size: int) -> float:
    """The mean share of an answer's tokens that greedy decoding gives, in so many tokens and 32 more."""
    model, shares = reference_model(path), []
    stop = set() if path is None else {2}  # the EOS token of `tiny_config`
    for sample in samples_of(model, vocab_size):
        tokens = [*sample.prompt]
        for _ in range(len(sample.answer) + 32):
            tokens.append(int(model(tokens)[-1].argmax()))
            if tokens[-1] in stop:
                tokens.pop()
                break
        shares.append(sum(token in tokens[len(sample.prompt) :] for token in sample.answer) / len(sample.answer))
    return sum(shares) / len(shares)


@functools.cache
def expected_answers(path: str | None, vocab_size: int) -> Answers:
    model = reference_model(path)
    losses: list[float] = []
    num_exact_of_context = 0
    for sample in samples_of(model, vocab_size):
        tokens = [*sample.prompt, *sample.answer]
        cut = [(index, tokens[(index - 1) // SAMPLE_CONTEXT * SAMPLE_CONTEXT : index]) for index in range(len(tokens))]
        answered = [int(model(before)[-1].argmax()) == tokens[index] for index, before in cut[len(sample.prompt) :]]
        num_exact_of_context += all(answered)
        losses += losses_of(model, tokens[:-1], [IGNORED_LABEL] * (len(sample.prompt) - 1) + [*sample.answer])
    return Answers(NUM_EXACT / NUM_SAMPLES, sum(losses) / len(losses), num_exact_of_context / NUM_SAMPLES)


def check(outcomes: list[tuple[list[Bucket], Answers, Answers, Answers]], path: str | None, vocab_size: int) -> None:
    assert all(outcome == outcomes[0] for outcome in outcomes)  # every rank has the same
    buckets, *answers, decoded = outcomes[0]
    share = expected_share(path, vocab_size)
    assert share > 0
    assert decoded.accuracy == pytest.approx(share, rel=1e-12)
    assert decoded.answer_loss is None
    for found, expected in zip(buckets, expected_buckets(path, vocab_size), strict=True):
        assert found[:3] == expected[:3]
        assert found[3:] == pytest.approx(expected[3:], rel=1e-5)
    for found in answers:
        expected = expected_answers(path, vocab_size)
        assert found.accuracy == expected.accuracy
        assert found.accuracy_of_context == expected.accuracy_of_context
        if path is None:
            assert expected.accuracy_of_context is not None
            assert 0 < expected.accuracy_of_context < expected.accuracy
        assert found.answer_loss == pytest.approx(expected.answer_loss, rel=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_an_evaluation_on_ranks_equals_one_process(pool: WorkerPool, grid: tuple[int, int, int, str]):
    data, ring, ulysses, _ = grid
    check(pool.run(evaluated, None, grid, num_ranks=data * ring * ulysses), None, MODEL.vocab_size)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gemma2"])
def test_a_hugging_face_model_on_ranks_equals_eager_attention(pool: WorkerPool, tmp_path: Path, family: str):
    tiny_model(family, "eager").save_pretrained(tmp_path)
    check(pool.run(evaluated, str(tmp_path), (1, 2, 1, "zigzag"), num_ranks=2), str(tmp_path), VOCAB_SIZE)
