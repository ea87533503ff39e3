"""What `bench_attention` times: our methods, peers, one device, one rank of larger rings; all of the same tensors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema import ConfigError
from recipes.benchmark.baselines import BASELINES
from recipes.engine.build import build_attention
from recipes.planning.plan import DTYPES, Plan
from ring_attention import CAUSAL
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KernelSpec, choose_kernel
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout
from ring_attention.ring import Ring, ring_backward, ring_forward

METHODS = ("ring", "ulysses", "hybrid", "all_gather")  # of ours
SIMULATED_DEGREES = (2, 4, 8, 16, 32, 64)

Shards = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout of [B, S, heads, D]


@dataclass
class Candidate:
    """What is timed: calls of no arguments, and how much of the whole each device computes.

    Args:
        sends: whether it exchanges messages, which can be turned off.
        around: what calls must be within.
    """

    name: str
    grid: str
    forward: Callable[[], Any]
    forward_backward: Callable[[], Any]
    share: float
    sends: bool = False
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def draw(plan: Plan, device: torch.device) -> Shards:
    """Whole sequences, the same on all ranks."""
    model, config = plan.config.model, plan.config
    generator = torch.Generator(device).manual_seed(config.seed)
    counts = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    q, k, v, dout = (
        torch.randn(
            config.engine.micro_batch_size,
            config.data.sequence_length,
            heads,
            model.head_dim,
            device=device,
            generator=generator,
        ).to(DTYPES[config.engine.dtype])
        for heads in counts
    )
    return q, k, v, dout


def make_from_module(module: Any, shards: Shards, name: str, grid: str, share: float, sends: bool = False) -> Candidate:
    """A module with DistributedAttention's contract."""
    q, k, v, dout = shards
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return module(q, k, v, 0)

    def forward_backward() -> Any:
        return torch.autograd.grad(module(*leaves, 0), leaves, dout)

    return Candidate(name, grid, forward, forward_backward, share, sends)


def make_from_method(
    plan: Plan, method: str, transport: str, groups: ParallelGroups, whole: Shards, expected: Tensor, name: str
) -> tuple[Candidate, float]:
    """One of METHODS on all ranks, and the error of this rank's output.

    Raises:
        ValueError: if the method cannot do this on so many ranks.
    """
    config = copy.deepcopy(plan.config)
    config.attention.method, config.attention.transport, config.parallelism.method = method, transport, "sequence"
    for kind in ("data", "ring", "ulysses"):
        setattr(config.parallelism, f"{kind}_degree", 1 if kind == "data" else None)
    heads = config.model.num_kv_heads
    if method == "ulysses" and heads % plan.num_ranks:  # unequal parts need DeepSpeed's mpu, which only an engine gives
        raise ConfigError(f"{heads} kv heads are not a multiple of the {plan.num_ranks} ranks")
    own = Plan(config, plan.num_ranks, plan.device_type, plan.device_name, plan.capability, plan.ranks_per_host)
    if method == "hybrid" and 1 in (own.degrees.ring, own.degrees.ulysses):
        raise ConfigError("on so many ranks the same as one of the others")
    module = build_attention(own, groups)
    rank, layout = module.sequence_rank, own.layout
    q, k, v, dout = (layout.shard(x, rank, dim=1) for x in whole)
    # k and v as the recipes' model gives them: one message
    k, v = torch.stack((k, v)).unbind(0)
    grid = " x ".join(f"{n} {kind}" for kind, n in own.degrees._asdict().items() if n > 1)
    candidate = make_from_module(module, (q, k, v, dout), name, grid, 1 / plan.num_ranks, sends=True)
    return candidate, _error(candidate, layout, rank, expected)


def make_baseline(
    peer: str,
    length: int,
    groups: ParallelGroups,
    whole: Shards,
    expected: Tensor,
    name: str,
) -> tuple[Candidate, float]:
    """One of BASELINES on all ranks, and the error of this rank's output.

    Raises:
        ValueError: if it cannot run here.
    """
    other, rank = BASELINES[peer](groups, length, KernelSpec.of(*whole[:3])), groups.get_sequence_parallel_rank()
    q, k, v, dout = (other.layout.shard(x, rank, dim=1).contiguous() for x in whole)
    share = 1 / groups.sequence_degree
    candidate = make_from_module(lambda q, k, v, _: other.attend(q, k, v), (q, k, v, dout), name, "", share)
    candidate.around = other.around
    return candidate, _error(candidate, other.layout, rank, expected)


def _error(candidate: Candidate, layout: Layout, rank: int, expected: Tensor) -> float:
    """Of its output on this rank, padding left out."""
    valid = layout.positions(rank).to(expected.device) < layout.length
    with candidate.around():
        got = candidate.forward()[:, valid].float()
    wanted = layout.shard(expected, rank, dim=1)[:, valid].float()
    return ((got - wanted).norm() / wanted.norm()).item()


class _Alone(Ring):
    """A ring whose messages are this rank's own keys and values; no gradients travel."""

    def post_keys(self, own: KeysValues, here: KeysValues | None, number: int, direction: str) -> Any:
        return None, own if number + 1 < len(self.steps) else None

    def post_gradients(self, own: KeysValues, step: Any, number: int, gradients: KeysValues | None) -> Any:
        return None, None if step.gradient_return is None else own.empty(step.gradient_return.spans)


def simulated(plan: Plan, whole: Shards, degree: int) -> Candidate:
    """Rank 0 of a larger ring."""
    layout = Layout(plan.config.attention.layout, degree, plan.config.data.sequence_length)
    q, k, v, dout = (layout.shard(x, 0, dim=1) for x in whole)
    kv = KeysValues.of_parts(k, v)
    kv = kv.take(kv.spans)
    block = choose_kernel(KernelSpec.of(q, k, v), plan.config.attention.kernel)[0]
    ring = _Alone(layout, CAUSAL, None, block, plan.config.model.head_dim**-0.5)

    def forward_backward() -> Any:
        return ring_backward(ring, dout, q, kv, *ring_forward(ring, q, kv))

    return Candidate(
        f"ring of {degree}",
        f"{layout.local_length:,} tokens",
        lambda: ring_forward(ring, q, kv),
        forward_backward,
        1 / degree,
    )
