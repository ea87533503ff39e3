"""Explains a rank that ran out of memory: the plan, its memory, and three overrides that help."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from recipes.planning.explain import banner, state_lines, step_memory_lines
from recipes.planning.memory import gib, offloaded_bytes
from recipes.planning.plan import Plan
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import LOGS_DIR, position

NUM_OVERRIDES = 3
# in errors other than torch.OutOfMemoryError: PyTorch's CPU allocator, CUDA and NCCL calls
OUT_OF_MEMORY_WORDS = ("DefaultCPUAllocator", "out of memory")


@contextlib.contextmanager
def out_of_memory_explained(plan: Plan, run_dir: Path, compares: bool = False) -> Iterator[None]:
    """Raise RunFailed from an error of the block, an entry of a comparison if it `compares`, that ran out of memory."""
    try:
        yield
    except Exception as error:
        cause = out_of_memory_cause(error)
        if cause is None:
            raise
        rank = int(os.environ["RANK"])
        lines = [
            f"rank {rank} ran out of memory{position(run_dir, rank)}",
            *str(cause).strip().splitlines()[:1],
            *([_write_snapshot(run_dir, rank)] if torch.cuda.is_available() else []),
            *banner(plan, run_dir),
            *state_lines(plan),
            *step_memory_lines(plan),
            f"the {NUM_OVERRIDES} overrides most likely to help, best first:",
            *(f"  {override}" for override in helpful_overrides(plan, compares)),
        ]
        raise RunFailed("\n".join(lines)) from error


def _write_snapshot(run_dir: Path, rank: int) -> str:
    """Write what this rank's GPU memory holds, which the error's frames keep, to a file; returns a line about it."""
    path = run_dir / LOGS_DIR / f"memory_rank_{rank}.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as error:  # a full disk or a CUDA error must not hide the rest of the message
        return f"no memory snapshot: {error}"
    return f"memory snapshot: {path}, for https://docs.pytorch.org/memory_viz"


def out_of_memory_cause(error: BaseException | None) -> BaseException | None:
    """The first out-of-memory error in the chain of this error and its causes; None if there is none."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return error
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS):
            return error
        error = error.__cause__ or error.__context__
    return None


def helpful_overrides(plan: Plan, compares: bool = False) -> list[str]:
    """Up to three lines to type that reduce memory and are not set yet, best first."""
    overrides = [*_for_the_same_job(plan, compares), *_for_a_smaller_job(plan)]
    return [f"{override}  ({why})" for override, why in overrides][:NUM_OVERRIDES]


def _for_the_same_job(plan: Plan, compares: bool) -> Iterator[tuple[str, str]]:
    """Overrides, and why they help, that train the same model on the same batches."""
    engine, degrees, tokens = plan.config.engine, plan.degrees, plan.local_tokens
    if plan.config.attention.kernel == "reference":
        yield "attention.kernel=auto", "the reference kernel stores every attention score"
    if engine.micro_batch_size > 1:
        if compares:
            yield "compare.micro_batch_sizes=[1]", f"now {engine.micro_batch_size}"
        else:
            yield f"engine.micro_batch_size=1 {_same_batch(plan)}", "the same batch in more micro-batches"
    is_sequence_parallel = plan.config.parallelism.method == "sequence"  # tensor_pipeline refuses most of the others
    if is_sequence_parallel and (shared := _more_ranks_per_sequence(plan)):
        yield f"{shared} {_same_batch(plan)}", f"each sequence on all {plan.num_ranks} ranks, now on {degrees.sequence}"
    if plan.method == "all_gather" and degrees.sequence > 1:
        yield "attention=ring", "all_gather stores the keys and values of whole sequences"
    trains = is_sequence_parallel and plan.trains
    if trains and engine.recompute == "none":
        yield "engine.recompute=selective", "recomputes layers in the backward pass, except attention"
    elif trains and plan.on_gpu and not engine.offload_activations and (saved := offloaded_bytes(plan.config, tokens)):
        yield "engine.offload_activations=true", f"moves {gib(saved)} GiB of saved activations to the host"
    if is_sequence_parallel and engine.zero_stage < 3 and plan.num_ranks > 1:
        states = "weights, gradients and optimizer states" if plan.trains else "weights"
        yield "engine.zero_stage=3", f"shards {states} over all {plan.num_ranks} ranks"
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if plan.on_gpu and "expandable_segments" not in allocator:
        value = f"{allocator},expandable_segments:True".lstrip(",")
        yield f"PYTORCH_ALLOC_CONF={value}", "before the command: reduces fragmentation"
    if trains and plan.on_gpu and not engine.offload_optimizer:
        stage = "" if engine.zero_stage else "engine.zero_stage=1 "
        yield f"{stage}engine.offload_optimizer=true", "moves optimizer states and their step to the host; slower"


def _for_a_smaller_job(plan: Plan) -> Iterator[tuple[str, str]]:
    """Overrides, and why they help, that change the model or its data."""
    model, length, degrees = plan.config.model, plan.config.data.sequence_length, plan.degrees
    if length > 1:
        yield f"data.sequence_length={length // 2}", "half as many tokens per rank"
    if model.num_layers // 2 >= degrees.pipeline:
        yield f"model.num_layers={model.num_layers // 2}", "a smaller model"
    if model.mlp_size % (2 * degrees.tensor) == 0:
        yield f"model.mlp_size={model.mlp_size // 2}", "a smaller model"
    yield f"model.hidden_size={max(1, model.hidden_size // 2)}", "a smaller model"


def _same_batch(plan: Plan) -> str:
    """Overrides for as many sequences per step as now. Only one of the two fields may differ from its default."""
    accumulates = plan.config.engine.gradient_accumulation_steps > 1
    only = " engine.gradient_accumulation_steps=1" if accumulates else ""
    return f"engine.train_batch_size={plan.sequences_per_step}{only}"


def _more_ranks_per_sequence(plan: Plan) -> str | None:
    """Overrides for all ranks on one sequence; None if they are, or if there are too few heads."""
    num_ranks, ulysses = plan.num_ranks, plan.degrees.ulysses
    lacks_heads = plan.method == "ulysses" and plan.config.model.num_kv_heads < num_ranks
    if plan.degrees.data == 1 or (lacks_heads and not plan.candidates):
        return None
    by_method = {
        "local": "attention=ring",
        "ulysses": f"parallelism.ulysses_degree={num_ranks}",
        "hybrid": f"parallelism.ring_degree={num_ranks // ulysses} parallelism.ulysses_degree={ulysses}",
    }
    # attention=auto chooses the other degrees
    others = "" if plan.candidates else by_method.get(plan.method, f"parallelism.ring_degree={num_ranks}")
    return f"parallelism.data_degree=1 {others}".rstrip()
