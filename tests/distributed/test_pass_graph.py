"""Passes as graphs on the CPU, where a graph's stand-in computes the pass again. tests/gpu/test_ring.py has CUDA's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from recipes.planning.pass_graphs import GraphMemory
from ring_attention import CAUSAL, FULL, Mask, pass_graph
from ring_attention.kernels import KERNELS
from ring_attention.kernels.reference import ReferenceKernel
from ring_attention.trace import visible_ring_steps
from ring_attention.transport import copy_engine, messages_stay_local
from tests.cases import Case, attend, build, check, draw, world
from tests.distributed.test_copy_engine import emulated
from tests.pool import WorkerPool

LENGTH = 48


class CapturedKernel(ReferenceKernel):
    can_be_captured = True


@contextlib.contextmanager
def graphs_on_the_cpu() -> Iterator[list[str]]:
    """Yields what happens: "capture" and "replay"."""
    events: list[str] = []

    def capture(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        events.append("capture")
        [(buffers, _)] = copy_engine._symmetric_buffers.values()
        assert buffers is not None
        assert buffers.are_in_graph
        results = compute()

        def replay() -> None:
            events.append("replay")
            buffers.are_in_graph = True  # a graph's messages keep their flags
            new = compute()
            buffers.are_in_graph = False
            for result, values in zip(results, new, strict=True):
                result.copy_(values)

        return results, replay

    kernels = patch.dict(KERNELS, {"reference": CapturedKernel()})
    with emulated(), kernels, patch.object(pass_graph, "capture", capture):
        yield events


def passes(case: Case, factors: list[float]) -> tuple[list[Tensor], list[str]]:
    """Results of the last of several passes, whose inputs differ by factors; and what happened."""
    with graphs_on_the_cpu() as events:
        module = build(case, world())
        results = [attend(case, module, [factor * x for x in draw(case)]) for factor in factors]
        return results[-1], events


CASES = [
    Case("ring", 4, 1, layout, mask, LENGTH, 2, dtype=dtype, kernel="reference", transport="copy_engine")
    for layout in ("zigzag", "contiguous")
    for mask in (CAUSAL, FULL, Mask(9))
    for dtype in (torch.float64, torch.bfloat16)[: 2 if mask == CAUSAL else 1]
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replayed_passes_equal_whole_attention(pool: WorkerPool, case: Case):
    ranks = pool.run(passes, case, [3.0, 2.0, 0.5, 1.0], num_ranks=4)
    check(case, [results for results, _ in ranks])
    assert [events for _, events in ranks] == [["capture", "capture", *["replay"] * 4]] * 4


@pytest.mark.parametrize("wrapper", ["visible", "local"])
def test_passes_that_others_look_into_have_no_graph(pool: WorkerPool, wrapper: str):
    """They change places with those that have one: both send through the same buffers."""
    case = CASES[0]
    ranks = pool.run(passes_in_turn, case, wrapper, num_ranks=4)
    check(case, [results for results, _ in ranks])
    assert [events for _, events in ranks] == [["capture", "capture", *["replay"] * 4]] * 4


def passes_in_turn(case: Case, wrapper: str) -> tuple[list[Tensor], list[str]]:
    inside = {"visible": visible_ring_steps, "local": messages_stay_local}[wrapper]
    with graphs_on_the_cpu() as events:
        module = build(case, world())
        for factor in (4.0, 3.0, 2.0, 1.0):
            with inside():
                attend(case, module, draw(case))
            results = attend(case, module, [factor * x for x in draw(case)])
        return results, events


@pytest.mark.parametrize("masks", [(CAUSAL,), (CAUSAL, Mask(9))])
def test_graphs_keep_what_is_predicted(pool: WorkerPool, masks: tuple[Mask, ...]):
    """Inputs and results, counted. The layers of one mask share them."""
    case = replace(CASES[0], num_ranks=2, dtype=torch.bfloat16)
    queries, keys = case.num_heads * case.head_dim, case.num_kv_heads * case.head_dim
    memory = GraphMemory(case.num_heads, queries, keys, 2, len(masks))
    predicted = memory.kept(memory.results) * case.batch * LENGTH // 2
    layers = [replace(case, mask=mask) for mask in masks] * 3
    assert pool.run(kept_bytes, layers, num_ranks=2) == [predicted] * 2


def kept_bytes(layers: list[Case]) -> int:
    """Of all graphs after a pass through these layers, forward and backward."""
    with graphs_on_the_cpu():
        for case in layers:
            attend(case, build(case, world()), draw(case))
        [(buffers, _)] = copy_engine._symmetric_buffers.values()
        assert buffers is not None
        kept = [tensor for graph in buffers.graphs.values() for tensor in (*graph._inputs, *graph._results)]
        return sum(tensor.nbytes for tensor in kept)
