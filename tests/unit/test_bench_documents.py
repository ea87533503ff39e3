"""`+documents=...` of recipe=bench_attention: what can be typed, its lengths, and what is refused."""

from __future__ import annotations

import itertools

import hydra
import pytest

import train
from conf.compose import to_config
from conf.schema import Config, ConfigError, DataConfig, document_lengths
from recipes.benchmark.candidates import busiest_rank
from ring_attention import CAUSAL
from ring_attention.layout import Layout
from ring_attention.schedule import work_per_rank
from tests.errors import refused
from tests.unit.test_schema import CONF


def lengths_of(documents: object, sequence_length: int) -> tuple[int, ...]:
    data = DataConfig(sequence_length=sequence_length)
    return document_lengths(Config(recipe="bench_attention", data=data, documents=documents))


@pytest.mark.parametrize("plus", ["+", ""])
@pytest.mark.parametrize(
    ("typed", "lengths"),
    [
        ("8x32", (32,) * 8),
        ("1x256", (256,)),
        ("[100,1,155]", (100, 1, 155)),
        ("lognormal", (37, 26, 73, 36, 15, 51, 18)),
        ("null", (256,)),
    ],
)
def test_documents_are_typed_with_and_without_a_plus(plus: str, typed: str, lengths: tuple[int, ...]):
    assert train  # registers the schema
    overrides = ["recipe=bench_attention", "data.sequence_length=256", f"{plus}documents={typed}"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = to_config(hydra.compose("config", overrides))
    assert document_lengths(config) == lengths


@pytest.mark.parametrize("length", [1, 3, 2048, 65_536, 524_288])
def test_lognormal_documents_fill_the_sequence_and_are_the_same_each_time(length: int):
    lengths = lengths_of("lognormal", length)
    assert lengths == lengths_of("lognormal", length)
    assert sum(lengths) == length
    assert min(lengths) >= 1
    assert max(lengths) <= max(1, length // 2)


@pytest.mark.parametrize(("length", "most", "spread"), [(2048, 6, 4), (8192, 6, 4), (65_536, 10, 10)])
def test_the_lognormal_documents_of_a_sequence(length: int, most: int, spread: int):
    lengths = lengths_of("lognormal", length)
    assert len(lengths) == len(set(lengths)) > most
    assert max(lengths) > spread * min(lengths)


FORMS = ("+documents=8x8192", "+documents=lognormal", "+documents=[4096,2048,2048]")


@pytest.mark.parametrize(
    ("documents", "named"),
    [
        ("8x32x2", ["documents=8x32x2", *FORMS]),
        ("-8x32", ["documents=-8x32", *FORMS]),
        ("long", ["documents=long", *FORMS]),
        (256, ["documents=256", *FORMS]),
        ([128, "128"], ["documents=[128, '128']", *FORMS]),
        ([128, 128.0], ["documents=[128, 128.0]", *FORMS]),
        ([255, True], ["documents=[255, True]", *FORMS]),
        ("0x32", ["documents=0x32", 1, FORMS[0]]),
        ("8x0", ["documents=8x0", 1, FORMS[0]]),
        ([], ["documents=[]", 1, FORMS[0]]),
        ([256, 0], ["documents=[256, 0]", 1, FORMS[0]]),
        ([257, -1], ["documents=[257, -1]", 1, FORMS[0]]),
        ("8x64", ["documents=8x64", 512, "data.sequence_length=256", "data.sequence_length=512"]),
        ([100, 100], ["documents=[100, 100]", 200, "data.sequence_length=256", "data.sequence_length=200"]),
    ],
)
def test_what_is_no_documents_of_the_sequence_is_refused(documents: object, named: list[object]):
    with refused(ConfigError, *named):
        lengths_of(documents, 256)


@pytest.mark.parametrize("recipe", ["pretrain", "forward", "max_length"])
def test_no_other_recipe_takes_documents(recipe: str):
    with refused(ConfigError, "documents=8x256", "recipe=bench_attention", f"recipe={recipe}"):
        Config(recipe=recipe, documents="8x256")


def test_the_busiest_rank_of_a_simulated_ring_counts_copies():
    """Of the mix on a ring of 8, rank 1 has the most work, and rank 2 copies 12,626 keys."""
    ends = (*itertools.accumulate(lengths_of("lognormal", 65536), initial=0),)
    layout, mask = Layout("balanced", 8, 65536, documents=ends), CAUSAL.packed(ends)
    work = [sum(of_rank) for of_rank in work_per_rank(layout, mask)]
    assert (work.index(max(work)), busiest_rank(layout, mask)) == (1, 2)
    assert busiest_rank(Layout("contiguous", 8, 65536), CAUSAL) == 7
