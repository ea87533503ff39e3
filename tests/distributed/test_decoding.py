"""Decoding under the ring against transformers' `generate` in one process, token for token, in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conf.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    EngineConfig,
    GenerateConfig,
)
from recipes.inference.decoder import Decoder
from recipes.inference.sampling import Sampling
from recipes.run.errors import RunFailed
from ring_attention import AllGatherAttention, HybridAttention, RingAttention, UlyssesAttention, hf
from ring_attention.decoding import CachedAttention
from tests.distributed.test_hf import world
from tests.errors import refused
from tests.families import FAMILIES, VOCAB_SIZE, tiny_model
from tests.pool import WorkerPool, parallel_groups

LENGTH, NUM_NEW = 203, 20  # the prompt is of no rank count a multiple, and longer than a window
METHODS: dict[str, Any] = {
    "ring": RingAttention,
    "ulysses": UlyssesAttention,
    "hybrid": functools.partial(HybridAttention, ulysses_degree=2),
    "all_gather": AllGatherAttention,
}


def prompt(length: int) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(length))


class Decoded(NamedTuple):
    """After one prompt. Greedy texts of small models repeat themselves, so their logits are compared, too."""

    tokens: list[int]
    logits_NV: Tensor
    cache_bytes: int = 0

    def equals(self, other: Decoded) -> bool:
        close = torch.allclose(self.logits_NV, other.logits_NV, rtol=1e-4, atol=1e-4)
        return self.tokens == other.tokens and close


def by_transformers(family: str, lengths: Sequence[int]) -> list[Decoded]:
    """The greedy tokens after each prompt, in one process with eager attention."""
    model = tiny_model(family, "eager")
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}
    found = []
    for length in lengths:
        out = model.generate(prompt(length), output_logits=True, return_dict_in_generate=True, **options)
        found.append(Decoded(out.sequences[0, length:].tolist(), torch.cat(out.logits)))
    return found


@pytest.fixture(scope="module")
def transformers_generate(pool: WorkerPool) -> Callable[[str, tuple[int, ...]], list[Decoded]]:
    """`by_transformers` of a family and lengths, computed once."""
    return functools.cache(lambda family, lengths: pool.run(by_transformers, family, lengths, num_ranks=1)[0])


@torch.no_grad()
def by_ring(family: str, method: str, layout: str, lengths: Sequence[int]) -> list[Decoded]:
    """The same over the ranks."""
    hf.register()
    cached = CachedAttention(METHODS[method]("auto", world(), layout=layout))
    model = tiny_model(family, "ring")
    hf.check(model)
    found = []
    for length in lengths:
        tokens, logits = prompt(length), []
        cached.start(length - 1, NUM_NEW)
        if length > 1:
            model(**hf.shard({"input_ids": tokens[:, :-1]}, cached))
        for position in range(length - 1, length - 1 + NUM_NEW):
            logits.append(model(**hf.next_token(tokens[:, -1:], position, cached)).logits[0])
            tokens = torch.cat((tokens, logits[-1].argmax(-1, keepdim=True)), 1)
        found.append(Decoded(tokens[0, length:].tolist(), torch.cat(logits), cached.num_bytes))
    return found


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_generate(
    pool: WorkerPool, transformers_generate, family: str, num_ranks: int
):
    (expected,) = transformers_generate(family, (LENGTH,))
    for (found,) in pool.run(by_ring, family, "ring", "zigzag", [LENGTH], num_ranks=num_ranks):
        assert found.equals(expected)


@pytest.mark.parametrize(
    ("method", "layout", "num_ranks"),
    [
        ("ring", "zigzag", 3),
        ("ring", "contiguous", 2),
        ("ring", "balanced", 2),
        ("ulysses", "contiguous", 2),
        ("all_gather", "zigzag", 2),
        pytest.param("hybrid", "zigzag", 4, marks=pytest.mark.slow),
        pytest.param("ring", "zigzag", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])  # windows, with a softcap and with sinks
def test_every_method_layout_and_length_gives_the_same(
    pool: WorkerPool, transformers_generate, family, method, layout, num_ranks
):
    """Also prompts shorter than the ranks, of which some then hold nothing."""
    lengths = (1, 2, 5, 24, 61)
    expected = transformers_generate(family, lengths)
    for found in pool.run(by_ring, family, method, layout, lengths, num_ranks=num_ranks):
        assert all(map(Decoded.equals, found, expected))


def test_a_rank_holds_its_part_of_the_keys_and_values(pool: WorkerPool):
    """And of windowed layers no more than a window of the prompt."""
    for family, num_kept in (("qwen3", 2 * (LENGTH - 1 + NUM_NEW)), ("mistral", 2 * (24 + NUM_NEW))):
        whole = num_kept * 2 * 2 * 16 * 4  # of keys and values, 2 heads of 16 numbers in fp32
        for num_ranks in (2, 3):
            ranks = pool.run(by_ring, family, "ring", "zigzag", [LENGTH], num_ranks=num_ranks)
            sizes = [found.cache_bytes for (found,) in ranks]
            assert whole * 0.95 < sum(sizes) < whole * 1.1
            if family == "qwen3":
                assert max(sizes) < 1.1 * whole / num_ranks


# ------------------------------------------------------------------ through the recipe's engine


def built(config: Config, num_ranks: int) -> Any:
    """The engine of a plan, on the groups that the pool's ranks have already."""
    from recipes.engine.build import build_engine
    from recipes.inference.source import load_weights, resolve_source
    from recipes.model.pretrained import resolve
    from recipes.planning.plan import Plan

    plan = Plan(resolve(resolve_source(config)), num_ranks, "cpu", "CPU", None, num_ranks)
    plan.resolve_config()
    engine = build_engine(plan, parallel_groups(1, num_ranks))
    assert plan.config.generate.model is not None
    load_weights(engine.model, plan.config.generate.model)
    return engine


def config_of(model: str) -> Config:
    return Config(
        recipe="generate",
        generate=GenerateConfig(model=model),
        engine=EngineConfig(dtype="fp32"),
        attention=AttentionConfig(layout="zigzag"),
        data=DataConfig(sequence_length=256),
    )


def by_decoder(folder: str, lengths: list[int], stop: list[int], num_ranks: int) -> list[Decoded]:
    engine = built(config_of(folder), num_ranks)
    decoder, model, seen = Decoder(engine), engine.model, []
    model.get_submodule("model").get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2][0]))
    found = []
    for length in lengths:
        seen.clear()
        (tokens,) = decoder.generate([prompt(length)[0].tolist()], NUM_NEW, stop)
        found.append(Decoded(tokens, torch.cat(seen)))
    return found


@pytest.mark.parametrize("family", ["phi3", "cohere2", "gpt_oss"])
def test_the_recipes_decoder_equals_transformers_generate(pool: WorkerPool, family: str, tmp_path: Path):
    """Phi-3's frequencies change at position 128, for all tokens before, too."""
    tiny_model(family, "eager").save_pretrained(tmp_path)
    lengths = [120, 128, 129, 203, 3]
    expected = pool.run(by_transformers, family, lengths, num_ranks=1)[0]
    for found in pool.run(by_decoder, str(tmp_path), lengths, [], 2, num_ranks=2):
        assert all(map(Decoded.equals, found, expected))


def test_it_ends_before_a_stop_token(pool: WorkerPool, tmp_path: Path):
    tiny_model("qwen3", "eager").save_pretrained(tmp_path)
    ((whole,),) = pool.run(by_decoder, str(tmp_path), [50], [], 1, num_ranks=1)
    stop = whole.tokens[-1]
    for (found,) in pool.run(by_decoder, str(tmp_path), [50], [stop], 2, num_ranks=2):
        assert found.tokens == whole.tokens[: whole.tokens.index(stop)]


def broken(folder: str, num_ranks: int) -> None:
    engine = built(config_of(folder), num_ranks)
    with torch.no_grad():
        next(engine.model.parameters()).fill_(float("nan"))
    with refused(RunFailed, "5 tokens", "NaN", "engine.dtype=bf16"):
        Decoder(engine).generate([prompt(5)[0].tolist()], NUM_NEW)


def test_a_model_that_gives_no_numbers_ends_the_run(pool: WorkerPool, tmp_path: Path):
    tiny_model("qwen3", "eager").save_pretrained(tmp_path)
    pool.run(broken, str(tmp_path), 2, num_ranks=2)


def own_transformer(num_ranks: int) -> tuple[list[list[int]], list[list[int]]]:
    """(by the decoder, by a forward pass over all tokens for each) for the recipe's own model with random weights."""
    from recipes.engine.deepspeed_engine import TrainingEngine

    config = config_of("none")
    groups = parallel_groups(1, num_ranks)
    attention = RingAttention("auto", groups.get_sequence_parallel_group(), layout="zigzag")
    engine = TrainingEngine(config, groups, attention)
    prompts = [prompt(length)[0].tolist() for length in (1, 4, 77)]
    found = Decoder(engine).generate(prompts, NUM_NEW)
    layout_of, rank = attention.layout, attention.sequence_rank
    expected = []
    for given in prompts:
        tokens = list(given)
        for _ in range(NUM_NEW):
            layout = layout_of(len(tokens))
            shard = layout.shard(torch.tensor([tokens]), rank, 1)
            with torch.no_grad():
                logits_1SV = engine.model(shard, layout.positions(rank)[None])
            tokens.append(_last_argmax(logits_1SV, layout.positions(rank) == len(tokens) - 1))
        expected.append(tokens[len(given) :])
    return found, expected


def _last_argmax(logits_1SV: Tensor, is_last_S: Tensor) -> int:
    """The most likely token after the last, which one rank has."""
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, logits_1SV[0, is_last_S].argmax(-1).tolist())
    return next(tokens[0] for tokens in found if tokens)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_recipes_own_model_decodes_what_its_forward_pass_says(pool: WorkerPool, num_ranks: int):
    for found, expected in pool.run(own_transformer, num_ranks, num_ranks=num_ranks):
        assert found == expected


def sampled(folder: str, seed: int, num_ranks: int) -> list[list[int]]:
    engine = built(config_of(folder), num_ranks)
    return Decoder(engine).generate([prompt(9)[0].tolist()] * 2, NUM_NEW, (), Sampling(1.0, top_k=50, seed=seed))


def test_sampled_tokens_are_equal_on_all_ranks_and_numbers_of_ranks(pool: WorkerPool, tmp_path: Path):
    tiny_model("qwen3", "eager").save_pretrained(tmp_path)
    (first,) = pool.run(sampled, str(tmp_path), 1, 1, num_ranks=1)
    assert pool.run(sampled, str(tmp_path), 1, 2, num_ranks=2) == [first, first]
    assert first[0] != first[1], "the second text has random numbers of its own"
    assert pool.run(sampled, str(tmp_path), 2, 1, num_ranks=1) != [first]


def misused() -> None:
    cached = CachedAttention(RingAttention("auto", world()))
    q, k, v = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)
    with refused(ValueError, "causal"):
        cached(q, k, v, 0, mask=hf.CAUSAL.packed([0, 2, 8]))
    cached.start(8, 1)
    cached(q, k, v, 0)
    with refused(ValueError, "position 9", "1", "8"):
        cached.step(9)
    cached.step(8)
    cached(q[:, :1], k[:, :1], v[:, :1], 0)
    cached.start(8, 2)
    cached(q, k, v, 0)
    cached.step(8)
    with refused(ValueError, "0 of 1 layers"):
        cached.step(9)


def test_wrong_calls_are_refused(pool: WorkerPool):
    pool.run(misused, num_ranks=2)
