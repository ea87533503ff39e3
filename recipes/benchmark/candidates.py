"""What `bench_attention` times, on the same random tensors: our methods, baselines, one device, and simulated rings."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.schema import ConfigError, ParallelismConfig, document_lengths
from recipes.benchmark.baselines import BASELINES, ShardedAttention
from recipes.benchmark.packed_baselines import PACKED_BASELINES, varlen
from recipes.benchmark.rank_alone import rank_alone
from recipes.engine.base import max_over_ranks
from recipes.engine.build import build_attention
from recipes.planning.plan import DTYPES, Plan
from ring_attention import CAUSAL, LocalAttention, Mask
from ring_attention.balance import COPY
from ring_attention.direct import attend_over_ring
from ring_attention.direct_routing import goes_direct, local_runs
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KernelSpec, Scores, choose_kernel
from ring_attention.layout import Layout
from ring_attention.ring import Ring
from ring_attention.schedule import work_per_rank

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
    inputs, local, mask = _random_inputs(plan, device), LocalAttention(plan.config.attention.kernel), _mask(plan)
    spec = KernelSpec.of(inputs[0], inputs[1], inputs[2])
    full = Layout("contiguous", 1, plan.config.data.sequence_length)
    one_device = ShardedAttention(full, 0, lambda q, k, v: local(q, k, v, 0, mask=mask), "full sequences")
    candidates = [_candidate("one device", one_device, inputs)]
    if plan.num_ranks == 1:
        candidates += [_candidate(name, ring, inputs) for name, ring in _simulated_rings(plan, spec).items()]
    expected, makers = candidates[0].forward(), _makers(plan, spec)
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


def _document_ends(plan: Plan) -> tuple[int, ...] | None:
    """0, then the end of each document; None without documents."""
    if plan.config.documents is None:
        return None
    return tuple(itertools.accumulate(document_lengths(plan.config), initial=0))


def _mask(plan: Plan) -> Mask:
    ends = _document_ends(plan)
    return CAUSAL if ends is None else CAUSAL.packed(ends)


def _layouts(plan: Plan) -> dict[str, str]:
    """What follows a ring's name, by layout: that of the configuration, and with documents the other that balances."""
    layout = plan.config.attention.layout
    if plan.config.documents is None:
        return {layout: ""}
    others = {"zigzag": ("balanced",), "balanced": ("zigzag",), "contiguous": ()}[layout]
    return {name: f", {name}" for name in (layout, *others)}


def _makers(plan: Plan, spec: KernelSpec) -> dict[str, Callable[[], ShardedAttention]]:
    """What makes the candidates that compute full attention, by name: on several ranks our methods, then baselines."""
    makers: dict[str, Callable[[], ShardedAttention]] = {}
    ends, length = _document_ends(plan), plan.config.data.sequence_length
    if plan.num_ranks > 1:
        groups, layouts = ParallelGroups(1, plan.num_ranks), _layouts(plan)
        ours = [(method, method, plan.transport) for method in METHODS]
        if plan.transport != "p2p":
            ours.append(("ring, p2p", "ring", "p2p"))
        for name, method, transport in ours:
            # the ranks of Ulysses compute on full sequences
            suffixes = {plan.config.attention.layout: ""} if method == "ulysses" else layouts
            for layout, suffix in suffixes.items():
                makers[name + suffix] = functools.partial(_our_method, plan, method, transport, layout, groups)
        if ends is None:
            makers |= {name: functools.partial(make, groups, length, spec) for name, make in BASELINES.items()}
        else:
            makers |= {name: functools.partial(make, groups, ends, spec) for name, make in PACKED_BASELINES.items()}
    if ends is not None:
        makers["varlen"] = functools.partial(varlen, ends, spec)
    return makers


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


def _our_method(plan: Plan, method: str, transport: str, layout_name: str, groups: ParallelGroups) -> ShardedAttention:
    """One of METHODS over all ranks. Raises ValueError if it does not fit the ranks or the heads."""
    num_kv_heads = plan.config.model.num_kv_heads
    if method == "ulysses" and num_kv_heads % plan.num_ranks:  # uneven heads need DeepSpeed's mpu, hence an engine
        raise ConfigError(f"{num_kv_heads} kv heads are not a multiple of the {plan.num_ranks} ranks")
    attention = dataclasses.replace(plan.config.attention, method=method, transport=transport, layout=layout_name)
    config = dataclasses.replace(plan.config, attention=attention, parallelism=ParallelismConfig(data_degree=1))
    own = dataclasses.replace(plan, config=config)
    if method == "hybrid" and 1 in (own.degrees.ring, own.degrees.ulysses):
        raise ConfigError(f"on {plan.num_ranks} ranks it is the same as ring or ulysses")
    module, mask = build_attention(own, groups), _mask(plan)
    layout = module.layout(plan.config.data.sequence_length, _document_ends(plan))
    grid = " x ".join(f"{degree} {kind}" for kind, degree in own.degrees._asdict().items() if degree > 1)

    def attend(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        return module(q_BSHD, k_BSKD, v_BSKD, 0, mask=mask)

    return ShardedAttention(layout, module.sequence_rank, attend, grid, has_messages=True, module=module)


def _simulated_rings(plan: Plan, spec: KernelSpec) -> dict[str, ShardedAttention]:
    """By name, the busiest rank of each ring, which costs its tiles and merges but no communication."""
    length, ends, mask, rings = plan.config.data.sequence_length, _document_ends(plan), _mask(plan), {}
    kernel = choose_kernel(spec, plan.config.attention.kernel)[0]
    degrees = [degree for degree in SIMULATED_DEGREES if 2 * degree <= length]
    for degree, (name, suffix) in itertools.product(degrees, _layouts(plan).items()):
        layout = Layout(name, degree, length, documents=ends if name == "balanced" else None)
        rank = busiest_rank(layout, mask)
        ring = rank_alone(layout, mask, rank, kernel, Scores(plan.config.model.head_dim**-0.5))
        attend, grid = functools.partial(_ring_attention, ring), f"{layout.local_length:,} tokens"
        rings[f"ring of {degree}{suffix}"] = ShardedAttention(layout, rank, attend, grid)
    return rings


def busiest_rank(layout: Layout, mask: Mask) -> int:
    """The one with the most work, copies of keys included."""
    work = [sum(of_rank) for of_rank in work_per_rank(layout, mask)]
    if goes_direct(layout, mask):
        for rank in range(layout.ring_degree):
            of_rest = local_runs(layout, mask, rank).of_rest
            work[rank] += COPY * sum(run.stop - first_key for run, first_key, _ in of_rest)
    return work.index(max(work))


def _ring_attention(ring: Ring, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
    return attend_over_ring(q_BSHD, k_BSKD, v_BSKD, None, ring)
