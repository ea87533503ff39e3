"""What explain=true says about packed documents on a ring."""

from __future__ import annotations

import itertools

import pytest

from conf.schema import AttentionConfig, Config, DataConfig, EngineConfig, document_lengths
from recipes.planning.packed_layouts import packed_layouts
from recipes.planning.plan import Plan
from tests.errors import names, some_line_names

LENGTH = 65_536


def plan(method: str = "ring", num_ranks: int = 8, micro_batch_size: int = 1, document_mask: bool = True) -> Plan:
    config = Config(
        attention=AttentionConfig(method=method, layout="zigzag"),
        engine=EngineConfig(micro_batch_size=micro_batch_size),
        data=DataConfig(sequence_length=LENGTH, document_mask=document_mask),
    )
    return Plan(config, num_ranks, "cpu", "CPU", None, ranks_per_host=num_ranks)


def test_both_layouts_are_compared():
    config = Config(recipe="bench_attention", documents="lognormal", data=DataConfig(sequence_length=LENGTH))
    mix = tuple(itertools.accumulate(document_lengths(config), initial=0))
    lines = packed_layouts(plan(), [mix, (0, LENGTH)])
    names(lines[0], "first 2", "1 to 34 documents", "attention.layout=zigzag", "8,192 tokens")
    # one document is zigzag in both; of it each rank sends all but the last of 8 shards
    some_line_names(lines, "zigzag", "1.82 (2.64)", "8,441 to 57,344", "1 of 2")
    some_line_names(lines, "balanced", "1.02 (1.04)", "8,444 to 57,344", "1 of 2")


@pytest.mark.parametrize(
    "changed",
    [{"method": "ulysses", "num_ranks": 2}, {"num_ranks": 1}, {"micro_batch_size": 2}, {"document_mask": False}],
)
def test_where_documents_do_not_lie_on_a_ring_nothing_is_said(changed):
    assert packed_layouts(plan(**changed), [(0, 100, LENGTH)]) == []
