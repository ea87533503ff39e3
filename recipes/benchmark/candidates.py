"""The candidates that `bench_attention` times: our methods, baselines, one device, and simulated larger rings.

All compute the same attention of the same random tensors.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema import ConfigError
from recipes.benchmark.baselines import BASELINES
from recipes.engine.base import max_over_ranks
from recipes.engine.build import build_attention
from recipes.planning.plan import DTYPES, Plan
from ring_attention import CAUSAL, LocalAttention
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KernelSpec, choose_kernel
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout
from ring_attention.ring import Ring, ring_backward, ring_forward

METHODS = ("ring", "ulysses", "hybrid", "all_gather")
SIMULATED_DEGREES = (2, 4, 8, 16, 32, 64)
MAX_ERROR = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}  # of an output, relative: several roundings

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout, each [B, S, heads, D]


@dataclass(frozen=True)
class Candidate:
    """What is timed.

    Args:
        share: the fraction of the attention that each device computes.
        forward: one call without gradients; returns this rank's output.
        forward_backward: one call with its backward pass.
        positions: of this rank's tokens in the sequence, [S]; None if it holds all of them.
        has_messages: whether its messages can be kept on their rank.
        context: what the calls must run within.
    """

    name: str
    grid: str
    share: float
    forward: Callable[[], Any]
    forward_backward: Callable[[], Any]
    positions: Tensor | None = None
    has_messages: bool = False
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def error(self, expected: Tensor) -> float:
        """The relative error of this rank's output against the full sequence's, without padding."""
        assert self.positions is not None
        positions = self.positions.to(expected.device)
        is_token = positions < expected.shape[1]
        with self.context():
            got = self.forward()[:, is_token].float()
        wanted = expected[:, positions[is_token]].float()
        return ((got - wanted).norm() / wanted.norm()).item()


def make_candidates(plan: Plan, device: torch.device, say: Callable[..., None]) -> list[Candidate]:
    """One device, then all that runs on these ranks; a single rank simulates larger rings. Every rank must call it.

    Args:
        say: takes a line about each candidate that is left out.

    Raises:
        RuntimeError: if an output differs from that of full attention.
    """
    config = plan.config
    inputs, attention = _random_inputs(plan, device), LocalAttention(config.attention.kernel)
    one_device = _make("one device", "full sequences", 1.0, lambda q, k, v: attention(q, k, v, 0), inputs)
    if plan.num_ranks == 1:
        degrees = [degree for degree in SIMULATED_DEGREES if 2 * degree <= config.data.sequence_length]
        return [one_device, *(_make_simulated(plan, inputs, degree) for degree in degrees)]
    makers: dict[str, Callable[..., Candidate]] = {
        method: functools.partial(_make_method, plan, method, plan.transport) for method in METHODS
    }
    if plan.transport != "p2p":
        makers["ring, p2p"] = functools.partial(_make_method, plan, "ring", "p2p")
    makers |= dict.fromkeys(BASELINES, _make_baseline)
    groups, expected = ParallelGroups(1, plan.num_ranks), one_device.forward()
    candidates = [one_device]
    for name, make in makers.items():
        try:
            candidate = make(name, groups, inputs)
        except ValueError as refusal:
            say(f"left out: {name}: {refusal}")
            continue
        error = max_over_ranks(candidate.error(expected), device)
        if not error < MAX_ERROR[config.engine.dtype]:
            raise RuntimeError(f"the output of {name} differs from that of full attention: relative error {error:.1e}")
        candidates.append(candidate)
    return candidates


def _random_inputs(plan: Plan, device: torch.device) -> Inputs:
    """Full sequences, equal on all ranks."""
    config, model = plan.config, plan.config.model
    generator = torch.Generator(device).manual_seed(config.seed)

    def draw(heads: int) -> Tensor:
        shape = (config.engine.micro_batch_size, config.data.sequence_length, heads, model.head_dim)
        return torch.randn(shape, device=device, generator=generator).to(DTYPES[config.engine.dtype])

    return draw(model.num_heads), draw(model.num_kv_heads), draw(model.num_kv_heads), draw(model.num_heads)


def _make_method(
    plan: Plan, method: str, transport: str, name: str, groups: ParallelGroups, inputs: Inputs
) -> Candidate:
    """One of METHODS over all ranks.

    Raises:
        ValueError: if the method does not fit the ranks or the heads.
    """
    config = copy.deepcopy(plan.config)
    config.attention.method, config.attention.transport, config.parallelism.method = method, transport, "sequence"
    parallelism = config.parallelism
    parallelism.data_degree, parallelism.ring_degree, parallelism.ulysses_degree = 1, None, None
    num_kv_heads = config.model.num_kv_heads
    if method == "ulysses" and num_kv_heads % plan.num_ranks:  # uneven heads need DeepSpeed's mpu, hence an engine
        raise ConfigError(f"{num_kv_heads} kv heads are not a multiple of the {plan.num_ranks} ranks")
    own = Plan(config, plan.num_ranks, plan.device_type, plan.device_name, plan.capability, plan.ranks_per_host)
    if method == "hybrid" and 1 in (own.degrees.ring, own.degrees.ulysses):
        raise ConfigError(f"on {plan.num_ranks} ranks it is the same as ring or ulysses")
    module = build_attention(own, groups)
    q, k, v, dout = (own.layout.shard(x, module.sequence_rank, dim=1) for x in inputs)
    k, v = torch.stack((k, v)).unbind(0)  # one message, as the recipes' model gives them
    return _make(
        name,
        " x ".join(f"{degree} {kind}" for kind, degree in own.degrees._asdict().items() if degree > 1),
        1 / plan.num_ranks,
        lambda q, k, v: module(q, k, v, 0),
        (q, k, v, dout),
        positions=own.layout.positions(module.sequence_rank),
        has_messages=True,
    )


def _make_baseline(name: str, groups: ParallelGroups, inputs: Inputs) -> Candidate:
    """One of BASELINES over all ranks.

    Raises:
        ValueError: if it cannot run here.
    """
    baseline = BASELINES[name](groups, inputs[0].shape[1], KernelSpec.of(*inputs[:3]))
    rank = groups.get_sequence_parallel_rank()
    q, k, v, dout = (baseline.layout.shard(x, rank, dim=1).contiguous() for x in inputs)
    return _make(
        name,
        "",
        1 / groups.sequence_degree,
        baseline.attend,
        (q, k, v, dout),
        positions=baseline.layout.positions(rank),
        context=baseline.context,
    )


def _make(
    name: str, grid: str, share: float, attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, **more: Any
) -> Candidate:
    q, k, v, dout = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def forward_backward() -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, dout)

    return Candidate(name, grid, share, forward, forward_backward, **more)


class _Alone(Ring):
    """A ring whose messages are this rank's own keys and values; no gradients travel."""

    def post_keys(self, own: KeysValues, here: KeysValues | None, number: int, direction: str) -> Any:
        return None, own if number + 1 < len(self.steps) else None

    def post_gradients(self, own: KeysValues, step: Any, number: int, gradients: KeysValues | None) -> Any:
        return None, None if step.gradient_return is None else own.empty(step.gradient_return.spans)


def _make_simulated(plan: Plan, inputs: Inputs, degree: int) -> Candidate:
    """Rank 0 of a ring of `degree`, which costs its tiles and merges but no communication."""
    layout = Layout(plan.config.attention.layout, degree, plan.config.data.sequence_length)
    q, k, v, dout = (layout.shard(x, 0, dim=1) for x in inputs)
    kv = KeysValues.of_parts(k, v)
    kv = kv.take(kv.spans)
    kernel = choose_kernel(KernelSpec.of(q, k, v), plan.config.attention.kernel)[0]
    ring = _Alone(layout, CAUSAL, None, kernel, plan.config.model.head_dim**-0.5)

    def forward() -> Any:
        return ring_forward(ring, q, kv)

    def forward_backward() -> Any:
        return ring_backward(ring, dout, q, kv, *ring_forward(ring, q, kv))

    return Candidate(f"ring of {degree}", f"{layout.local_length:,} tokens", 1 / degree, forward, forward_backward)
