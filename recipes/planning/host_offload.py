"""What ranks offload to their host, why it does not fit there, and what to type. Pure arithmetic."""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from typing import Any

from conf.degrees import accumulation_steps
from conf.schema import Config, Degrees
from conf.stages import stages_of
from recipes.planning.engine_memory import adam_sub_groups, matrices, num_decayed
from recipes.planning.memory import (
    MARGIN,
    changed,
    dtype_bytes,
    gib,
    num_parameters,
    offloaded_bytes,
    pinned_bytes,
)
from recipes.planning.memory_timeline import StepMemory
from recipes.planning.refusal import INSIST, typed, with_changes


def host_bytes(config: Config, degrees: Degrees, local_tokens: int) -> float:
    """Memory of its host for what one rank offloads.

    Args:
        local_tokens: of one micro-batch of the longest sequences.
    """
    engine, parameters, shards = config.engine, num_parameters(config.model), degrees.data * degrees.sequence
    size = 0.0
    if engine.offload_activations:  # buffers are kept for each length
        shares = {stage.sequence_length / config.data.sequence_length for stage in stages_of(config.data)}
        size += sum(offloaded_bytes(config, math.ceil(share * local_tokens)) for share in shares)
    if engine.offload_optimizer:
        size += _optimizer_bytes(config, degrees, shards)
    if engine.offload_parameters:
        size += dtype_bytes(config) * parameters / shards
    return size


def _optimizer_bytes(config: Config, degrees: Degrees, shards: int) -> float:
    """What DeepSpeed 0.19.8 allocates there: weights, gradients and two moments in fp32, and buffers."""
    model, size = config.model, dtype_bytes(config)
    decayed, others = num_decayed(model), num_parameters(model) - num_decayed(model)
    groups = [decayed / shards, others / shards]
    if model.num_trained is not None:
        groups = [model.num_trained / shards]
    if config.engine.zero_stage == 3:  # only gradients are pinned: those of each sub-group, and all once more
        if model.num_trained is None:
            groups = adam_sub_groups(model, shards)
        return sum(12 * n + pinned_bytes(4 * n) for n in groups) + pinned_bytes(4 * sum(groups))
    # weights, also in the model's dtype, and gradients are pinned, group by group
    kept = sum(8 * n + 2 * pinned_bytes(4 * n) + pinned_bytes(size * n) for n in groups)
    if accumulation_steps(config, degrees) > 1:  # each rank sums whole gradients
        kept += sum(pinned_bytes(size * n) for n in matrices(model))
    return kept + pinned_bytes(size * max(matrices(model)))


def excess(ranks: int, size: float, limit: float) -> str:
    """That the ranks of a host offload more than it may hold; both in bytes."""
    each = f"{ranks} ranks x {gib(size / ranks)} = " if ranks > 1 else ""
    return f"offloading takes {each}{gib(size)} GiB of a host > {gib(limit)} GiB, {1 - MARGIN:.0%} of its memory"


def host_refusal(step: StepMemory, memory_bytes: int, host_memory_bytes: int) -> str | None:
    """Why a host cannot hold what its ranks offload, and what to type, in one line; None if it can.

    Args:
        memory_bytes: of one rank.
        host_memory_bytes: of a host, for the offloads of all its ranks and the processes themselves.
    """
    limit, engine = (1 - MARGIN) * host_memory_bytes, step.config.engine
    if (offloaded := _of_host(step, {})) <= limit:
        return None

    def longest(changes: dict[str, Any]) -> list[dict[str, Any]]:
        multiple = 2 * step.degrees.sequence  # without padding
        length = longest_offloaded(step, host_memory_bytes, changes) // multiple * multiple
        return [changes | {"data.sequence_length": length}] if length else []

    remedies = []
    if engine.offload_activations:
        cheaper: list[dict[str, Any]] = [{"engine.recompute": "full"}] if engine.recompute == "selective" else []
        if engine.micro_batch_size > 1 and engine.train_batch_size is None:  # else gradients would accumulate
            cheaper.append({"engine.micro_batch_size": 1})
        trials = list(itertools.accumulate(cheaper, operator.or_))
        fitting = [changes for changes in trials if _of_host(step, changes) <= limit]
        remedies = (fitting[:1] or longest(trials[-1] if trials else {})) + longest({})
    for name in ("offload_activations", "offload_optimizer"):
        if not getattr(engine, name):
            continue
        changes = {f"engine.{name}": False}
        without = with_changes(step, changes)
        if not without.unsupported and without.peak.total <= memory_bytes and _of_host(step, changes) <= limit:
            remedies.append(changes)
    sized = [f"{typed(changes)} ({gib(_of_host(step, changes))} GiB)" for changes in remedies]
    which = [*dict.fromkeys(sized)] or ["more hosts, or hosts with more memory"]
    return f"{excess(step.ranks_per_host, offloaded, limit)}: use " + ", or ".join([*which, INSIST])


def longest_offloaded(step: StepMemory, host_memory_bytes: int, changes: dict[str, Any]) -> int:
    """The most tokens of a sequence that fit a host with what else its ranks offload; 0 if none do."""

    def offloaded(length: int) -> float:
        return _of_host(step, changes | {"data.sequence_length": length})

    return bisect.bisect(range(1, 2**40), (1 - MARGIN) * host_memory_bytes, key=offloaded)


def _of_host(step: StepMemory, changes: dict[str, Any]) -> float:
    """What the ranks of a host offload after these changes, in bytes."""
    config = changed(step.config, **changes)
    tokens = math.ceil(config.data.sequence_length / step.degrees.sequence) * config.engine.micro_batch_size
    return step.ranks_per_host * host_bytes(config, step.degrees, tokens)
