"""The loss rule, the same for every grid of ranks.

    loss = sum of all token losses / number of valid tokens

Both sums run over the whole global batch: all data ranks, all sequence ranks and all micro-batches. Ranks and
micro-batches may hold different numbers of valid tokens, so a mean of means would be wrong.
"""

from __future__ import annotations


def loss_multiplier(zero_stage: int, data_degree: int, sequence_degree: int, accumulation_steps: int) -> int:
    """The factor on (summed token losses of this rank / valid tokens of the global batch) for DeepSpeed's `backward`.

    It cancels DeepSpeed's own divisions, so that gradients are plain sums over ranks and micro-batches.

    Measured with DeepSpeed 0.19.8 and a sequence-parallel mpu: `backward` divides by the accumulation steps. The
    reduction divides the sum over all ranks by data_degree on stages 0, 1 and 2, and by all ranks on stage 3.
    """
    return accumulation_steps * data_degree * (sequence_degree if zero_stage == 3 else 1)
