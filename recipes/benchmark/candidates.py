"""What `bench_attention` times, on the same random tensors: our methods, baselines, one device, and simulated rings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.schema import ConfigError, ParallelismConfig
from recipes.benchmark.baselines import BASELINES, ShardedAttention
from recipes.engine.base import max_over_ranks
from recipes.engine.build import build_attention
from recipes.planning.plan import DTYPES, Plan
from ring_attention import CAUSAL, LocalAttention
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KernelSpec, Scores, choose_kernel
from ring_attention.kv import KeysValues
from ring_attention.layout import Layout
from ring_attention.ring import Ring, RingFunction

METHODS = ("ring", "ulysses", "hybrid", "all_gather")
SIMULATED_DEGREES = (2, 4, 8, 16, 32, 64)
MAX_ERROR = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}  # of an output, relative: several roundings


class Candidate(NamedTuple):
    """What is timed."""

    name: str
    attention: ShardedAttention
    forward: Callable[[], Tensor]  # one call without gradients; returns this rank's output
    forward_backward: Callable[[], Any]  # one call with its backward pass


def make_candidates(plan: Plan, device: torch.device, say: Callable[..., None]) -> list[Candidate]:
    """One device, then all that runs on these ranks; a single rank simulates larger rings. Every rank must call it.

    `say` takes a line about each candidate that is left out.

    Raises:
        RuntimeError: if an output differs from that of full attention.
    """
    inputs, local = _random_inputs(plan, device), LocalAttention(plan.config.attention.kernel)
    spec, length = KernelSpec.of(inputs[0], inputs[1], inputs[2]), plan.config.data.sequence_length
    full = ShardedAttention(Layout("contiguous", 1, length), 0, lambda q, k, v: local(q, k, v, 0), "full sequences")
    one_device = _candidate("one device", full, inputs)
    if plan.num_ranks == 1:
        degrees = [degree for degree in SIMULATED_DEGREES if 2 * degree <= length]
        rings = {f"ring of {degree}": _simulated_ring(plan, spec, degree) for degree in degrees}
        return [one_device, *(_candidate(name, ring, inputs) for name, ring in rings.items())]
    groups, expected, candidates = ParallelGroups(1, plan.num_ranks), one_device.forward(), [one_device]
    makers = {method: functools.partial(_our_method, plan, method, plan.transport, groups) for method in METHODS}
    if plan.transport != "p2p":
        makers["ring, p2p"] = functools.partial(_our_method, plan, "ring", "p2p", groups)
    makers |= {name: functools.partial(make, groups, length, spec) for name, make in BASELINES.items()}
    for name, make in makers.items():
        try:
            candidate = _candidate(name, make(), inputs)
        except ValueError as refusal:
            say(f"left out: {name}: {refusal}")
            continue
        error = max_over_ranks(_relative_error(candidate, expected), device)
        if not error < MAX_ERROR[plan.config.engine.dtype]:
            raise RuntimeError(f"the output of {name} differs from that of full attention: relative error {error:.1e}")
        if (module := candidate.attention.module) and module.transport_reason:
            say(f"{name}: messages go by {module.transport_used}, because {module.transport_reason}")
        candidates.append(candidate)
    return candidates


def _random_inputs(plan: Plan, device: torch.device) -> list[Tensor]:
    """Full sequences of q, k, v and dout, each [B, L, heads, D], equal on all ranks."""
    config, model = plan.config, plan.config.model
    generator = torch.Generator(device).manual_seed(config.seed)
    batch, length, dtype = config.engine.micro_batch_size, config.data.sequence_length, DTYPES[config.engine.dtype]
    return [
        torch.randn(batch, length, heads, model.head_dim, device=device, generator=generator).to(dtype)
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    ]


def _candidate(name: str, attention: ShardedAttention, inputs: list[Tensor]) -> Candidate:
    layout, attend = attention.layout, attention.attend
    q, k, v, dout = inputs
    if layout.local_length < layout.padded_length:
        q, k, v, dout = (layout.shard(x, attention.rank, dim=1) for x in inputs)
        k, v = torch.stack((k, v)).unbind(0)  # one message, as the recipes' model gives them
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    return Candidate(name, attention, forward, lambda: torch.autograd.grad(attend(*leaves), leaves, dout))


def _relative_error(candidate: Candidate, expected: Tensor) -> float:
    """Of this rank's output against the full sequence's, without padding."""
    attention = candidate.attention
    positions = attention.layout.positions(attention.rank).to(expected.device)
    is_token = positions < attention.layout.length
    with attention.context():
        got = candidate.forward()[:, is_token].float()
    wanted = expected[:, positions[is_token]].float()
    return ((got - wanted).norm() / wanted.norm()).item()


def _our_method(plan: Plan, method: str, transport: str, groups: ParallelGroups) -> ShardedAttention:
    """One of METHODS over all ranks. Raises ValueError if it does not fit the ranks or the heads."""
    num_kv_heads = plan.config.model.num_kv_heads
    if method == "ulysses" and num_kv_heads % plan.num_ranks:  # uneven heads need DeepSpeed's mpu, hence an engine
        raise ConfigError(f"{num_kv_heads} kv heads are not a multiple of the {plan.num_ranks} ranks")
    attention = dataclasses.replace(plan.config.attention, method=method, transport=transport)
    config = dataclasses.replace(plan.config, attention=attention, parallelism=ParallelismConfig(data_degree=1))
    own = dataclasses.replace(plan, config=config)
    if method == "hybrid" and 1 in (own.degrees.ring, own.degrees.ulysses):
        raise ConfigError(f"on {plan.num_ranks} ranks it is the same as ring or ulysses")
    module = build_attention(own, groups)
    grid = " x ".join(f"{degree} {kind}" for kind, degree in own.degrees._asdict().items() if degree > 1)
    return ShardedAttention(
        own.layout, module.sequence_rank, lambda q, k, v: module(q, k, v, 0), grid, has_messages=True, module=module
    )


class _Alone(Ring):
    """A ring whose messages are this rank's own keys and values; no gradients travel."""

    def post_keys(self, own: KeysValues, here: KeysValues | None, number: int, direction: str) -> Any:
        return None, own if number + 1 < len(self.steps) else None

    def post_gradients(self, own: KeysValues, step: Any, number: int, gradients: KeysValues | None) -> Any:
        return None, None if step.gradient_return is None else own.empty(step.gradient_return.spans)


def _simulated_ring(plan: Plan, spec: KernelSpec, degree: int) -> ShardedAttention:
    """Rank 0 of a ring of `degree`, which costs its tiles and merges but no communication."""
    layout = Layout(plan.config.attention.layout, degree, plan.config.data.sequence_length)
    kernel = choose_kernel(spec, plan.config.attention.kernel)[0]
    ring = _Alone(layout, CAUSAL, None, kernel, Scores(plan.config.model.head_dim**-0.5))
    grid = f"{layout.local_length:,} tokens"
    return ShardedAttention(layout, 0, lambda q, k, v: RingFunction.apply(q, k, v, None, ring), grid)
