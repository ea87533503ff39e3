"""What one configuration does on a cluster: the time of a step, its memory, why it does not fit, what to type.

Time is `StepTime`'s, memory that of `StepMemory` and `state_bytes`. Here they meet the cluster's limits.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import shlex
from dataclasses import dataclass

from conf.degrees import accumulation_steps
from conf.schema import Config, Degrees, document_lengths
from recipes.planning.cluster import Cluster
from recipes.planning.host_offload import excess, host_bytes
from recipes.planning.memory import (
    MARGIN,
    StateBytes,
    bucket_size,
    dtype_bytes,
    gib,
    num_parameters,
    state_bytes,
)
from recipes.planning.memory_timeline import StepMemory
from recipes.planning.step_time import StepTime
from recipes.planning.throughput import training_flops_per_token
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, Mask

# what a command says by itself, from a forecast
_OWN = ("attention", "attention.method", "cluster", "documents", "launch.num_ranks", "parallelism", "recipe")
_OWN_PREFIXES = ("parallelism.", "plan.")
_OWN_ENGINE = (
    *("zero_stage", "micro_batch_size", "recompute", "train_batch_size", "gradient_accumulation_steps"),
    *("offload_activations", "offload_optimizer", "offload_parameters"),
)


@dataclass(frozen=True)
class Forecast:
    """A training step on all GPUs of a cluster.

    Args:
        config: of recipe=pretrain.
        degrees: the resolved grid; their product is the number of GPUs.
        method: the attention method, never auto.
        kernel: the attention kernel's name.
        lengths: of the documents of each sequence; empty: one document.
        typed: overrides of the command line, which `command` repeats.
    """

    config: Config
    degrees: Degrees
    method: str
    kernel: str
    cluster: Cluster
    lengths: tuple[int, ...] = ()
    typed: tuple[str, ...] = ()

    @functools.cached_property
    def step(self) -> StepTime:
        """Its time."""
        return StepTime(self.config, self.degrees, self.method, self.kernel, self.cluster, mask=mask_of(self.lengths))

    @functools.cached_property
    def memory(self) -> StepMemory:
        """Of one micro-batch of the step, on one GPU."""
        config, per_host = _of_one_micro_batch(self.config), self.cluster.gpus_per_host
        return StepMemory(config, self.degrees, self.method, self.local_tokens, on_gpu=True, ranks_per_host=per_host)

    @functools.cached_property
    def state(self) -> StateBytes:
        """Training states of one GPU: a lower bound of its memory."""
        return state_bytes(self.config, self.degrees)

    @property
    def unpredicted(self) -> str | None:
        """Why the memory of a step is not predicted, and only that of its states is known; None if it is."""
        return self.memory.unsupported

    @functools.cached_property
    def needed_bytes(self) -> float:
        """Of one GPU: the peak of a step; if that is `unpredicted`, a lower bound, of states and saved activations."""
        if self.unpredicted:
            return max(self.state.needed, self.state.total + self._saved_bytes)
        return max(self.state.needed, self.memory.peak.total + self._sums_bytes)

    @property
    def limit_bytes(self) -> float:
        """Of one GPU, without the margin."""
        return (1 - MARGIN) * self.cluster.memory_gib * 2**30

    @functools.cached_property
    def host_bytes(self) -> float:
        """Memory of one host for what its ranks offload."""
        return self.cluster.gpus_per_host * host_bytes(self.config, self.degrees, self.local_tokens)

    @property
    def host_limit_bytes(self) -> float:
        return (1 - MARGIN) * self.cluster.host_memory_gib * 2**30

    @property
    def fits(self) -> bool:
        """Whether GPUs and hosts have the memory."""
        return self.needed_bytes <= self.limit_bytes and self.host_bytes <= self.host_limit_bytes

    @property
    def refusal(self) -> str | None:
        """Why it does not fit, as arithmetic in one line; None if it does."""
        limit = f"{gib(self.limit_bytes)} GiB, {1 - MARGIN:.0%} of a GPU"
        if self.state.needed > self.limit_bytes:
            return f"{self.state} > {limit}"
        if self.needed_bytes > self.limit_bytes and self.unpredicted:
            saved = f"saved activations {gib(self._saved_bytes)}"
            return f"{self.state}, and {saved}: {gib(self.needed_bytes)} GiB > {limit}"
        if self.needed_bytes > self.limit_bytes:
            parts = {**self.memory.peak.parts, "sums of gradients over micro-batches": self._sums_bytes}
            summed = " + ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
            return f"{summed} = {gib(self.needed_bytes)} GiB > {limit}"
        if self.host_bytes > self.host_limit_bytes:
            return excess(self.cluster.gpus_per_host, self.host_bytes, self.host_limit_bytes)
        return None

    @functools.cached_property
    def tokens_per_s(self) -> float:
        """Of all GPUs, without padding."""
        return self.step.tokens_per_s

    @property
    def mfu_pct(self) -> float:
        """Model FLOPs, causal attention within each document counted once, over the data sheet's dense peak."""
        model, lengths = self.config.model, self.lengths or (self.config.data.sequence_length,)
        flops = sum(length * training_flops_per_token(model, length) for length in lengths) / sum(lengths)
        return 100 * self.tokens_per_s * flops / self.cluster.num_gpus / self.cluster.spec.peak_tflops / 1e12

    @property
    def local_tokens(self) -> int:
        """Of one micro-batch on one rank, padding included; with tensor ranks, between their matrices."""
        name, length, degrees = self.config.attention.layout, self.config.data.sequence_length, self.degrees
        layout = Layout(name, degrees.ring, length, degrees.ulysses)
        return self.config.engine.micro_batch_size * math.ceil(layout.local_length / degrees.tensor)

    @property
    def micro_batches(self) -> int:
        """Of a step, one after the other."""
        return accumulation_steps(self.config, self.degrees)

    @property
    def overrides(self) -> list[str]:
        """What to type behind train.py."""
        engine, degrees = self.config.engine, self.degrees
        own = [f"attention={self.method}"]
        if self.config.parallelism.method == "tensor_pipeline":
            own += ["parallelism=tensor_pipeline", f"parallelism.tensor_degree={degrees.tensor}"]
            own += [f"parallelism.pipeline_degree={degrees.pipeline}"]
        if self.method in ("ring", "hybrid", "all_gather"):
            own += [f"parallelism.ring_degree={degrees.ring}"]
        if self.method in ("ulysses", "hybrid"):
            own += [f"parallelism.ulysses_degree={degrees.ulysses}"]
        own += [f"engine.{name}={getattr(engine, name)}" for name in ("zero_stage", "micro_batch_size", "recompute")]
        offloads = ("offload_activations", "offload_optimizer", "offload_parameters")
        own += [f"engine.{name}=true" for name in offloads if getattr(engine, name)]
        if engine.train_batch_size is not None:
            own += [f"engine.train_batch_size={engine.train_batch_size}"]
        elif engine.gradient_accumulation_steps > 1:
            own += [f"engine.gradient_accumulation_steps={engine.gradient_accumulation_steps}"]
        return [*(override for override in self.typed if not _is_own(override)), "recipe=pretrain", *own]

    @property
    def command(self) -> str:
        """What to type, on each host."""
        cluster, overrides = self.cluster, shlex.join(self.overrides)
        if cluster.hosts == 1:
            return f"python train.py {overrides} launch.num_ranks={cluster.num_gpus}"
        return (
            f"torchrun --nnodes={cluster.hosts} --node-rank=RANK --nproc-per-node={cluster.gpus_per_host} "
            f"--master-addr=HOST --master-port=29500 train.py {overrides} hydra.run.dir=SHARED_FOLDER"
        )

    @property
    def _saved_bytes(self) -> float:
        """What layers save for the backward pass, whatever the engine: at least that under tensor ranks.

        A pipeline's first stage has its layers' of as many micro-batches as there are stages.
        """
        saved, layers = self.memory.timeline[0].parts["saved activations"], self.config.model.num_layers
        stages = self.degrees.pipeline
        return saved * math.ceil(layers / stages) / layers * min(stages, self.micro_batches)

    @property
    def _sums_bytes(self) -> float:
        """Sums of gradients that a micro-batch finds from the one before. `StepMemory` counts them as they come.

        So this is an upper bound. ZeRO-3 has them all the time. One rank alone has buckets only if it sums.
        """
        if self.micro_batches == 1 or self.config.engine.zero_stage == 3:
            return 0.0
        bucket = bucket_size(num_parameters(self.config.model)) if self.cluster.num_gpus == 1 else 0
        return self.state.gradients + 2 * dtype_bytes(self.config) * bucket


def mask_of(lengths: tuple[int, ...]) -> Mask:
    """Causal, within documents if there are any."""
    return CAUSAL.packed([0, *itertools.accumulate(lengths)]) if lengths else CAUSAL


def planned_lengths(config: Config) -> tuple[int, ...]:
    """Of the documents that `+documents=...` names; empty if it names none."""
    return () if config.documents is None else document_lengths(config)


def _of_one_micro_batch(config: Config) -> Config:
    config = copy.copy(config)  # not deep, which would take most of a search
    config.engine = copy.copy(config.engine)
    config.engine.train_batch_size, config.engine.gradient_accumulation_steps = None, 1
    return config


def _is_own(override: str) -> bool:
    name = override.partition("=")[0].lstrip("+")
    return name in _OWN or name.startswith(_OWN_PREFIXES) or name in {f"engine.{field}" for field in _OWN_ENGINE}
