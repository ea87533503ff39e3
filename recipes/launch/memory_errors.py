"""How a run that is out of memory ends: with the plan, and three overrides that help, not with a traceback alone.

The launcher and the turns of a comparison run their recipe within `out_of_memory_explained`; above `plan`, below both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from recipes.planning.explain import banner, state_lines, step_memory_lines
from recipes.planning.memory import changed, gib, offloaded_bytes, tile_tokens
from recipes.planning.plan import Plan
from recipes.run.errors import RunFailed
from recipes.run.heartbeat import LOGS_DIR, read_rank_state

NUM_OVERRIDES = 3
# of errors that are no torch.OutOfMemoryError: PyTorch's allocator for the CPU, CUDA and NCCL calls
OUT_OF_MEMORY_WORDS = ("DefaultCPUAllocator", "out of memory")
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class OutOfMemory(RunFailed):
    """This rank ran out of memory; the message has the plan and what to type."""


@contextlib.contextmanager
def out_of_memory_explained(plan: Plan, run_dir: Path, compares: bool = False) -> Iterator[None]:
    """Turn an error of the block that comes from want of memory into `OutOfMemory`, which it then is the cause of.

    Args:
        compares: whether this is an entry's turn in a comparison.
    """
    try:
        yield
    except Exception as error:
        cause = out_of_memory_cause(error)
        if cause is None:
            raise
        allocator = next((os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ), "")
        rank = int(os.environ["RANK"])
        place = read_rank_state(run_dir, rank)
        lines = [
            f"rank {rank} ran out of memory" + (f" ({place})" if place else ""),
            *str(cause).strip().splitlines()[:1],
            *(_snapshot(run_dir, rank) if torch.cuda.is_available() else []),
            *banner(plan, run_dir),
            *state_lines(plan),
            *step_memory_lines(plan),
            f"{NUM_OVERRIDES} overrides most likely to help, the first one first:",
            *(f"  {override}" for override in helpful_overrides(plan, allocator, compares)),
        ]
        raise OutOfMemory("\n".join(lines)) from error


def _snapshot(run_dir: Path, rank: int) -> list[str]:
    """Write what this rank's GPU holds to a file; returns what to say of it.

    What the failed step holds is there still, for the error's frames hold it. Where allocations were not recorded
    (memory_snapshot=true), the file has sizes and places of blocks, not who made them.
    """
    path = run_dir / LOGS_DIR / f"memory_rank_{rank}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as error:  # a full disk, a CUDA error: said beside what is the matter, not in its place
        return [f"no snapshot of its memory: {error}"]
    return [f"what its memory held: {path}, for https://docs.pytorch.org/memory_viz"]


def out_of_memory_cause(error: BaseException | None) -> BaseException | None:
    """The error, or the first on its way here, that says that there was no memory; None if none does."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return error
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS):
            return error
        error = error.__cause__ or error.__context__
    return None


def helpful_overrides(plan: Plan, allocator: str = "", compares: bool = False) -> list[str]:
    """Three things to type that are not set yet and need less memory, those that help most first; else fewer.

    What belongs together is one line; those that change how the batch is cut leave its tokens per step as they are.

    Args:
        allocator: what PYTORCH_ALLOC_CONF is.
        compares: in a comparison compare.micro_batch_sizes names the micro-batches, and the entry the rest.
    """
    overrides = [*_without_loss(plan, allocator, compares), *_smaller_jobs(plan)]
    return [f"{override}  ({why})" for override, why in overrides][:NUM_OVERRIDES]


def _without_loss(plan: Plan, allocator: str, compares: bool) -> Iterator[tuple[str, str]]:
    """Overrides, and why they help, that train the same model on the same batches."""
    engine, attention, degrees = plan.config.engine, plan.config.attention, plan.degrees
    cuts_tokens, on_gpu = plan.config.parallelism.method == "sequence", plan.device_type == "cuda"
    if attention.kernel == "reference":
        yield "attention.kernel=auto", "the reference kernel holds every score"
    if engine.micro_batch_size > 1:
        if compares:
            yield "compare.micro_batch_sizes=[1]", f"now {engine.micro_batch_size}"
        else:
            yield f"engine.micro_batch_size=1 {_same_batch(plan)}", "the same batch in more micro-batches"
    if cuts_tokens and (shared := _more_ranks_per_sequence(plan)):
        yield f"{shared} {_same_batch(plan)}", f"a sequence on all {plan.num_ranks} ranks, now on {degrees.sequence}"
    if plan.method == "all_gather" and degrees.sequence > 1:
        yield "attention=ring", "all_gather holds the keys and values of whole sequences"
    if cuts_tokens and engine.tile_tokens == 0 and _would_tile(plan):
        yield "engine.tile_tokens=null", "the loss tile by tile: logits of all tokens never exist"
    if cuts_tokens and plan.trains and engine.recompute == "none":
        yield "engine.recompute=selective", "the backward pass computes layers again, all but attention"
    elif _would_move_activations(plan):
        moved = gib(offloaded_bytes(plan.config, plan.local_tokens))
        yield (
            "engine.offload_activations=true",
            f"what layers keep, {moved} GiB, in the host's memory meanwhile",
        )
    if cuts_tokens and engine.zero_stage < 3 and plan.num_ranks > 1:
        cut = "weights, gradients and optimizer state" if plan.trains else "weights"
        yield "engine.zero_stage=3", f"{cut} lie over all {plan.num_ranks} ranks"
    if not cuts_tokens and (larger := _more_tensor_ranks(plan)):
        yield larger, "each layer's weights and activations on more ranks"
    if on_gpu and "expandable_segments" not in allocator:
        joined = ",".join([*filter(None, [allocator]), "expandable_segments:True"])
        yield f"PYTORCH_ALLOC_CONF={joined}", "before the command: less is lost between allocations"
    if on_gpu and cuts_tokens and plan.trains and not engine.offload_optimizer:
        stage = "" if engine.zero_stage else "engine.zero_stage=1 "
        yield f"{stage}engine.offload_optimizer=true", "the optimizer's state and its step on the host, which is slower"


def _smaller_jobs(plan: Plan) -> Iterator[tuple[str, str]]:
    """Overrides, and why they help, that make the job another one."""
    model, length, degrees = plan.config.model, plan.config.data.sequence_length, plan.degrees
    if length > 1:
        yield f"data.sequence_length={length // 2}", "half as many tokens per rank"
    if model.num_layers // 2 >= degrees.pipeline:
        yield f"model.num_layers={model.num_layers // 2}", "a smaller model"
    if model.mlp_size % (2 * degrees.tensor) == 0:
        yield f"model.mlp_size={model.mlp_size // 2}", "a smaller model"
    yield f"model.hidden_size={max(1, model.hidden_size // 2)}", "a smaller model"


def _would_tile(plan: Plan) -> bool:
    """Whether a tile's usual size is less than all tokens."""
    return tile_tokens(changed(plan.config, **{"engine.tile_tokens": None}), plan.local_tokens) > 0


def _would_move_activations(plan: Plan) -> bool:
    """Whether layers keep anything that could lie in the host's memory, which a GPU does not use anyway."""
    moves = plan.device_type == "cuda" and plan.trains and plan.config.parallelism.method == "sequence"
    return moves and not plan.config.engine.offload_activations and offloaded_bytes(plan.config, plan.local_tokens) > 0


def _same_batch(plan: Plan) -> str:
    """With as many sequences per step as now; of the two ways to say so, one must be left at its default."""
    accumulates = plan.config.engine.gradient_accumulation_steps > 1
    only = " engine.gradient_accumulation_steps=1" if accumulates else ""
    return f"engine.train_batch_size={plan.sequences_per_step}{only}"


def _more_ranks_per_sequence(plan: Plan) -> str | None:
    """All ranks on one sequence; None if they are, or its heads are too few."""
    model, degrees, num_ranks = plan.config.model, plan.degrees, plan.num_ranks
    if degrees.data == 1:
        return None
    all_ranks = "parallelism.data_degree=1"
    if plan.candidates:
        return all_ranks  # attention=auto chooses the others
    match plan.method:
        case "local":
            return f"attention=ring {all_ranks}"
        case "ulysses":
            fits = model.num_kv_heads >= num_ranks
            return f"{all_ranks} parallelism.ulysses_degree={num_ranks}" if fits else None
        case "hybrid":
            ring_degree = num_ranks // degrees.ulysses
            return f"{all_ranks} parallelism.ring_degree={ring_degree} parallelism.ulysses_degree={degrees.ulysses}"
    return f"{all_ranks} parallelism.ring_degree={num_ranks}"


def _more_tensor_ranks(plan: Plan) -> str | None:
    """Twice as many, in place of data ranks or else of stages; None if heads and MLP do not divide by them."""
    model, (data, _, _, tensor, pipeline) = plan.config.model, plan.degrees
    tensor *= 2
    if model.num_kv_heads % tensor or model.mlp_size % tensor or (data % 2 and pipeline % 2):
        return None
    data, pipeline = (data // 2, pipeline) if data % 2 == 0 else (data, pipeline // 2)
    typed = f"parallelism.tensor_degree={tensor} parallelism.pipeline_degree={pipeline} parallelism.data_degree={data}"
    return f"{typed} {_same_batch(plan)}" if data != plan.degrees.data else typed
