"""A ring's pass over few tokens as one CUDA graph, so that its ring steps cost the host nothing.

The host takes 0.1 to 0.4 ms to start the kernels, copies and flags of a ring step, longer than a GPU computes with a
few thousand tokens. The first pass of its kind runs as it is, the second is captured, and later ones replay the graph:
inputs are copied to where the graph reads them, results from where it leaves them.

All ranks must decide alike, because a graph's messages have flags of their own. So what decides is equal on all ranks:
the shapes, the layout, the mask, and how many such passes there were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ring_attention.kernels import AttentionKernel
from ring_attention.trace import profiler_range, ring_steps_are_visible
from ring_attention.transport import messages_are_local

MOST_TOKENS = 4096  # of a rank, over all rows; with more the GPU computes for longer than the host needs
MOST_GRAPHS = 16  # each keeps memory for its inputs and results

Compute = Callable[..., tuple[Tensor, ...]]


def become_graphs(kernel: AttentionKernel, num_tokens: int, are_packed: bool) -> bool:
    """Whether such passes become graphs where all messages are copies (`P2PTransport.graphs`). Forecasts ask it too.

    Args:
        num_tokens: of a ring rank, over all rows.
        are_packed: whether the mask has documents, which are new with each batch.
    """
    return kernel.can_be_captured and num_tokens <= MOST_TOKENS and not are_packed


def has_graphs(ring: Any, q_BSHD: Tensor) -> bool:
    """Whether the passes of a `ring.Ring` with these queries become graphs. The same on all ranks."""
    return (
        ring.transport is not None
        and ring.transport.graphs is not None
        and become_graphs(ring.kernel, len(q_BSHD) * q_BSHD.shape[1], ring.mask.documents is not None)
        and not ring_steps_are_visible()
        and not messages_are_local()
    )


def run_pass(
    ring: Any, name: str, compute: Compute, calls: Callable[[], object], tensors: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`compute(*tensors)`, by its graph once there is one. For a ring that `has_graphs`.

    Args:
        name: "forward" or "backward", of what `compute` does with that ring.
        calls: returns the kernel calls of `compute`, which hold tensors that the graph reads.
    """
    graphs = ring.transport.graphs
    shapes = tuple(None if x is None else (x.shape, x.dtype) for x in tensors)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    key = (name, ring.layout, ring.mask, ring.kernel, ring.scores, shapes, is_deterministic)
    if key not in graphs:
        if len(graphs) == MOST_GRAPHS:
            return compute(*tensors)
        graphs[key] = PassGraph(name)
    return graphs[key](ring.transport, compute, calls, tensors)


class PassGraph:
    """The passes of one kind."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_first = True
        self._inputs: list[Tensor] = []
        self._calls: object = None  # of what was captured; else their plan may leave its cache, and free its tensors
        self._results: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None

    def __call__(
        self, transport: Any, compute: Compute, calls: Callable[[], object], tensors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        if self._is_first:  # compiles kernels
            self._is_first = False
            return compute(*tensors)
        if self._replay is None:
            return self._capture(transport, compute, calls, tensors)
        torch._foreach_copy_(self._inputs, [x for x in tensors if x is not None])
        with transport.watched(f"{self._name} pass"), profiler_range("attention kernel"):
            self._replay()
        return tuple(result.clone() for result in self._results)

    def _capture(
        self, transport: Any, compute: Compute, calls: Callable[[], object], tensors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Returns the results of a pass that is not captured: for the new inputs kernels may compile once more."""
        given = [x for x in tensors if x is not None]
        self._inputs = _side_by_side(given)
        torch._foreach_copy_(self._inputs, given)
        inputs = iter(self._inputs)
        arguments = [None if x is None else next(inputs) for x in tensors]
        results = compute(*arguments)
        self._calls = calls()
        with transport.in_graph():
            self._results, self._replay = capture(lambda: compute(*arguments))
        return results


@torch.inference_mode(False)  # a pass outside of that mode could not write to tensors made in it
def _side_by_side(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors like these. Those of one dtype lie one after the other, so that keys and values are one message."""
    made = list(tensors)
    for dtype in {x.dtype for x in tensors}:
        numbers = [number for number, x in enumerate(tensors) if x.dtype == dtype]
        sizes = [tensors[number].numel() for number in numbers]
        parts = tensors[numbers[0]].new_empty(sum(sizes)).split(sizes)
        for number, part in zip(numbers, parts, strict=True):
            made[number] = part.view(tensors[number].shape)
    return made


def capture(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Returns where the graph of `compute` leaves its results, and the function that runs it."""
    graph = torch.cuda.CUDAGraph()
    # other threads may use the GPU meanwhile: the watchdog asks for events
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
        results = compute()
    return results, graph.replay


@functools.cache
def _pool() -> Any:
    """Memory that all graphs share: no two run at once, and results are copied before the next one runs."""
    return torch.cuda.graph_pool_handle()
