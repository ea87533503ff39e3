"""Passes as graphs on the CPU, where a graph's stand-in computes the pass again. tests/gpu/test_ring.py has CUDA's."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from recipes.planning.pass_graphs import GraphMemory
from ring_attention import CAUSAL, FULL, Mask, RingAttention, pass_graph
from ring_attention.kernels import KERNELS
from ring_attention.kernels.base import Segments
from ring_attention.kernels.reference import ReferenceKernel
from ring_attention.ring import backward_calls, forward_calls
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
            assert buffers.stream._jobs.empty(), "a graph's copies do not wait for those of the stream"  # pyright: ignore[reportAttributeAccessIssue]
            buffers.are_in_graph = True  # a graph's messages keep their flags
            new = compute()
            buffers.are_in_graph = False
            with torch.inference_mode():  # a graph writes to tensors that were made in any mode
                for result, values in zip(results, new, strict=True):
                    result.copy_(values)

        return results, replay

    kernels = patch.dict(KERNELS, {"reference": CapturedKernel()})
    with emulated(), kernels, patch.object(pass_graph, "capture", capture):
        yield events


def all_graphs() -> list[pass_graph.PassGraph]:
    [(buffers, _)] = copy_engine._symmetric_buffers.values()
    assert buffers is not None
    return [graph for of_order in buffers.graphs.values() for graph in of_order.values()]


def passes(case: Case, factors: tuple[float, ...]) -> tuple[list[list[Tensor]], list[str]]:
    """Results of passes whose inputs differ by factors, and what happened."""
    with graphs_on_the_cpu() as events:
        module = build(case, world())
        return [attend(case, module, [factor * x for x in draw(case)]) for factor in factors], events


CASES = [
    Case("ring", 4, 1, layout, mask, LENGTH, 2, dtype=dtype, kernel="reference", transport="copy_engine")
    for layout in ("zigzag", "contiguous")
    for mask in (CAUSAL, FULL, Mask(9))
    for dtype in (torch.float64, torch.bfloat16)[: 2 if mask == CAUSAL else 1]
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_passes_before_and_after_the_capture_equal_whole_attention(pool: WorkerPool, case: Case):
    factors = (1.0, 1.0, 0.5, 1.0)
    ranks = pool.run(passes, case, factors, num_ranks=4)
    for number, factor in enumerate(factors):
        if factor == 1.0:
            check(case, [results[number] for results, _ in ranks])
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


def test_beyond_the_most_graphs_passes_stay_exact_and_none_is_made(pool: WorkerPool):
    cases = [replace(CASES[0], mask=mask) for mask in (CAUSAL, Mask(9))]
    ranks = pool.run(passes_with_two_graphs, cases, num_ranks=4)
    for case, *results in zip(cases, *(results for results, _ in ranks), strict=True):
        check(case, results)
    assert [num_graphs for _, num_graphs in ranks] == [2] * 4


def passes_with_two_graphs(cases: list[Case]) -> tuple[list[list[Tensor]], int]:
    """The last of three passes of each case, of which the first one's get the graphs."""
    with graphs_on_the_cpu(), patch.object(pass_graph, "MOST_GRAPHS", 2):
        modules = [build(case, world()) for case in cases]
        passes = [[attend(*one, draw(one[0])) for one in zip(cases, modules, strict=True)] for _ in range(3)]
        return passes[-1], len(all_graphs())


def test_micro_batches_share_no_results(pool: WorkerPool):
    """Their forward passes come first, then their backward passes, which replay the same graphs."""
    ranks = pool.run(two_micro_batches, CASES[0], num_ranks=4)
    for of_micro_batch in zip(*ranks, strict=True):
        check(CASES[0], list(of_micro_batch))


def two_micro_batches(case: Case) -> list[list[Tensor]]:
    """The last of three passes over two equal micro-batches, between which the graphs have other inputs."""
    with graphs_on_the_cpu():
        module, results = build(case, world()), []
        rank: Any = module.sequence_rank
        for _ in range(3):
            shards = [case.global_layout.shard(x, rank, dim=1) for x in draw(case)]
            inputs = [[(factor * x).requires_grad_() for x in shards[:3]] for factor in (1.0, 2.0, 1.0)]
            outs = [module(*leaves, 0) for leaves in inputs]
            for out in outs:
                out.backward(shards[3])
            results = [
                [out.detach(), *(leaf.grad for leaf in leaves)] for out, leaves in zip(outs, inputs, strict=True)
            ]
        return [results[0], results[2]]


def test_a_replay_waits_for_the_copies_of_an_abandoned_pass(pool: WorkerPool):
    case = CASES[0]
    ranks = pool.run(replayed_after_an_abandoned_pass, case, num_ranks=4)
    check(case, [results for results, _ in ranks])
    assert [events for _, events in ranks] == [["capture", "capture", "replay", "replay"]] * 4


def replayed_after_an_abandoned_pass(case: Case) -> tuple[list[Tensor], list[str]]:
    with graphs_on_the_cpu() as events:
        module = build(case, world())
        for _ in range(2):
            attend(case, module, draw(case))
        [(buffers, _)] = copy_engine._symmetric_buffers.values()
        assert buffers is not None
        buffers.stream._jobs.put(lambda: time.sleep(0.1))  # pyright: ignore[reportAttributeAccessIssue]
        failing = patch("ring_attention.ring.attend_forward", side_effect=MemoryError)
        with visible_ring_steps(), failing, pytest.raises(MemoryError):
            attend(case, module, draw(case))
        return attend(case, module, draw(case)), events


def test_passes_in_inference_mode_leave_nothing_that_training_cannot_write_to(pool: WorkerPool):
    """Neither receive buffers nor a graph's inputs: tensors made in that mode can be written to only within it."""
    case = CASES[0]
    ranks = pool.run(trained_between_inference, case, num_ranks=4)
    check(case, [results for results, _ in ranks])
    # the second forward pass and its replay, and the second backward pass
    assert [events for _, events in ranks] == [["capture", "replay", "capture"]] * 4


def trained_between_inference(case: Case) -> tuple[list[Tensor], list[str]]:
    with graphs_on_the_cpu() as events:
        module, results = build(case, world()), []
        rank: Any = module.sequence_rank
        for _ in range(2):
            with torch.inference_mode():
                module(*(case.global_layout.shard(x, rank, dim=1) for x in draw(case)[:3]), 0)
            results = attend(case, module, draw(case))
        return results, events


def test_modules_of_one_group_with_other_ring_orders_share_no_graph(pool: WorkerPool):
    case = CASES[0]
    ranks = pool.run(passes_in_two_orders, case, num_ranks=4)
    for of_module in zip(*ranks, strict=True):
        check(case, [results for _, results in sorted(of_module, key=lambda one: one[0])])


def passes_in_two_orders(case: Case) -> list[tuple[int, list[Tensor]]]:
    """Of each module: its sequence rank, and the last of three passes."""
    with graphs_on_the_cpu():
        options: dict[str, Any] = {"layout": case.layout, "transport": case.transport}
        modules = [RingAttention(case.kernel, world(), hosts=hosts, **options) for hosts in ("aaaa", "abab")]
        passes = [[attend(case, module, draw(case)) for module in modules] for _ in range(3)]
        return [(module.sequence_rank, results) for module, results in zip(modules, passes[-1], strict=True)]


def test_a_graph_keeps_the_segments_of_its_calls(pool: WorkerPool):
    """Each replay reads their tensors, while a plan of calls leaves its cache after 16 others."""
    ranks = pool.run(segments_without_plans, replace(CASES[0], mask=Mask(9)), num_ranks=4)
    # a window on two chunks: forward and backward, on all ranks but the last one, whose chunks are neighbours
    assert ranks == [(2, 2)] * 3 + [(0, 0)]


def segments_without_plans(case: Case) -> tuple[int, int]:
    """How many segments captured calls had, and how many are left once no plan is cached."""
    captured: weakref.WeakSet[Segments] = weakref.WeakSet()
    with graphs_on_the_cpu():
        kernel = KERNELS["reference"]

        def noting(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(tensors: Any, *arguments: Any) -> Any:
                [(buffers, _)] = copy_engine._symmetric_buffers.values()
                if buffers is not None and buffers.are_in_graph:
                    captured.update(x for x in arguments if isinstance(x, Segments))
                return method(tensors, *arguments)

            return call

        with contextlib.ExitStack() as stack:
            for name in ("forward_to", "backward_to"):
                stack.enter_context(patch.object(kernel, name, noting(getattr(kernel, name))))
            for _ in range(2):
                attend(case, build(case, world()), draw(case))
        before = len(captured)
        for plan in (forward_calls, backward_calls):
            plan.cache_clear()
        gc.collect()
        return before, len(captured)


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
        kept = [tensor for graph in all_graphs() for tensor in (*graph._inputs, *graph._results)]
        return sum(tensor.nbytes for tensor in kept)
