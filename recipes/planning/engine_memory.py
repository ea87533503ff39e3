"""What DeepSpeed 0.19.8 and Adam hold in a training step, by arithmetic: states, buckets, sums, what is reduced.

Below `memory_report`, which adds activations; pure functions of the configuration. Sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from conf.schema import Config, ModelConfig
from recipes.planning.memory import bucket_size, num_parameters

PERSISTENT = 100_000  # ZeRO-3 keeps smaller parameters whole: DeepSpeed's stage3_param_persistence_threshold
ALL_REDUCED = 500_000_000  # gradients that DeepSpeed reduces at once, or one parameter more: MEMORY_OPT_ALLREDUCE_SIZE


class EngineMemory(NamedTuple):
    """What DeepSpeed and Adam hold.

    Args:
        held: always, gradients aside.
        adam: of it, Adam's moments, which the first step makes at its end.
        buckets: while gradients come.
        gradients: fp32 sums of all that are made as they come.
        at_end: beyond `held`, at most.
        for_head: beyond `held` and `buckets`, while a head is reduced that has more than a bucket.
    """

    held: float
    adam: float
    buckets: float
    gradients: float
    at_end: float
    for_head: float = 0


def engine_memory(config: Config, num_ranks: int, on_gpu: bool) -> EngineMemory:
    """What one of `num_ranks` ranks holds."""
    return _on_gpu(config, num_ranks) if on_gpu else _on_cpu(config, num_ranks)


def gradient_sum_bytes(model: ModelConfig, size: int, of_all: float, num_come: int) -> float:
    """The fp32 sums of gradients that stand: a group of Adam's from the first bucket on that has one of the group's.

    Training in fp32 has both groups' with the first.

    Args:
        of_all: bytes of all parameters'.
        num_come: numbers whose gradients have come, the last ones of the model first.
    """
    bucket, reduced = bucket_size(num_parameters(model)), []
    for filled, _ in _reductions(model, bucket):
        # more than a bucket does not wait for a matrix: a norm will do
        least = sum(reduced) + filled + (filled <= bucket)
        if num_come < least:
            break
        reduced.append(filled)
    if not reduced:
        return 0
    if size == 2 and reduced == [model.vocab_size * model.hidden_size]:  # the head alone, no norm
        return of_all * _decayed(model) / num_parameters(model)
    return of_all


def num_persistent_parameters(model: ModelConfig) -> int:
    """Numbers in parameters that ZeRO-3 keeps whole: all but the large matrices."""
    return num_parameters(model) - sum(size for size in _matrices(model) if size >= PERSISTENT)


def _on_cpu(config: Config, num_ranks: int) -> EngineMemory:
    """With PyTorch's Adam and its temporaries."""
    model, stage, size = config.model, config.engine.zero_stage, 4 if config.engine.dtype == "fp32" else 2
    parameters = num_parameters(model)
    bucket = bucket_size(parameters)
    parted = num_ranks > 1
    if stage == 0:
        # at the end the gradients, those in one piece, and in half precision that in fp32
        held, buckets, at_end = parameters * (12 if size == 4 else 14), 0, parameters * 8
        return EngineMemory(held, 8 * parameters, buckets, 0, at_end)
    cut = parameters / num_ranks
    temporaries = 4 * _decayed(model) / num_ranks  # of Adam, each
    if stage == 3:
        held = cut * (20 if size == 4 else 18) + 4 * bucket + (size * num_persistent_parameters(model) if parted else 0)
        buckets, at_end = 0, max(8 * bucket if parted else 0, 3 * temporaries)
    elif size == 4:
        reduced = 8 * bucket + (4 * bucket if parted else 0)
        held, buckets = 4 * parameters + 12 * cut, 8 * bucket
        at_end = max(reduced, 4 * bucket + 3 * temporaries)
    elif stage == 1:
        held, buckets = 6 * parameters + 12 * cut, 0
        at_end = 2 * parameters + max(4 * bucket if parted else 0, 2 * temporaries)
    else:
        held, buckets = 2 * parameters + 12 * cut, 4 * bucket
        at_end = 10 * bucket + 4 * _decayed(model) / num_ranks
    return EngineMemory(held, 8 * cut, buckets, 0, at_end)


def _on_gpu(config: Config, num_ranks: int) -> EngineMemory:
    """With the fused Adam, which has no temporaries."""
    model, engine = config.model, config.engine
    stage, size = engine.zero_stage, 4 if engine.dtype == "fp32" else 2
    parameters = num_parameters(model)
    cut = parameters / num_ranks if stage else parameters
    bucket, parted, is_first = bucket_size(parameters), num_ranks > 1, config.num_steps == 1
    adam = 0 if engine.offload_optimizer else 8 * cut
    not_yet = adam if is_first else 0
    # Adam takes the parameters that decay first: in the first step the others have no moments by then
    decayed = _decayed(model) / parameters * cut
    spared = cut - decayed
    later = 8 * spared if is_first else 0

    if stage == 0 or (stage == 1 and size == 2 and not engine.offload_optimizer):
        # gradients in the model's dtype, of all parameters; on stage 1 their fp32 sums stand, on stage 0 they are made
        held = size * parameters + (4 * cut if size == 2 else 0) + (4 * parameters if stage else 0) + adam
        in_fp32 = 4 * parameters if size == 2 and not stage else 0
        # in one piece, and that in fp32
        reduced = _all_reduced(model) * (4 if stage or size == 4 else 6)
        at_end = size * parameters + max(reduced - not_yet, in_fp32)
        return EngineMemory(held, adam, 0, 0, at_end)

    if stage == 3:
        held = cut * (20 if size == 4 else 18) + 4 * bucket + (size * num_persistent_parameters(model) if parted else 0)
        # of some gradients at once: what is sent and what comes; of the parameters that Adam takes: in one piece
        reduced = max(8 * filled for filled, _ in _reductions(model, bucket))
        return EngineMemory(held, adam, 0, 0, max(reduced - not_yet, 4 * decayed - later, 4 * spared))

    held = size * parameters + (0 if engine.offload_optimizer else 4 * cut) + adam
    staged = 4 if size == 4 or stage == 1 else 2  # per gradient in each of two buckets
    buckets, partition = 2 * staged * bucket, 4 * cut
    # of a bucket that is reduced: its gradients in one piece, which one rank in fp32 has as it is, and that in fp32
    message = (4 if parted else 0) if size == 4 else 4 if staged == 4 else 6
    reductions = list(_reductions(model, bucket))
    reduced = max(
        message * filled + staged * waiting + (partition if size == 2 or number else 0)  # fp32 makes it afterwards
        for number, (filled, waiting) in enumerate(reductions)
    )
    head = model.vocab_size * model.hidden_size
    for_head = 0 if model.tied_head or head <= bucket else message * head + (4 * decayed if size == 2 else 0)
    if engine.offload_optimizer:  # a parameter's gradient as it goes to the host; its norm is taken in fp64
        largest = max(_matrices(model))
        held += size * largest
        at_end = max(buckets + reduced, buckets + partition + 8 * largest)
        for_head += 8 * head if for_head else 0
    else:
        in_turn = max(4 * decayed - later, 4 * spared)  # fp32 has what Adam takes in one piece, too
        stepping = partition + in_turn if size == 4 else max(partition - later, 4 * spared)
        at_end = max(buckets + max(reduced, partition) - not_yet, stepping)
    return EngineMemory(held, adam, buckets, partition, at_end, for_head)


def _matrices(model: ModelConfig) -> list[int]:
    """Numbers in each, in the order in which the model has them: all parameters but norms and biases."""
    hidden, heads, kv_heads = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    up = model.mlp_size * (2 if model.mlp == "swiglu" else 1)
    of_layer = [width * hidden for width in (heads + 2 * kv_heads, heads, up, model.mlp_size)]
    end = [model.vocab_size * hidden]
    return end + of_layer * model.num_layers + ([] if model.tied_head else end)


def _decayed(model: ModelConfig) -> int:
    """Numbers in matrices but the embedding: Adam takes them in one pass, the others after them."""
    return sum(_matrices(model)[1:])


def _all_reduced(model: ModelConfig) -> int:
    """The most gradients that are reduced at once where DeepSpeed's engine does it, after the backward pass."""
    most = filled = 0
    for size in _matrices(model):
        filled += size
        most = max(most, filled)
        filled = 0 if filled > ALL_REDUCED else filled
    return most


def _reductions(model: ModelConfig, bucket: int) -> Iterator[tuple[int, int]]:
    """Of each reduction in a backward pass: gradients in the bucket, and those of the parameter that waits for it."""
    filled = 0
    for size in reversed(_matrices(model)):
        if filled and filled + size > bucket:
            yield filled, size
            filled = 0
        filled += size
    yield filled, 0
