"""The loss rule, the same for every grid of ranks.

    loss = sum of all token losses / number of valid tokens

Both sums run over the whole global batch: all data ranks, all sequence ranks and all micro-batches. Ranks and
micro-batches may hold different numbers of valid tokens, so a mean of means would be wrong.
"""

from __future__ import annotations


def loss_multiplier(zero_stage: int, data_degree: int, sequence_degree: int, accumulation_steps: int) -> int:
    """The factor on the local token losses / global number of tokens that cancels DeepSpeed's own divisions.

    Measured with DeepSpeed 0.19.8 and a sequence-parallel mpu: `backward` divides by the accumulation steps. The
    reduction divides the sum over all ranks by data_degree on stages 0, 1 and 2, and by all ranks on stage 3.
    """
    return accumulation_steps * data_degree * (sequence_degree if zero_stage == 3 else 1)


def pipeline_loss_multiplier(data_degree: int, num_micro_batches: int) -> int:
    """The same for DeepSpeed's pipeline engine, which averages losses over micro-batches and data ranks."""
    return num_micro_batches * data_degree
