"""transformers' Trainer for sequences that ring attention spreads over several ranks.

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="ring")
    RingTrainer(model, TrainingArguments(...), train_dataset=dataset, sequence_degree=8).train()

`RingTrainerMixin` does the same for a subclass of Trainer, such as TRL's SFTTrainer. Ranks that share a sequence get
the same batch, and each trains on its part. Losses, gradients and counts are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ring_attention import hf
from ring_attention.attention import LocalAttention, RingAttention
from ring_attention.sequence_attention import SequenceAttention
from ring_attention.transport.collectives import gather_over_world, rank_in_world, ranks_of, world_size

_Base = Trainer if TYPE_CHECKING else object  # a mixin: the class beside it is the Trainer

_SHARD_ONLY = "would see the logits of this rank's tokens alone"
_UNTESTED = "was not tested with ring attention"
# arguments of Trainer and fields of TrainingArguments that must stay unset, and why
_REFUSED = {
    "compute_metrics": _SHARD_ONLY,
    "preprocess_logits_for_metrics": _SHARD_ONLY,
    "compute_loss_func": _SHARD_ONLY,
    "predict_with_generate": "would generate from this rank's tokens alone",
    "label_smoothing_factor": "is not in the loss of ring_attention.hf",
    "neftune_noise_alpha": "scales its noise by the length of this rank's part",
    "use_liger_kernel": _UNTESTED,
    "torch_compile": _UNTESTED,
    "fsdp": f"{_UNTESTED}; use DeepSpeed or DistributedDataParallel",
    "parallelism_config": "would cut the sequence a second time; give sequence_degree to the trainer",
}
# fields of TrainingArguments and of its accelerator_config, and the only values that are exact
_REQUIRED = {
    "average_tokens_across_devices": (True,),
    "train_sampling_strategy": ("random", "sequential"),
    "loss_type": ("nll",),  # of TRL's SFTConfig
    "split_batches": (False,),
    "dispatch_batches": (None, False),
    "even_batches": (True,),
    "use_seedable_sampler": (True,),
}


class RingTrainerMixin(_Base):
    """Put it before a Trainer: `class RingSFTTrainer(RingTrainerMixin, SFTTrainer)`. Every rank must construct it.

    Args:
        attention: a module of ring_attention.attention, over the ranks that share a sequence.
        sequence_degree: ranks that share a sequence, neighbours counted host by host, for a RingAttention with zigzag
            layout; a divisor of the ranks. None is all ranks.
        args, kwargs: the Trainer's. Its model is loaded with attn_implementation="ring". Its batches are whole
            sequences with unshifted labels, as `ring_attention.hf.shard` takes them, on the CPU.

    Raises:
        ValueError: for a model that `ring_attention.hf.check` refuses, for arguments of another type or with which a
            result would be wrong, or if sequence_degree does not divide the ranks. Later, for predictions: `evaluate`
            gives losses.
    """

    def __init__(
        self,
        *args: Any,
        attention: SequenceAttention | None = None,
        sequence_degree: int | None = None,
        **kwargs: Any,
    ) -> None:
        if attention is not None and sequence_degree is not None:
            raise ValueError("attention= has its ranks already: leave sequence_degree out")
        if attention is not None and not isinstance(attention, SequenceAttention):
            raise ValueError(f"attention={attention!r} must be a module, such as RingAttention: leave it out for one")
        if sequence_degree is not None and not isinstance(sequence_degree, int):
            raise ValueError(f"sequence_degree={sequence_degree!r} must be a whole number, such as 2")
        self.attention, self._sequence_degree = attention, sequence_degree
        super().__init__(*args, **kwargs)
        hf.check(self.model)  # pyright: ignore[reportArgumentType]
        self.model_accepts_loss_kwargs = True  # or the Trainer would divide a loss that num_items_in_batch has divided

    def _validate_args(self) -> None:
        super()._validate_args()
        if problems := list(self._problems()):
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        given = vars(self.args.accelerator_config) | vars(self.args)
        given |= {name: value for name, value in vars(self).items() if name in _REFUSED}
        for name, reason in _REFUSED.items():
            if given.get(name):
                yield f"{name} {reason}: leave it out"
        for name, legal in _REQUIRED.items():
            if name in given and given[name] not in legal:
                yield f"{name}={given[name]!r} must be {' or '.join(map(repr, legal))}"
        if (num_gpus := self.args.n_gpu) > 1:
            yield f"one process has {num_gpus} GPUs: start one for each, by torchrun --nproc-per-node={num_gpus}"

    # ------------------------------------------------------------------ the ranks

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # makes the process group
        if self.attention is None:
            self.attention = _ring_attention(self._sequence_degree)
        self.data_rank, self.data_degree = _data_rank_and_degree(self.attention)
        self.sequence_degree = self.args.world_size // self.data_degree
        self.accelerator.prepare_data_loader = self._prepare_data_loader

    def _prepare_data_loader(self, data_loader: DataLoader, *args: Any, **kwargs: Any) -> DataLoader:
        """In place of accelerate's, which gives different batches to all ranks. Batches stay on the CPU for `shard`."""
        accelerator = self.accelerator
        return prepare_data_loader(
            data_loader,
            num_processes=self.data_degree,
            process_index=self.data_rank,
            rng_types=["generator"],
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            use_stateful_dataloader=accelerator.use_stateful_dataloader,
        )

    # ------------------------------------------------------------------ a step

    def _shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        pad_token_id = getattr(self.processing_class, "pad_token_id", None) or 0
        assert self.attention is not None
        return hf.shard(batch, self.attention, device=self.args.device, pad_token_id=pad_token_id)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs if "ring_plan" in inputs else self._shard(inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Labels of all ranks and micro-batches of a step. Sharded only to count: the labels that the loss will see."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        return hf.count_labels([self._shard(batch) for batch in batch_samples])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = hf.loss(outputs, inputs, num_labels=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    # ------------------------------------------------------------------ counts of whole batches, not one per rank

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.sequence_degree

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) // self.sequence_degree

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.sequence_degree

    # ------------------------------------------------------------------ evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not prediction_loss_only:
            raise ValueError(f"predictions {_SHARD_ONLY}: use evaluate(), which gives the loss")
        return super().prediction_step(model, self._without_repeated_rows(inputs), True, ignore_keys)

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without labels of the rows by which accelerate fills up the last batches of the data ranks."""
        num_rows = self._num_rows_of_last_step()
        if self.data_degree == 1 or num_rows is None or "labels" not in inputs:
            return inputs
        labels = torch.as_tensor(inputs["labels"]).clone()
        batch_size = self.args.per_device_eval_batch_size
        if len(labels) != batch_size:
            raise ValueError(
                f"the last evaluation step has {num_rows} rows for {self.data_degree} data ranks, and its batches are "
                "flattened: use per_device_eval_batch_size=1, or a dataset that fills all steps"
            )
        labels[max(0, num_rows - self.data_rank * batch_size) :] = hf.IGNORED_LABEL
        return {**inputs, "labels": labels}

    def _num_rows_of_last_step(self) -> int | None:
        """Rows of all data ranks in an evaluation's last step; None in other steps, and if it is full."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder == 0:
            return None
        if state.remainder < 0 and self.data_degree > 1:
            raise ValueError(
                "the evaluation dataset has no length, so rows that fill up its last step would count twice: give one "
                "that has"
            )
        return state.remainder if state.remainder > 0 else None

    @property
    def gather_function(self) -> Any:
        """In place of accelerate's, which would weigh a step by all ranks: one loss for each row of all data ranks."""
        return self._repeat_for_rows

    @gather_function.setter
    def gather_function(self, function: Any) -> None:
        """The Trainer sets accelerate's."""

    def _repeat_for_rows(self, losses: Tensor) -> Tensor:
        """losses: [rows of this rank], all the mean over all ranks' labels."""
        return losses[:1].expand(self._num_rows_of_last_step() or len(losses) * self.data_degree)


class RingTrainer(RingTrainerMixin, Trainer):  # pyright: ignore[reportIncompatibleVariableOverride]
    """transformers' Trainer with the arguments of RingTrainerMixin."""


def _ring_attention(sequence_degree: int | None) -> SequenceAttention:
    """Over `sequence_degree` ranks, or all."""
    num_ranks = world_size()
    degree = num_ranks if sequence_degree is None else sequence_degree
    if degree < 1 or num_ranks % degree:
        raise ValueError(
            f"sequence_degree={degree} does not divide the {num_ranks} ranks: start a multiple of it, by "
            f"torchrun --nproc-per-node={max(degree, 1)}"
        )
    if num_ranks == 1:
        return LocalAttention("auto")
    import deepspeed  # takes seconds

    from ring_attention.groups import ParallelGroups

    deepspeed.init_distributed(verbose=False)  # takes over the Trainer's process group
    groups = ParallelGroups(num_ranks // degree, degree)
    return RingAttention("auto", groups.get_sequence_parallel_group(), layout="zigzag", hosts=groups.hosts)


def _data_rank_and_degree(attention: SequenceAttention) -> tuple[int, int]:
    """Which of the groups that share a sequence this rank is in, and how many there are."""
    own = rank_in_world()
    first = own if attention._group is None else min(ranks_of(attention._group))
    firsts = gather_over_world(first)
    order = sorted(set(firsts))
    return order.index(first), len(order)
