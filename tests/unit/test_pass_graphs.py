"""Forecasts of rings whose passes are CUDA graphs: which are, what these cost the host, and the memory they keep."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest

from conf.schema import AttentionConfig, Config, DataConfig, Degrees
from docs.tools.check_forecast import attention_rows, graph_ms
from recipes.planning.pass_graphs import GraphMemory, has_graphs
from recipes.planning.plan import Plan
from recipes.planning.speeds import FITTED
from recipes.planning.step_time import StepTime
from ring_attention import pass_graph
from ring_attention.mask import CAUSAL
from tests.tools.long_step import composed
from tests.unit.test_step_time import H200S, step

EIGHT = Degrees(1, 8, 1)


def are_graphs(
    degrees: Degrees = EIGHT,
    method: str = "ring",
    kernel: str = "flash_attn_4",
    tokens: int = 4096,
    transport: str = "auto",
    document_mask: bool = False,
) -> bool:
    """On a host of 8."""
    data = DataConfig(sequence_length=65_536, document_mask=document_mask)
    config = Config(attention=AttentionConfig(transport=transport), data=data)
    return has_graphs(config, degrees, method, kernel, 8, tokens)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"transport": "copy_engine"},
        {"degrees": Degrees(4, 2, 1)},
        {"degrees": Degrees(1, 4, 2), "method": "hybrid", "tokens": 2048},
    ],
    ids=str,
)
def test_short_passes_in_one_host_are_graphs(changed: dict[str, Any]):
    assert are_graphs(**changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": 4097},
        {"transport": "p2p"},
        {"document_mask": True},
        {"kernel": "cudnn"},
        {"degrees": Degrees(1, 16, 1)},
        {"degrees": Degrees(1, 4, 2), "method": "hybrid"},  # a ring rank has the tokens of two ranks
        {"degrees": Degrees(1, 1, 8), "method": "ulysses"},
        {"method": "all_gather"},
    ],
    ids=str,
)
def test_others_are_not(changed: dict[str, Any]):
    assert not are_graphs(**changed)


def test_the_library_decides_for_forecasts_too():
    with patch.object(pass_graph, "MOST_TOKENS", 100):
        assert are_graphs(tokens=100)
        assert not are_graphs(tokens=101)


def short_step(degrees: Degrees, method: str, transport: str = "auto") -> StepTime:
    """4,096 tokens for each of 16 ring ranks, on one host."""
    made = step(degrees, method=method)
    made.config.attention.transport = transport
    return dataclasses.replace(made, cluster=dataclasses.replace(H200S, gpus_per_host=64))


@pytest.mark.parametrize(
    ("degrees", "method", "transport", "forward_ms", "backward_ms"),
    [
        (Degrees(1, 16, 1), "ring", "auto", 0.2 + 0.15, 3.5 * 0.2 + 0.15),
        (Degrees(1, 16, 1), "ring", "p2p", 0.2 + 16 * 0.1, 3.5 * (0.2 + 17 * 0.1)),
        # all-to-alls before and after are no part of the graph
        (Degrees(1, 16, 4), "hybrid", "auto", 0.2 + 2 * 0.1 + 0.15, 3.5 * (0.2 + 2 * 0.1) + 0.15),
    ],
)
def test_a_graph_costs_the_host_no_ring_steps(degrees, method, transport, forward_ms, backward_ms):
    attention = short_step(degrees, method, transport).attention(CAUSAL)
    assert attention.issue_s(False) == pytest.approx(forward_ms / 1e3)
    assert attention.issue_s(True) == pytest.approx(backward_ms / 1e3)


def test_the_hosts_time_of_a_graph_is_what_was_measured():
    assert FITTED.graph_ms == pytest.approx(graph_ms(), abs=0.005)


def test_rings_of_two_that_no_fit_saw():
    """Both measurements, of 4,096 and 8,192 tokens with eight key-value heads, within 10 %."""
    rows = [row for row in attention_rows(FITTED) if row[0].endswith("_gqa_2xH200.json") and row[1] == "ring"]
    short = [row for row in rows if row[0].startswith(("attention_4096_", "attention_8192_"))]
    assert len(short) == 2
    assert max(abs(float(row[column].rstrip("%"))) for row in short for column in (4, 7)) < 10


def test_the_memory_of_graphs():
    """Two numbers a token in all query heads, one in all key-value heads, of two bytes; one query head.

    Forward q, k, v, out and lse; backward dout, q, k, v, out and lse; then what a pass works with.
    """
    memory = GraphMemory(num_heads=1, queries=2, keys=1, size=2, num_masks=1)
    forward, backward = 2 * (2 + 1 + 1 + 2) + 4, 2 * (2 + 2 + 1 + 1 + 2) + 4
    assert memory.results == 2 * (2 + 1 + 1)
    assert memory.kept(working=100) == forward + backward + 100
    # the results of one mask's graph stay while that of the other is captured
    assert dataclasses.replace(memory, num_masks=2).kept(100) == 2 * (forward + backward) + 8 + 100


NAME = "CUDA graphs of the ring's passes"


def states_of(setting: str) -> dict[str, float]:
    """Of 8B's shape on two H200s of one host."""
    plan = Plan(composed(f"model=llama_8b model.num_layers=4 {setting}"), 2, "cuda", "NVIDIA H200", None, 2)
    (point,) = (p for p in plan.step_memory.timeline if p.name == "the last layer's attention, backward")
    return point.parts


def test_graphs_are_in_the_timeline():
    """4,096 tokens of 4,096 numbers in query heads, 1,024 in key-value heads, and 32 heads.

    A backward pass works with half of the rows' statistics (128 bytes a token), 9 x 4,096, 16 x 1,024, half of dk and
    dv in fp32 (4,096), and 8,192 for gradients that travel in fp32, less dout (8,192) and symmetric buffers (12,288).
    """
    setting = "data.sequence_length=8192 data.document_mask=false"
    graphs, eager = states_of(setting), states_of(f"{setting} attention.transport=p2p")
    forward, backward = 2 * (4096 + 1024 + 1024 + 4096) + 128, 2 * (3 * 4096 + 2 * 1024) + 128
    working = 128 + 9 * 4096 + 16 * 1024 + 4096 + 8192 - 8192 - 12288
    assert graphs[NAME] == 4096 * (forward + backward + working) == 4096 * 94_592
    assert NAME not in eager
    # of the pass itself dout, dq, dk and dv are left: 2 x (2 x 4,096 + 2 x 1,024)
    temporaries = "gradients and backward temporaries"
    assert eager[temporaries] - graphs[temporaries] == 4096 * (working + 12288 + 8192 - 20480)


@pytest.mark.parametrize(
    "setting",
    [
        "data.sequence_length=8194 data.document_mask=false",
        "data.sequence_length=8192",
        "data.sequence_length=8192 data.document_mask=false engine.dtype=fp32",
        "data.sequence_length=8192 data.document_mask=false attention.kernel=reference",
    ],
)
def test_other_passes_keep_nothing(setting: str):
    assert NAME not in states_of(setting)
