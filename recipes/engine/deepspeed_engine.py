"""The model under DeepSpeed's engine with ZeRO, data parallelism and sequence parallelism.

The loss is the sum of all token losses over the number of valid tokens of the global batch: all data ranks, sequence
ranks and micro-batches. These may hold different numbers of valid tokens, so a mean of means would be wrong.

Two of DeepSpeed's routes to sequence parallelism are not used, because sequence ranks silently drift apart under them:
`mesh_param`, and the config keys `sequence_parallel_size` and `data_parallel_size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import deepspeed.comm as dist
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from conf.schema import Config
from data.shard import TokenBatch
from recipes.engine.base import Engine, StepResult, deepspeed_config
from recipes.model.transformer import Transformer
from recipes.planning.memory import mlp_tile_tokens, num_parameters, sums_nothing, tile_tokens
from ring_attention.groups import ParallelGroups
from ring_attention.sequence_attention import SequenceAttention
from ring_attention.trace import profiler_range, report_status
from ring_attention.transport import release_symmetric_buffers

# in checkpoints of half precision on stage 0: the names of the fp32 master weights, by parameter group
MASTER_WEIGHT_NAMES = "masters_of"


def loss_multiplier(zero_stage: int, num_ranks: int, accumulation_steps: int) -> int:
    """The factor on (summed token losses of this rank / valid tokens of the global batch) for DeepSpeed's `backward`.

    It cancels DeepSpeed's own divisions, so that gradients are plain sums over ranks and micro-batches.

    Measured with DeepSpeed 0.19.8 and a sequence-parallel mpu: `backward` divides by the accumulation steps. The
    reduction divides the sum over all ranks by their number on stage 3. On the other stages it can be told to sum: it
    would divide in the gradients' dtype, which rounds unless the divisor is a power of two.
    """
    return accumulation_steps * (num_ranks if zero_stage == 3 else 1)


def _undo_dummy_step(wrapper: FP16_UnfusedOptimizer) -> None:
    """Undo the step with zero gradients that DeepSpeed 0.19.8 takes to allocate Adam's state (half precision, stage 0).

    It counts as step 1 of the bias correction and decays the master weights: after 3 steps parameters were 19 % off.
    """
    wrapper.optimizer.state.clear()
    for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        for master, parameter in zip(masters, parameters, strict=True):
            master.data.copy_(parameter.data)


def _skip_sums(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Leave out what DeepSpeed 0.19.8 does to gradients that have no other ranks' to be added.

    It copies them to fp32 and back, looks for non-finite ones in fp32 copies, and takes their norm from fp64 copies:
    75 of 120 bytes of memory traffic per parameter, 13 ms of a step of 173 with 1.2 billion parameters on an H200.
    """
    optimizer.buffered_reduce_fallback = lambda *args, **kwargs: None
    optimizer.check_overflow = lambda *args, **kwargs: None  # the norm, which comes next, finds them
    optimizer.get_grad_norm_direct = _norm


def _norm(gradients: Iterable[Tensor], params: Iterable[Tensor], norm_type: int = 2) -> Tensor:
    """A scalar in fp32; DeepSpeed's sign of a non-finite one is -1."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return torch.where(norm.isfinite(), norm, -1.0)


class TrainingEngine(Engine):
    """Data and sequence parallelism under ZeRO.

    Args:
        groups: DeepSpeed's mpu.
        attention: over the ranks that share this rank's sequence.
    """

    def __init__(self, config: Config, groups: ParallelGroups, attention: SequenceAttention) -> None:
        super().__init__(config, attention.sequence_rank, groups.data_rank, groups.data_degree)
        self.attention, engine = attention, config.engine
        tokens = engine.micro_batch_size * attention.layout(config.data.sequence_length).local_length
        tiles = tile_tokens(config, tokens), mlp_tile_tokens(config, tokens)
        if config.model.path:
            from recipes.model.huggingface import HuggingFaceModel  # imports transformers

            settings = deepspeed_config(config, num_parameters(config.model), dist.get_world_size())
            self.model = HuggingFaceModel(config, attention, self.device, *tiles, settings)
            self.notes = self.model.notes
        else:
            with self.device:
                self.model = Transformer(
                    config.model, attention, config.seed, engine.recompute, *tiles, engine.offload_activations
                )
        reduction = "mean" if engine.zero_stage == 3 else "sum"  # stage 3 cannot sum
        self._start_deepspeed(groups, seq_parallel_communication_data_type="fp32", gradient_allreduce_op=reduction)
        if isinstance(self.deepspeed.optimizer, FP16_UnfusedOptimizer):
            _undo_dummy_step(self.deepspeed.optimizer)
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            param_groups = self.deepspeed.optimizer.fp16_groups
            self.client_state = {MASTER_WEIGHT_NAMES: [[names[p] for p in group] for group in param_groups]}
        if isinstance(self.deepspeed.optimizer, DeepSpeedZeroOptimizer) and sums_nothing(config, dist.get_world_size()):
            _skip_sums(self.deepspeed.optimizer)
        self._loss_multiplier = loss_multiplier(
            engine.zero_stage, dist.get_world_size(), engine.gradient_accumulation_steps
        )

    def accumulate(self, micro_batches: Sequence[TokenBatch], stop_requested: bool = False) -> tuple[Tensor, Tensor]:
        """Forward and backward passes of one step. Afterwards the engine holds the reduced gradients.

        Returns:
            The mean token loss over the global batch, and the number of ranks that passed `stop_requested`.
        """
        self.deepspeed.train()
        num_valid = self._sum_over_ranks(torch.stack([batch.num_valid() for batch in micro_batches]).sum())
        loss_sum = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            report_status("part", "forward")
            local_sum = self._loss_sum(micro_batch)
            loss_sum += local_sum.detach()
            report_status("part", "backward")
            # without any valid token, loss and gradients are 0
            self.deepspeed.backward(local_sum * (self._loss_multiplier / num_valid.clamp(min=1)))
            if micro_batch is not micro_batches[-1]:
                self.deepspeed.step()  # counts the micro-batch; DeepSpeed updates at the boundary only
        report_status("part", "sum of the loss over ranks")
        self._local_loss_sum = loss_sum
        # filled on the device: copying a number there would make the host wait
        totals = torch.stack([loss_sum, loss_sum.new_full((), float(stop_requested))])
        loss_sum, num_stop_requests = self._sum_over_ranks(totals)
        return loss_sum / num_valid.clamp(min=1), num_stop_requests

    def train_step(self, micro_batches: Sequence[TokenBatch], stop_requested: bool = False) -> StepResult:
        assert len(micro_batches) == self.config.engine.gradient_accumulation_steps
        loss, num_stop_requests = self.accumulate(micro_batches, stop_requested)
        report_status("part", "optimizer")
        grad_norm = None
        if self.config.engine.zero_stage == 0 and self.config.engine.dtype == "fp32":
            # here DeepSpeed neither keeps the norm nor checks for overflow; each rank has the full gradients
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
            self.deepspeed.optimizer.overflow = not grad_norm.isfinite().item()
        with profiler_range("optimizer"):
            self.deepspeed.step()
        if grad_norm is None:
            grad_norm = self.deepspeed.get_global_grad_norm()
        return StepResult(loss, grad_norm, num_stop_requests, self.deepspeed.was_step_applied())

    def ranks_with_nonfinite_loss(self) -> list[int]:
        nonfinite = torch.zeros(dist.get_world_size(), device=self.device)
        nonfinite[dist.get_rank()] = ~self._local_loss_sum.isfinite()
        return self._sum_over_ranks(nonfinite).nonzero().flatten().tolist()

    @torch.no_grad()
    def mean_loss(self, micro_batches: Iterable[TokenBatch]) -> Tensor:
        self.deepspeed.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro_batch in micro_batches:
            totals[0] += self._loss_sum(micro_batch)
            totals[1] += micro_batch.num_valid().to(self.device, non_blocking=True)
        loss_sum, num_valid = self._sum_over_ranks(totals)
        return loss_sum / num_valid.clamp(min=1)

    @torch.no_grad()
    def token_scores(self, micro_batch: TokenBatch) -> Tensor:
        """[2, B, S] of this rank's tokens: `Head.token_scores`. Every rank must call it."""
        self.deepspeed.eval()
        return self.deepspeed(*self._inputs(micro_batch), micro_batch.documents, True)

    def close(self) -> None:
        """Free all memory that the engine holds, symmetric buffers included. Every rank must call it."""
        super().close()
        release_symmetric_buffers()

    def _loss_sum(self, micro_batch: TokenBatch) -> Tensor:
        return self.deepspeed(*self._inputs(micro_batch), micro_batch.documents)

    def _inputs(self, micro_batch: TokenBatch) -> list[Tensor]:
        with profiler_range("data"):
            tensors = micro_batch.tokens_BS, micro_batch.positions_BS, micro_batch.labels_BS
            return [tensor.to(self.device, non_blocking=True) for tensor in tensors]
