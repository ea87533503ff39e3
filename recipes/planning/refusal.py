"""Why a model or a step does not fit the ranks' memory, and overrides with which it does. Pure arithmetic.

Memory is what a rank has, not what is free when the run starts: other programs may end. The prediction of a step is
within 5 % of what was measured, and leaves out 1 to 2 GiB of each rank's libraries, CUDA context and NCCL buffers. So a
step that exceeds the memory by prediction does not fit, and one just below it may still run out of memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from conf.schema import Config, Degrees
from recipes.planning.memory import cache_bytes, changed, dtype_bytes, gib, num_parameters, state_bytes
from recipes.planning.memory_timeline import StepMemory

MAX_RANKS = 2**16  # that a remedy suggests
INSIST = "launch.check_memory=false, to start it all the same"


def state_refusal(config: Config, degrees: Degrees, memory_bytes: int, host_ranks: int | None) -> str | None:
    """Why ranks with `memory_bytes` cannot hold the model, and what to type; None if they can.

    Args:
        host_ranks: how many ranks share a host's memory; None if each has its own, as on GPUs.
    """
    state, num_ranks = state_bytes(config, degrees), math.prod(degrees)
    if state.needed <= memory_bytes:
        return None
    grid = f"engine.zero_stage={config.engine.zero_stage} on {num_ranks} rank{'s' if num_ranks > 1 else ''}"
    if config.parallelism.method == "tensor_pipeline":
        grid = f"{degrees.data} data x {degrees.tensor} tensor x {degrees.pipeline} pipeline ranks"
    remedies = _remedies(config, degrees, memory_bytes, host_ranks)
    lines = [
        f"model {config.model.name} with {num_parameters(config.model) / 1e6:,.2f} M parameters does not fit: "
        f"{grid} needs, per rank and without activations,",
        f"  {state} > {gib(memory_bytes)} GiB, the memory of one rank",
        "  use " + "\n  or ".join([*(remedies or ["a smaller model"]), INSIST]),
    ]
    return "\n".join(lines)


def step_refusal(step: StepMemory, memory_bytes: int) -> str | None:
    """Why ranks with `memory_bytes` cannot hold a step, and what to type, in one line; None if they can."""
    if step.peak.total <= memory_bytes:
        return None

    def first_fitting(trials: Iterable[dict[str, Any]]) -> list[str]:
        needed = ((changes, with_changes(step, changes).peak.total) for changes in trials)
        return next(([f"{typed(changes)} ({gib(size)} GiB)"] for changes, size in needed if size <= memory_bytes), [])

    def longest(changes: dict[str, Any]) -> list[str]:
        multiple = 2 * step.degrees.sequence  # without padding
        length = with_changes(step, changes).longest_length(memory_bytes) // multiple * multiple
        return [typed(changes | {"data.sequence_length": length})] if length else []

    cheaper = list(itertools.accumulate(_cheaper(step.config, step.degrees, step.on_gpu), operator.or_, initial={}))
    layers = range(0 if step.config.model.path else step.config.model.num_layers - 1, 0, -1)
    remedies = (first_fitting(cheaper) or longest(cheaper[-1])) + longest({})
    remedies = remedies or first_fitting(cheaper[-1] | {"model.num_layers": number} for number in layers)
    bigger = f"a smaller model or more {'GPUs' if step.on_gpu else 'hosts'}"  # CPU ranks share their host's memory
    return (
        f"a step needs {gib(step.peak.total)} GiB per rank by prediction, and there are {gib(memory_bytes)}: use "
        + ", or ".join([*dict.fromkeys(remedies or [bigger]), INSIST])
    )


def cache_refusal(config: Config, degrees: Degrees, memory_bytes: int) -> str | None:
    """Why ranks with `memory_bytes` cannot hold a prompt's keys and values, and what to type; None if they can."""
    weights, cache = state_bytes(config, degrees).weights, cache_bytes(config, degrees)
    if weights + cache <= memory_bytes:
        return None
    length, num_new = config.data.sequence_length, config.generate.max_new_tokens
    full_layers = changed(config, **{"model.num_window_layers": 0})  # a bound that holds where windows are not full
    longest = int((memory_bytes - weights) * length / cache_bytes(full_layers, degrees))
    ranks = math.ceil(cache * degrees.sequence / (memory_bytes - weights))
    return (
        f"the longest prompt has {length - num_new:,} tokens, and with generate.max_new_tokens={num_new} its keys and "
        f"values need {gib(cache)} GiB per rank, beside {gib(weights)} GiB of weights, and there are "
        f"{gib(memory_bytes)}: use {ranks} ranks or more with as much memory each, at most {longest:,} tokens of "
        f"prompt and new ones, or {INSIST}"
    )


def evaluation_refusal(config: Config, degrees: Degrees, memory_bytes: int, local_tokens: int) -> str | None:
    """Why ranks with `memory_bytes` cannot hold the longest sequence of recipe=evaluate; None if they may.

    A lower bound: one layer's input, queries, keys and values, beside the weights.

    Args:
        local_tokens: of the longest sequence on one rank.
    """
    model, weights = config.model, state_bytes(config, degrees).weights
    bytes_per_token = dtype_bytes(config) * (
        model.hidden_size + (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    )
    needed = local_tokens * bytes_per_token
    if weights + needed <= memory_bytes:
        return None
    ranks = math.ceil(needed * degrees.sequence / (memory_bytes - weights))
    longest = int((memory_bytes - weights) / bytes_per_token) * degrees.sequence
    return (
        f"evaluate.lengths={config.evaluate.lengths}: the longest needs at least {gib(needed)} GiB per rank, beside "
        f"{gib(weights)} GiB of weights, and there are {gib(memory_bytes)}: use {ranks} ranks or more with as much "
        f"memory each, lengths below {longest:,} tokens, or {INSIST}"
    )


def with_changes(step: StepMemory, changes: dict[str, Any]) -> StepMemory:
    """The step with other settings, none of which is the length."""
    config = changed(step.config, **changes)
    sequences = step.config.engine.micro_batch_size // config.engine.micro_batch_size
    return dataclasses.replace(step, config=config, local_tokens=step.local_tokens // sequences)


def _cheaper(config: Config, degrees: Degrees, on_gpu: bool) -> Iterator[dict[str, Any]]:
    """Changes that reduce a step's memory, for use one on top of the other, the cheapest first."""
    engine, num_ranks = config.engine, math.prod(degrees)
    if engine.recompute == "none":
        yield {"engine.recompute": "selective"}
    if engine.micro_batch_size > 1 and engine.train_batch_size is None:  # else gradients would accumulate
        yield {"engine.micro_batch_size": 1}
    if on_gpu and not engine.offload_activations:
        yield {"engine.offload_activations": True}
    if engine.offload_optimizer or engine.zero_stage == 3:
        return
    if num_ranks > 1:
        yield {"engine.zero_stage": 3}
    elif on_gpu and engine.zero_stage and engine.dtype != "fp32":
        yield {"engine.offload_optimizer": True}


def typed(changes: dict[str, Any]) -> str:
    """Settings as overrides."""
    return " ".join(f"{name}={str(value).lower()}" for name, value in changes.items())


def _remedies(config: Config, degrees: Degrees, memory_bytes: int, host_ranks: int | None) -> list[str]:
    """What to type, each with the memory it needs: on these ranks if possible, else on more; a smaller model."""

    def first_fitting(trials: Iterable[tuple[dict[str, Any], Degrees]], before: str = "", after: str = "") -> list[str]:
        for changes, trial_degrees in trials:
            needed = state_bytes(changed(config, **changes), trial_degrees).needed
            if needed <= memory_bytes:
                return [f"{(before + typed(changes)).removesuffix(', and ')}{after}: {gib(needed)} GiB"]
        return []

    engine, ranks, stage_3 = config.engine, math.prod(degrees), {"engine.zero_stage": 3}
    remedies = []
    if config.parallelism.method == "sequence" and not (remedies := first_fitting([(stage_3, degrees)])):
        while ranks < MAX_RANKS and not remedies:
            ranks *= 2
            hosts = f", on {math.ceil(ranks / host_ranks)} hosts like this one" if host_ranks else ""
            more = Degrees(ranks, 1, 1)  # states do not depend on which ranks share a sequence
            before = f"{ranks} ranks with as much memory each{hosts}, and "
            remedies = first_fitting([({}, more), (stage_3, more)], before)
        if host_ranks is None and config.recipe == "pretrain" and not engine.offload_optimizer:
            stages = range(max(1, engine.zero_stage), 4)
            changes = ({} if stage == engine.zero_stage else {"engine.zero_stage": stage} for stage in stages)
            offloads = ((change | {"engine.offload_optimizer": True}, degrees) for change in changes)
            remedies += first_fitting(offloads, after=", the optimizer states on the host")
    layers = range(0 if config.model.path else config.model.num_layers - 1, degrees.pipeline - 1, -1)
    smaller = (({"model.num_layers": num_layers}, degrees) for num_layers in layers)
    return remedies + first_fitting(smaller, "a smaller model, such as ")
