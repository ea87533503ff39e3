"""What DeepSpeed 0.19.8 and Adam allocate in a training step: states, buckets, gradient sums, temporaries; in bytes.

Pure functions of the configuration. `memory_timeline` adds the activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from conf.schema import Config, ModelConfig
from recipes.planning.memory import bucket_size, dtype_bytes, has_sharded_sums, layer_matrices, num_parameters

PERSISTENT = 100_000  # ZeRO-3 never shards smaller parameters: DeepSpeed's stage3_param_persistence_threshold
SUB_GROUP = 1_000_000_000  # own parameters that Adam updates at a time on ZeRO-3, at least: DeepSpeed's sub_group_size
ALL_REDUCED = 500_000_000  # gradients per all-reduce without ZeRO, plus one parameter: MEMORY_OPT_ALLREDUCE_SIZE


class EngineMemory(NamedTuple):
    """What DeepSpeed and Adam allocate on one rank.

    Args:
        persistent: throughout the step: parameters, optimizer states, buffers, but no gradients.
        adam: the part of `persistent` that Adam's moments take. The first step allocates them at its end.
        step_end: peak beyond `persistent` while gradients are reduced and Adam steps.
        buckets: reduction buckets of the backward pass.
        gradients: fp32 sums of all gradients, allocated during the backward pass.
        head_reduction: beyond `persistent` and `buckets`, while a head larger than a bucket is reduced.
    """

    persistent: float
    adam: float
    step_end: float
    buckets: float = 0
    gradients: float = 0
    head_reduction: float = 0


def gradient_sum_bytes(model: ModelConfig, size: int, all_bytes: float, num_gradients: int) -> float:
    """The fp32 sums allocated so far in a backward pass.

    Adam's two groups are the parameters with weight decay and those without. The first reduced bucket that holds a
    parameter of a group allocates the sums of the whole group. Training in fp32 allocates both groups at once.

    Args:
        size: bytes per gradient.
        all_bytes: the sums of all parameters.
        num_gradients: gradients computed so far, from the end of the model.
    """
    bucket, allocated, reduced = bucket_size(num_parameters(model)), 0.0, 0
    for filled, _ in _reductions(model, bucket):
        # a full bucket waits for its next parameter; a parameter beyond a bucket's size does not
        if num_gradients < reduced + filled + (filled <= bucket):
            break
        is_head_alone = size == 2 and not reduced and filled == model.vocab_size * model.hidden_size
        allocated = all_bytes * (num_decayed(model) / num_parameters(model) if is_head_alone else 1)
        reduced += filled
    return allocated


def sharded_parameters(model: ModelConfig) -> int:
    """Numbers in parameters that ZeRO-3 shards: the large matrices."""
    return sum(size for size in matrices(model) if size >= PERSISTENT)


def on_cpu(config: Config, num_ranks: int) -> EngineMemory:
    """What one of `num_ranks` ranks allocates on the CPU, with PyTorch's Adam and its temporaries."""
    model, stage, size = config.model, config.engine.zero_stage, dtype_bytes(config)
    parameters = num_parameters(model)
    shard, bucket, is_sharded = parameters / num_ranks, bucket_size(parameters), num_ranks > 1
    temporary = 4 * num_decayed(model) / num_ranks  # one of Adam's
    reduced, buckets = 4 * bucket * is_sharded, 0
    if stage == 0:
        # at the end: gradients, their flat copy and, in half precision, that copy in fp32
        return EngineMemory(parameters * (12 if size == 4 else 14), 8 * parameters, step_end=8 * parameters)
    if stage == 3:
        persistent = _zero3_persistent(model, size, num_ranks)
        step_end = max(2 * reduced, 3 * min(temporary, 4 * max(adam_sub_groups(model, num_ranks))))
    elif size == 4:
        persistent, buckets = 4 * parameters + 12 * shard, 8 * bucket
        step_end = 4 * bucket + max(4 * bucket + reduced, 3 * temporary)
    elif is_sharded:
        persistent, buckets = 2 * parameters + 12 * shard, 4 * bucket
        step_end = 10 * bucket + temporary
    else:  # all gradients, and a flat copy of Adam's group, in fp32 too; then that and Adam's temporaries
        persistent = 14 * parameters
        step_end = max(2 * parameters + 1.5 * temporary, 3 * temporary)
    return EngineMemory(persistent, 8 * shard, step_end, buckets)


def on_gpu(config: Config, num_ranks: int) -> EngineMemory:
    """What one of `num_ranks` ranks allocates on a GPU, with the fused Adam, which has no temporaries."""
    model, offloads = config.model, config.engine.offload_optimizer
    stage, size = config.engine.zero_stage, dtype_bytes(config)
    is_alone = num_ranks == 1 and has_sharded_sums(config)  # which has nothing to sum
    parameters, is_first = num_parameters(model), config.num_steps == 1
    shard, bucket = parameters / num_ranks if stage else parameters, bucket_size(parameters)
    # Adam updates the decayed group first; in the first step the other group has no moments until then
    decayed = num_decayed(model) / parameters * shard
    not_decayed = shard - decayed
    adam = 0 if offloads else 8 * shard
    missing_adam, missing_moments = (adam, 8 * not_decayed) if is_first else (0, 0)
    # Adam's copy of a group: its gradients in fp32
    group_copy = max(4 * decayed - missing_moments, 4 * not_decayed)

    if stage == 0:
        # all gradients stay in the model's dtype; at the end a flat copy, in half precision in fp32 too
        persistent = size * parameters + (4 * shard if size == 2 else 0) + adam
        in_fp32 = 4 * parameters if size == 2 else 0
        reduced = _all_reduced(model) * (4 if size == 4 else 6)
        return EngineMemory(persistent, adam, size * parameters + max(reduced - missing_adam, in_fp32))

    if is_alone and not offloads:
        # all gradients stay in the model's dtype; then Adam's group: a flat copy, in fp32 too, before they are freed
        copying = 2 * parameters + 6 * decayed - missing_adam, 8 * not_decayed - missing_moments
        stepping = 2 * not_decayed + 4 * decayed - missing_moments, 4 * not_decayed
        return EngineMemory(6 * parameters + adam, adam, max(*copying, *stepping))

    if stage == 3:
        reduced = max(8 * filled for filled, _ in _reductions(model, bucket))  # sent and received gradients
        # gradients of a sub-group in fp32; in the first step later ones have no moments yet
        sub_groups = adam_sub_groups(model, num_ranks)
        later = [is_first * sum(sub_groups[number:]) for number in range(1, len(sub_groups) + 1)]
        stepping = max(4 * updated - 8 * waiting for updated, waiting in zip(sub_groups, later, strict=True))
        return EngineMemory(_zero3_persistent(model, size, num_ranks), adam, max(reduced - missing_adam, stepping))

    persistent = size * parameters + (0 if offloads else 4 * shard) + adam
    buckets, gradients = 2 * size * bucket, 0 if is_alone else 4 * shard
    # while a bucket is reduced: its flat copy, in fp32 too; without sums the bucket itself is flat
    message = (4 if num_ranks > 1 else 0) if size == 4 else 4 if is_alone else 6
    reduced = max(
        # training in fp32 allocates the sums after the first reduction
        message * filled + size * waiting + (gradients if size == 2 or number else 0)
        for number, (filled, waiting) in enumerate(_reductions(model, bucket))
    )
    head = model.vocab_size * model.hidden_size
    head_reduction = 0
    if not model.tied_head and head > bucket:  # in half precision its gradient, that in fp32, and sums of its group
        head_reduction = message * head if size == 4 else 6 * head + (0 if is_alone else 4 * decayed)
    if offloads:  # gradients go to the host one parameter at a time; their norm is taken in fp64
        largest = max(matrices(model))
        persistent += size * largest
        step_end = max(buckets + reduced, buckets + gradients + 8 * largest)
        head_reduction += 8 * head if head_reduction else 0
    else:
        # Adam's step; training in fp32 has a flat copy of the updated group beside the gradients
        stepping = gradients + group_copy if size == 4 else max(gradients - missing_moments, 4 * not_decayed)
        step_end = max(buckets + max(reduced, gradients) - missing_adam, stepping)
    return EngineMemory(persistent, adam, step_end, buckets, gradients, head_reduction)


def _zero3_persistent(model: ModelConfig, size: int, num_ranks: int) -> float:
    parameters = num_parameters(model)
    unsharded = size * (parameters - sharded_parameters(model)) if num_ranks > 1 else 0
    return parameters / num_ranks * (20 if size == 4 else 18) + 4 * bucket_size(parameters) + unsharded


def adam_sub_groups(model: ModelConfig, num_ranks: int) -> list[float]:
    """Own parameters that Adam updates at a time on ZeRO-3, in their order."""
    embedding, *decayed = matrices(model)
    sub_groups = []
    for group in (decayed, [embedding]):
        updated = 0.0
        for size in group:
            updated += size / num_ranks
            if updated >= SUB_GROUP:
                sub_groups.append(updated)
                updated = 0.0
        if updated:
            sub_groups.append(updated)
    return sub_groups


def matrices(model: ModelConfig) -> list[int]:
    """Numbers in each parameter but norms and biases, in the model's order."""
    layer = [outputs * inputs for outputs, inputs in layer_matrices(model)]
    end = [model.vocab_size * model.hidden_size]
    return end + layer * model.num_layers + ([] if model.tied_head else end)


def num_decayed(model: ModelConfig) -> int:
    """Numbers with weight decay: all matrices but the embedding."""
    return sum(matrices(model)[1:])


def _all_reduced(model: ModelConfig) -> int:
    """The most gradients in one all-reduce, where DeepSpeed reduces after the backward pass."""
    most = filled = 0
    for size in matrices(model):
        filled += size
        most = max(most, filled)
        filled = 0 if filled > ALL_REDUCED else filled
    return most


def _reductions(model: ModelConfig, bucket: int) -> Iterator[tuple[int, int]]:
    """Per reduction of a backward pass: gradients in the bucket, and those of the parameter that did not fit in it."""
    filled = 0
    for size in reversed(matrices(model)):
        if filled and filled + size > bucket:
            yield filled, size
            filled = 0
        filled += size
    yield filled, 0
