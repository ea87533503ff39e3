"""What follows from a configuration on given ranks: grid, attention method, kernel, batch, FLOPs and memory.

A plan needs neither a process group nor a model, so the launcher makes one before it starts any rank.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from conf.degrees import accumulation_steps, resolve_config, resolve_degrees
from conf.schema import INFERENCE, WITHOUT_MODEL, Config, ConfigError, Degrees
from conf.stages import length_at, steps_by_length
from recipes.planning.auto_method import rank_methods
from recipes.planning.cluster import Cluster, calibration_refusal, cluster_of_ranks
from recipes.planning.host_offload import host_bytes, host_refusal
from recipes.planning.memory import StateBytes, changed, gib, state_bytes
from recipes.planning.memory_timeline import StepMemory
from recipes.planning.refusal import cache_refusal, evaluation_refusal, state_refusal, step_refusal
from recipes.planning.step_time import StepTime
from recipes.planning.throughput import (
    Throughput,
    Work,
    forward_flops_per_token,
    peak_tflops,
    training_flops_per_token,
)
from ring_attention.kernels import KernelSpec, choose_kernel
from ring_attention.layout import Layout
from ring_attention.transport import choose_transport

UNKNOWN_MEMORY_GIB = 80.0
SLOW_STEP_S = 600.0

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by engine.dtype


def kernel_choice(
    config: Config, device_type: str, capability: tuple[int, int] | None, is_elsewhere: bool = False
) -> tuple[str, str]:
    """The attention kernel's name, and why it was chosen.

    Args:
        is_elsewhere: whether the device is on another machine, which has every package.

    Raises:
        ConfigError: if attention.kernel cannot run there.
    """
    model = config.model
    spec = KernelSpec(
        device_type,
        capability,
        DTYPES[config.engine.dtype],
        model.num_heads,
        model.num_kv_heads,
        model.head_dim,
        windowed=model.window is not None and model.window <= config.data.sequence_length,
        softcap=model.softcap is not None,
        deterministic=config.engine.deterministic,
        is_elsewhere=is_elsewhere,
    )
    try:
        kernel, reason = choose_kernel(spec, config.attention.kernel)
    except ValueError as error:
        raise ConfigError(f"attention.{error}".replace("use kernel", "use attention.kernel")) from error
    return kernel.name, reason


@dataclass(frozen=True)
class Plan:
    """A configuration resolved for `num_ranks` ranks of one kind of device.

    Args:
        memory_bytes: of one rank. If None, it is unknown, and no model is too large.
        host_memory_bytes: of a host, for what its ranks offload. None: unknown.

    Raises:
        ConfigError: on construction, if the degrees do not fit the ranks, or for a `refusal`. With explain=true the
            explanation has the latter instead.
    """

    config: Config
    num_ranks: int
    device_type: str
    device_name: str
    capability: tuple[int, int] | None
    ranks_per_host: int
    memory_bytes: int | None = None
    host_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _ = self.degrees, self.accumulation_steps, self.kernel_choice()
        if self.refusal and not self.config.explain:
            raise ConfigError(self.refusal)

    @property
    def on_gpu(self) -> bool:
        return self.device_type == "cuda"

    @property
    def trains(self) -> bool:
        return self.config.recipe == "pretrain"

    @functools.cached_property
    def cluster(self) -> Cluster:
        """The ranks as a cluster, for forecasts of time."""
        given, memory_bytes = self.config.attention, self.memory_bytes or 0
        memory_gib = memory_bytes / 2**30 or UNKNOWN_MEMORY_GIB
        ranks = self.num_ranks, self.ranks_per_host
        ready = cluster_of_ranks(self.device_name, memory_gib, *ranks, self.config.cluster)
        return dataclasses.replace(
            ready,
            link_within_gb_per_s=given.intra_host_gb_per_s or ready.link_within_gb_per_s,
            link_between_gb_per_s=given.inter_host_gb_per_s or ready.link_between_gb_per_s,
        )

    @functools.cached_property
    def candidates(self) -> list[StepTime]:
        """For attention=auto: the ways to spread a sequence, fastest first by forecast. Else none."""
        if self.config.attention.method != "auto":
            return []
        data_degree = resolve_degrees(self.config, self.num_ranks).data
        return rank_methods(self.config, self.num_ranks, data_degree, self.kernel_choice()[0], self.cluster)

    @functools.cached_property
    def step_time(self) -> StepTime:
        """The forecast of a step's time in which each sequence is one document."""
        kernel = self.kernel_choice()[0]
        return StepTime(self.config, self.degrees, self.method, kernel, self.cluster)

    @functools.cached_property
    def method(self) -> str:
        """The attention method, never auto."""
        return self.candidates[0].method if self.candidates else self.config.attention.method

    @functools.cached_property
    def degrees(self) -> Degrees:
        if not self.candidates:
            return resolve_degrees(self.config, self.num_ranks, self.ranks_per_host)
        return self.candidates[0].degrees

    @property
    def has_ring(self) -> bool:
        """Whether ranks send keys and values around a ring."""
        return self.degrees.ring > 1 and self.method in ("ring", "hybrid")

    @property
    def transport(self) -> str:
        """What sends keys and values around a ring, never auto."""
        given = self.config.attention.transport
        if given != "auto":
            return given
        # with explain_gpu the torch here may lack CUDA
        return "copy_engine" if self.config.explain_gpu else choose_transport(self.device_type)

    @property
    def layout(self) -> Layout:
        """Which tokens of a sequence each of its ranks holds; with tensor ranks, between their matrices."""
        length = self.config.data.sequence_length
        if self.config.parallelism.method == "tensor_pipeline":
            return Layout("contiguous", self.degrees.tensor, length)
        return Layout(self.config.attention.layout, self.degrees.ring, length, self.degrees.ulysses)

    def kernel_choice(self) -> tuple[str, str]:
        """The attention kernel's name, and why it was chosen."""
        return kernel_choice(self.config, self.device_type, self.capability)

    def resolve_config(self) -> None:
        """Write what the configuration left open into it, as the record of a run."""
        degrees = self.degrees  # before the method is no longer auto
        self.config.attention.method, self.config.attention.transport = self.method, self.transport
        self.config.cluster = None  # its speeds chose the method
        resolve_config(self.config, degrees, self.num_ranks)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step."""
        return accumulation_steps(self.config, self.degrees)

    @property
    def sequences_per_step(self) -> int:
        return self.degrees.data * self.config.engine.micro_batch_size * self.accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Padding included; in the last stage, whose sequences are the longest."""
        return self.sequences_per_step * self.config.data.sequence_length

    def tokens_of_steps(self, first: int, last: int) -> int:
        """Of the steps `first` to `last`, padding included."""
        by_length = steps_by_length(self.config.data, first, last)
        return sum(self.sequences_per_step * length * num_steps for length, num_steps in by_length)

    def steps_left(self, step: int) -> float:
        """After a step, in steps like this one: those of longer sequences count by their FLOPs."""
        data = self.config.data
        length = length_at(data, step)
        left = steps_by_length(data, step + 1, self.config.num_steps)
        return sum(num * self._sequence_flops(longer) / self._sequence_flops(length) for longer, num in left)

    def _sequence_flops(self, length: int) -> float:
        return length * self._flops_per_token(length)

    @property
    def local_tokens(self) -> int:
        """Tokens of one micro-batch on one rank, padding included."""
        return self.config.engine.micro_batch_size * self.layout.local_length

    @property
    def flops(self) -> float:
        """Per token of a step in which each sequence is one document."""
        return self._flops_per_token(self.config.data.sequence_length)

    def _flops_per_token(self, length: int) -> float:
        of_step = training_flops_per_token if self.trains else forward_flops_per_token
        return of_step(self.config.model, length)

    def work(self, lengths: Iterable[int]) -> Work:
        """Of a step whose documents on all ranks have these lengths."""
        counts = collections.Counter(lengths)
        tokens = {length: length * count for length, count in counts.items()}
        return Work(sum(tokens.values()), sum(num * self._flops_per_token(length) for length, num in tokens.items()))

    def throughput(
        self, step_times_s: Sequence[float], work: Sequence[Work] | None = None, lengths: Sequence[int] | None = None
    ) -> Throughput:
        """The medians over steps.

        Args:
            work: of each step; None: every sequence is one document of full length.
            lengths: of each step's sequences; None: data.sequence_length.
        """
        full = Work(self.tokens_per_step, self.tokens_per_step * self.flops)
        steps = [*zip(step_times_s, work or [full] * len(step_times_s), strict=True)]
        tokens_per_s = 1 / statistics.median(time_s / one.tokens for time_s, one in steps)
        tflops = 1e-12 / statistics.median(time_s / one.flops for time_s, one in steps) / self.num_ranks
        lengths = lengths or [self.config.data.sequence_length] * len(step_times_s)
        tpot_ms = 1e3 * statistics.median(time_s / length for time_s, length in zip(step_times_s, lengths, strict=True))
        peak = peak_tflops(self.device_name, self.config.engine.dtype)
        mfu_pct = 100 * tflops / peak if peak else None
        return Throughput(tokens_per_s, tokens_per_s / self.num_ranks, tpot_ms, tflops, mfu_pct)

    @property
    def slow_step_warning(self) -> str | None:
        """Of steps that take a CPU many minutes."""
        if self.on_gpu or self.step_time.parts.total < SLOW_STEP_S:
            return None
        return (
            f"a step is {self.tokens_per_step * self.flops / 1e12:,.0f} TFLOP, about "
            f"{self.step_time.parts.total / 3600:,.1f} hours on two CPU cores: use GPUs, or reduce model, "
            "data.sequence_length or engine.train_batch_size"
        )

    @property
    def position_warning(self) -> str | None:
        """Of texts at lengths for which the model's rotary embeddings are not made."""
        model, length = self.config.model, self.config.data.sequence_length
        if self.config.recipe not in ("pretrain", *INFERENCE) or model.max_positions is None:
            return None
        if length <= model.max_positions:
            return None
        original = round(model.max_positions / model.stretched_by)
        stretch = "" if original == model.max_positions else f" = {original:,} x {model.stretched_by:g}"
        made_for = f"{model.max_positions:,}{stretch} that the model's rotary embeddings are made for"
        needed = f"model.rope='{{rope_type:yarn,factor:{math.ceil(length / original)}}}'"
        if self.config.recipe in INFERENCE:
            needed = f"{length:,} / {original:,} needs {needed}, and training with it"
            return f"{length:,} tokens are more than the {made_for}: {needed}"
        is_packed = self.config.data.document_mask
        what = f"documents of up to {length:,} tokens may be" if is_packed else f"sequences of {length:,} tokens are"
        return f"{what} longer than the {made_for}: {needed} stretches them"

    @property
    def _state_config(self) -> Config:
        """The configuration. On the CPU offloaded states stay in the same memory, so there it has no offload."""
        if self.device_type != "cpu":
            return self.config
        return changed(self.config, **{"engine.offload_optimizer": False, "engine.offload_parameters": False})

    @property
    def state(self) -> StateBytes:
        """Training states of the rank that holds most."""
        return state_bytes(self._state_config, self.degrees)

    @property
    def refusal(self) -> str | None:
        """Why a run is refused; None if it starts."""
        if not self.on_gpu and self.config.engine.dtype == "fp16":
            return "engine.dtype=fp16 needs a GPU: use engine.dtype=bf16 or engine.dtype=fp32 on the CPU"
        if not self.on_gpu and self.config.attention.transport == "copy_engine":
            return "attention.transport=copy_engine needs GPUs: use attention.transport=p2p on the CPU"
        if self.config.recipe == "generate" and self.degrees.data > 1:
            return (
                f"recipe=generate decodes one text at a time, but there are {self.degrees.data} data ranks: use "
                "attention=ring and leave parallelism.data_degree out, or launch.num_ranks=1"
            )
        if self.config.recipe == "calibrate":
            return calibration_refusal(self.device_name, self.num_ranks, self.ranks_per_host)
        return self.memory_refusal if self.config.launch.check_memory else None

    @property
    def memory_refusal(self) -> str | None:
        """Why ranks or hosts cannot hold the model or, by prediction, a step; None if they can or that is unknown."""
        return self._rank_refusal or self._host_refusal

    @property
    def _rank_refusal(self) -> str | None:
        if self.memory_bytes is None or self.config.recipe in WITHOUT_MODEL:
            return None
        host_ranks = self.ranks_per_host if self.device_type == "cpu" else None
        if refusal := state_refusal(self._state_config, self.degrees, self.memory_bytes, host_ranks):
            return refusal
        if self.config.recipe == "generate":
            return cache_refusal(self.config, self.degrees, self.memory_bytes)
        if self.config.recipe == "evaluate":
            return evaluation_refusal(self.config, self.degrees, self.memory_bytes, self.layout.local_length)
        return None if self.step_memory.unsupported else step_refusal(self.step_memory, self.memory_bytes)

    @property
    def _host_refusal(self) -> str | None:
        if self.memory_bytes is None or self.host_memory_bytes is None or not self.trains:
            return None
        return host_refusal(self.step_memory, self.memory_bytes, self.host_memory_bytes)

    @property
    def step_memory(self) -> StepMemory:
        tokens, per_host = self.local_tokens, self.ranks_per_host
        return StepMemory(self.config, self.degrees, self.method, tokens, self.on_gpu, per_host)

    @property
    def memory_warning(self) -> str | None:
        """Of a run that starts although it should not fit."""
        if self.refusal or not self.memory_refusal:
            return None
        who, needed, there = "a rank needs", self.state.needed, self.memory_bytes or 0
        if not self._rank_refusal:
            who, there = "the ranks of a host offload", self.host_memory_bytes or 0
            needed = self.ranks_per_host * host_bytes(self.config, self.degrees, self.local_tokens)
        elif not self.step_memory.unsupported:
            needed = max(needed, self.step_memory.peak.total)
        return (
            f"{who} {gib(needed)} GiB by prediction, and there are {gib(there)}: started all the same, with "
            "launch.check_memory=false"
        )
