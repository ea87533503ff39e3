"""From a plan to what runs it: the attention module, the engine, and which part of the data this rank takes."""

from __future__ import annotations

from typing import Any

from data.shard import Sharder
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.engine.pipeline_engine import PipelinedEngine
from recipes.model.transformer import Transformer
from recipes.planning.plan import Plan
from ring_attention import (
    AllGatherAttention,
    HybridAttention,
    LocalAttention,
    RingAttention,
    UlyssesAttention,
)
from ring_attention.groups import ParallelGroups
from ring_attention.sequence_attention import SequenceAttention

Engine = TrainingEngine | PipelinedEngine


def build_attention(plan: Plan, groups: ParallelGroups) -> SequenceAttention:
    """The plan's attention module on the ranks of this one's sequence. A new method is one entry here."""
    config, group = plan.config.attention, groups.get_sequence_parallel_group()
    common: dict[str, Any] = {"layout": config.layout}
    spread = {"transport": plan.transport, "hosts": groups.hosts}
    match plan.method:
        case "ring":
            return RingAttention(config.kernel, group, **common, **spread)
        case "ulysses":
            return UlyssesAttention(config.kernel, group, **common)
        case "hybrid":
            return HybridAttention(config.kernel, group, ulysses_degree=plan.degrees.ulysses, **common, **spread)
        case "all_gather":
            return AllGatherAttention(config.kernel, group, hosts=groups.hosts, **common)
        case "local":
            return LocalAttention(config.kernel, group, **common)
    raise AssertionError(f"no module for attention.method={plan.method}")


def build_engine(plan: Plan, groups: ParallelGroups | None = None, forward_only: bool = False) -> Engine:
    """The plan's model under DeepSpeed. Every rank must call it.

    Args:
        groups: those of the plan's data and sequence degrees, if they are there already.
        forward_only: without optimizer and gradients.
    """
    config = plan.config
    num_steps = None if forward_only else config.num_steps
    if config.parallelism.method == "tensor_pipeline":
        attention = LocalAttention(config.attention.kernel)
        return PipelinedEngine(config, plan.degrees, attention, plan.layout.padded_length, num_steps)
    groups = groups or ParallelGroups(plan.degrees.data, plan.degrees.sequence)
    attention = build_attention(plan, groups)
    return TrainingEngine(
        lambda: Transformer(
            config.model,
            attention,
            config.seed,
            config.engine.recompute,
            plan.tile_tokens,
            plan.mlp_tile_tokens,
            config.engine.offload_activations,
        ),
        groups,
        attention.sequence_rank,
        config.engine,
        config.optimizer,
        num_steps,
    )


def build_sharder(plan: Plan, engine: Engine) -> Sharder:
    """What cuts the corpus's sequences into this rank's micro-batches."""
    return Sharder(
        plan.layout, engine.sequence_rank, engine.data_rank, engine.data_degree, plan.config.engine.micro_batch_size
    )
