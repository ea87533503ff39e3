"""From a plan to what runs it: the attention module, the engine, and this rank's share of the data."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import deepspeed.comm as dist
import torch

from data.corpus import Corpus, open_corpus
from data.feed import Feed
from data.shard import Sharder
from recipes.engine.base import Engine
from recipes.engine.deepspeed_engine import TrainingEngine
from recipes.engine.pipeline_engine import PipelinedEngine
from recipes.planning.plan import Plan
from ring_attention import AllGatherAttention, HybridAttention, LocalAttention, RingAttention, UlyssesAttention
from ring_attention.groups import ParallelGroups
from ring_attention.sequence_attention import SequenceAttention

if TYPE_CHECKING:
    from data.shared_stream import SharedStream

METHODS: dict[str, type[SequenceAttention]] = {
    "ring": RingAttention,
    "ulysses": UlyssesAttention,
    "hybrid": HybridAttention,
    "all_gather": AllGatherAttention,
    "local": LocalAttention,
}


def build_attention(plan: Plan, groups: ParallelGroups) -> SequenceAttention:
    """The plan's attention module over the ranks that share this rank's sequence."""
    module, config = METHODS[plan.method], plan.config.attention
    given = {"transport": plan.transport, "hosts": groups.hosts, "ulysses_degree": plan.degrees.ulysses}
    options: dict[str, Any] = {name: given[name] for name in module.options}
    return module(config.kernel, groups.get_sequence_parallel_group(), layout=config.layout, **options)


def build_engine(plan: Plan, groups: ParallelGroups | None = None) -> Engine:
    """The plan's model under DeepSpeed, without optimizer if the plan does not train. Every rank must call it.

    Args:
        groups: for the plan's data and sequence degrees, if they exist already.
    """
    config = plan.config
    if config.parallelism.method == "tensor_pipeline":
        return PipelinedEngine(config, plan.degrees, LocalAttention(config.attention.kernel), plan.layout.padded_length)
    groups = groups or ParallelGroups(plan.degrees.data, plan.degrees.sequence)
    return TrainingEngine(config, groups, build_attention(plan, groups))


def open_shared_corpus(plan: Plan, engine: Engine) -> Corpus | SharedStream:
    """The plan's data, of which a stream is read once for all ranks of a sequence. Every rank must call it."""
    data, vocab_size = plan.config.data, plan.config.model.vocab_size
    if not data.stream:
        return open_corpus(data, vocab_size)
    from data.shared_stream import SharedStream
    from data.stream import open_stream

    data_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(data_ranks, engine.data_rank)
    rows = [[rank for rank, row in enumerate(data_ranks) if row == number] for number in range(engine.data_degree)]
    timeout = datetime.timedelta(seconds=plan.config.launch.timeout_s)
    group, _ = torch.distributed.new_subgroups_by_enumeration(rows, timeout=timeout, backend="gloo")
    layout = None if plan.layout.name == "balanced" else plan.layout  # it differs from batch to batch
    return SharedStream(open_stream(data, vocab_size), group, engine.sequence_rank, layout)


def build_sharder(plan: Plan, engine: Engine) -> Sharder:
    """Cuts sequences into this rank's micro-batches."""
    config, coordinates = plan.config, (engine.sequence_rank, engine.data_rank, engine.data_degree)
    return Sharder(plan.layout, *coordinates, config.engine.micro_batch_size, config.data.document_mask)


def build_feed(plan: Plan, engine: Engine, corpus: Corpus | SharedStream) -> Feed:
    """This rank's share of the corpus, in the steps of the plan."""
    return Feed(corpus, build_sharder(plan, engine), plan.accumulation_steps)
