"""The resolved plan of a run as lines of text: the banner, and with the arithmetic behind it, `explain=true`.

Needs the configuration and the hardware, no process group and no model: the launcher prints it without any rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from conf.degrees import accumulation_steps, resolve_config, resolve_degrees
from conf.schema import Config, ConfigError, Degrees, ModelConfig
from recipes.planning import memory_timeline
from recipes.planning.memory import (
    StateBytes,
    banner_rows,
    changed,
    gib,
    layer_matmul_parameters,
    mlp_tile_tokens,
    num_parameters,
    refusal,
    state_bytes,
    tile_tokens,
)
from recipes.planning.throughput import Throughput, peak_tflops
from ring_attention.auto_method import MESSAGE_LATENCY_MS, Candidate, Links, Workload, rank_methods
from ring_attention.kernels import KernelSpec, choose_kernel
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL
from ring_attention.schedule import imbalance, tokens_sent, work_per_rank
from ring_attention.transport import choose_transport

CPU_TFLOPS = 0.02  # attained by two cores
SLOW_STEP_S = 600.0

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Plan:
    """What follows from a configuration on `num_ranks` ranks of one kind of device.

    Args:
        memory_bytes: one rank's memory; None if it is not known, and then nothing is refused for want of it.

    Raises:
        ConfigError: on construction, for degrees that do not fit the ranks, and for a model that does not fit their
            memory; with explain=true the explanation says that instead.
    """

    config: Config
    num_ranks: int
    device_type: str
    device_name: str
    capability: tuple[int, int] | None
    ranks_per_host: int
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _ = self.degrees, self.accumulation_steps, self.kernel_choice()
        if self.refusal and not self.config.explain:
            raise ConfigError(self.refusal)

    @functools.cached_property
    def candidates(self) -> list[Candidate]:
        """For attention=auto: the ways to spread a sequence, the fastest by arithmetic first. Else none."""
        config = self.config
        if config.attention.method != "auto":
            return []
        data_degree = resolve_degrees(config, self.num_ranks).data
        return rank_methods(self.workload, self.links, self.num_ranks // data_degree)

    @property
    def workload(self) -> Workload:
        """One layer's attention in one micro-batch."""
        model, engine = self.config.model, self.config.engine
        peak = peak_tflops(self.device_name, engine.dtype)
        return Workload(
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            self.config.data.sequence_length,
            engine.micro_batch_size,
            DTYPES[engine.dtype].itemsize,
            # cuDNN reaches 0.6 of an H100's peak; assumed for what was not measured
            0.6 * peak if peak else {"cpu": CPU_TFLOPS}.get(self.device_type, 200.0),
            self.config.attention.layout,
        )

    @property
    def links(self) -> Links:
        given, on_cpu = self.config.attention, self.device_type == "cpu"
        return Links(
            self.ranks_per_host,
            given.intra_host_gb_per_s or (2.0 if on_cpu else 280.0),
            given.inter_host_gb_per_s or (1.0 if on_cpu else 45.0),
        )

    @functools.cached_property
    def method(self) -> str:
        """The attention method, never auto."""
        return self.candidates[0].method if self.candidates else self.config.attention.method

    @functools.cached_property
    def degrees(self) -> Degrees:
        if not self.candidates:
            return resolve_degrees(self.config, self.num_ranks, self.ranks_per_host)
        best = self.candidates[0]
        return Degrees(self.num_ranks // best.ring_degree // best.ulysses_degree, best.ring_degree, best.ulysses_degree)

    @property
    def transport(self) -> str:
        """How keys and values travel on a ring, never auto."""
        given = self.config.attention.transport
        return choose_transport(self.device_type) if given == "auto" else given

    @property
    def layout(self) -> Layout:
        """How a sequence's tokens lie over its ranks; of tensor ranks, between their matrices."""
        length = self.config.data.sequence_length
        if self.config.parallelism.method == "tensor_pipeline":
            return Layout("contiguous", self.degrees.tensor, length)
        return Layout(self.config.attention.layout, self.degrees.ring, length, self.degrees.ulysses)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per step."""
        return accumulation_steps(self.config, self.degrees)

    @property
    def sequences_per_step(self) -> int:
        return self.degrees.data * self.config.engine.micro_batch_size * self.accumulation_steps

    @property
    def data_tokens_per_step(self) -> int:
        """How far a step moves the corpus's cursor: a sequence of L predictions takes L + 1 tokens."""
        return self.sequences_per_step * (self.config.data.sequence_length + 1)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.config.data.sequence_length

    @property
    def local_tokens(self) -> int:
        """Of one micro-batch on one rank, padding included."""
        return self.config.engine.micro_batch_size * self.layout.local_length

    @property
    def tile_tokens(self) -> int:
        """Of how many of them logits exist at once; 0: of all."""
        return tile_tokens(self.config, self.local_tokens)

    @property
    def mlp_tile_tokens(self) -> int:
        """Of how many of them an MLP's hidden activations exist at once; 0: of all."""
        return mlp_tile_tokens(self.config, self.local_tokens)

    @property
    def has_ring(self) -> bool:
        """Whether ranks pass keys and values on."""
        return self.degrees.ring > 1 and self.method in ("ring", "hybrid")

    def resolve_config(self) -> None:
        """Write what the configuration left open into it, as it came out: for the record of a run."""
        method, degrees = self.method, self.degrees
        self.config.attention.method, self.config.attention.transport = method, self.transport
        resolve_config(self.config, degrees, self.num_ranks)

    def kernel_choice(self) -> tuple[str, str]:
        """The block kernel's name and why it was chosen."""
        model = self.config.model
        spec = KernelSpec(
            self.device_type,
            self.capability,
            DTYPES[self.config.engine.dtype],
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            deterministic=self.config.engine.deterministic,
        )
        try:
            block, reason = choose_kernel(spec, self.config.attention.kernel)
        except ValueError as error:
            raise ConfigError(f"attention.{error}".replace("use kernel", "use attention.kernel")) from error
        return block.name, reason

    @property
    def _one_memory(self) -> Config:
        """The configuration, on the CPU with all in its memory: what lies on the host lies there, too."""
        if self.device_type != "cpu":
            return self.config
        return changed(self.config, **{"engine.offload_optimizer": False, "engine.offload_parameters": False})

    @property
    def trains(self) -> bool:
        return self.config.recipe == "pretrain"

    def throughput(self, step_time_s: float) -> Throughput:
        """Of steps that took `step_time_s`: of training three forward passes' operations, else one's."""
        return Throughput(
            step_time_s,
            self.tokens_per_step,
            self.config.data.sequence_length,
            self.num_ranks,
            self.flops,
            peak_tflops(self.device_name, self.config.engine.dtype),
        )

    @property
    def slowness(self) -> str | None:
        """A warning of steps that a CPU takes many minutes for."""
        seconds = self.tokens_per_step * self.flops / (CPU_TFLOPS * 1e12)
        if self.device_type != "cpu" or seconds < SLOW_STEP_S:
            return None
        return (
            f"a step is {self.tokens_per_step * self.flops / 1e12:,.0f} TFLOP, which two CPU cores take about "
            f"{seconds / 3600:,.1f} hours for: use GPUs, or less of model, data.sequence_length and "
            "engine.train_batch_size"
        )

    @property
    def peak(self) -> memory_timeline.MemoryPoint | None:
        """When a training step takes most of a rank's memory; None if it is not predicted."""
        on_gpu = self.device_type == "cuda"
        return memory_timeline.peak(self.config, self.degrees, self.method, self.local_tokens, on_gpu)

    @property
    def shortage(self) -> str | None:
        """A warning of steps that take more memory than there is, by a prediction that is some percent off."""
        peak = self.peak
        if self.memory_bytes is None or self.refusal or peak is None or peak.total <= self.memory_bytes:
            return None
        return (
            f"a step should take {gib(peak.total)} GiB per rank, and there are {gib(self.memory_bytes)}: "
            "explain=true shows of what, and what length fits"
        )

    def banner(self, run_dir: Path) -> list[str]:
        config, model, layout = self.config, self.config.model, self.layout
        block, reason = self.kernel_choice()
        padding = layout.padded_length - layout.length
        shown = ("data", "tensor", "pipeline") if config.parallelism.method == "tensor_pipeline" else ("data", "ring")
        grid = " x ".join(
            f"{degree} {name}" for name, degree in self.degrees._asdict().items() if name in shown or degree > 1
        )
        alone = "; one rank holds whole sequences" if self.degrees.sequence == self.degrees.tensor == 1 else ""
        attention = f"{self.method}, layout {config.attention.layout}" if self.degrees.sequence > 1 else "local"
        attention += " (chosen by arithmetic: explain=true shows it)" if self.candidates else ""
        if self.degrees.sequence > 1:
            transport = f", transport {self.transport}" if self.method in ("ring", "hybrid") else ","
            carrier = "NCCL" if self.device_type == "cuda" else "gloo"
            if self.method in ("ring", "hybrid") and self.transport == "copy_engine":
                carrier = "symmetric memory" + ("" if self.degrees.ring <= self.ranks_per_host else f" and {carrier}")
            attention += f"{transport} over {carrier}"
        passes = "forward and backward" if self.trains else "forward"
        state = f"ZeRO stage {config.engine.zero_stage}"
        if not self.trains and config.engine.zero_stage < 3:
            state = "whole weights, no optimizer"
        rows = [
            ("ranks", f"{grid}, on {self.device_name}{alone}"),
            (
                "tokens",
                f"{layout.local_length:,} per rank of {layout.length:,} per sequence"
                + (f" ({padding} of padding)" if padding else "")
                + f"; {self.tokens_per_step:,} per step",
            ),
            (
                "model",
                f"{model.name}: {num_parameters(model) / 1e6:,.2f} M parameters, {model.num_layers} layers, "
                f"{model.num_heads} heads x {model.head_dim}, {model.num_kv_heads} kv heads",
            ),
            ("FLOPs per token", f"{self.flops / 1e6:,.1f} M {passes}, causal counted once"),
            ("attention", attention),
            ("block kernel", f"{block} ({reason})"),
            ("engine", f"{state}, {config.engine.dtype}"),
            *([] if config.recipe == "bench_attention" else banner_rows(config, self.local_tokens)),
            *(("!!!", warning) for warning in (self.slowness, self.shortage) if warning),
            ("run dir", str(run_dir)),
        ]
        return [f"{name:>16}  {value}" for name, value in rows]

    @property
    def flops(self) -> float:
        """Per token of a step: training is three forward passes' operations."""
        return (3 if self.trains else 1) * self.forward_flops

    @property
    def forward_flops(self) -> float:
        return forward_flops_per_token(self.config.model, self.config.data.sequence_length)

    def explanation(self, run_dir: Path) -> list[str]:
        """The banner and how its numbers come about."""
        config, layout, engine = self.config, self.layout, self.config.engine
        lines = [*self.banner(run_dir), "", "batch"]
        lines += [
            f"  {self.degrees.data} data ranks x {engine.micro_batch_size} sequences x "
            f"{self.accumulation_steps} micro-batches = {self.sequences_per_step} sequences per step",
            f"  x {layout.length:,} tokens = {self.tokens_per_step:,} tokens per step, "
            f"{self.tokens_per_step * config.num_steps:,} in {config.num_steps} steps",
        ]
        if self.candidates:
            work, links = self.workload, self.links
            lines += [
                "",
                f"attention=auto: one layer's forward pass on one rank, {work.num_heads} heads and {work.num_kv_heads} "
                f"kv heads x {work.head_dim}, L = {work.length:,}, batch {work.batch},",
                f"  kernels at {work.attained_tflops:g} TFLOP/s; links {links.intra_host_gb_per_s:g} GB/s within a "
                f"host of {links.ranks_per_host} ranks, {links.inter_host_gb_per_s:g} GB/s between; "
                f"{MESSAGE_LATENCY_MS} ms per message; the fastest is taken",
                *(f"  {candidate}" for candidate in self.candidates),
            ]
        if self.degrees.sequence > 1:
            lines += ["", *self._work_lines()]
        parameters = num_parameters(config.model)
        lines += ["", f"parameters: {parameters:,}"]
        lines.append(f"FLOPs per token, forward: {self.forward_flops:,.0f}; backward is twice that")
        lines += ["", *self.memory_lines(), *self.step_memory_lines()]
        return lines

    @property
    def state(self) -> StateBytes:
        """What the fullest rank holds before any activation."""
        return state_bytes(self._one_memory, self.degrees)

    @property
    def refusal(self) -> str | None:
        """Why the ranks' memory cannot hold the model; None if it can, is not known, or there is no model."""
        if self.memory_bytes is None or self.config.recipe == "bench_attention":
            return None
        host_ranks = self.ranks_per_host if self.device_type == "cpu" else None
        return refusal(self._one_memory, self.degrees, self.memory_bytes, host_ranks)

    def memory_lines(self) -> list[str]:
        """What the model takes of a rank's memory, and whether that is too much."""
        if self.refusal:
            return self.refusal.splitlines()
        of = "" if self.memory_bytes is None else f" of {gib(self.memory_bytes)} GiB, the memory of one rank"
        return [
            "weights, gradients and optimizer state per rank: a lower bound, without activations and buckets",
            f"  {self.state}{of}",
        ]

    def step_memory_lines(self) -> list[str]:
        """Where a rank's memory goes in a step; nothing where the model alone is too much."""
        if self.refusal or self.config.recipe == "bench_attention":
            return []
        on_gpu = self.device_type == "cuda"
        return memory_timeline.lines(
            self.config, self.degrees, self.method, self.local_tokens, self.memory_bytes, on_gpu
        )

    def _work_lines(self) -> list[str]:
        """What each ring rank computes and sends in one layer's attention."""
        layout, work = self.layout, work_per_rank(self.layout)
        lines = [
            f"layout {layout.name}: {layout.num_chunks} chunks of {layout.chunk_length:,} tokens; "
            "in one layer's attention of one micro-batch:"
        ]
        model, engine = self.config.model, self.config.engine
        per_token = 2 * model.num_kv_heads // self.degrees.ulysses * model.head_dim * engine.micro_batch_size
        moves = self.method in ("ring", "hybrid")
        for ring_rank, rank_work in enumerate(work):
            chunks = " and ".join(str(chunk) for chunk in layout.chunks(ring_rank))
            stages = " ".join(f"{pairs / 1e6:.3f}" for pairs in rank_work)
            line = f"  ring rank {ring_rank}: chunks {chunks}; million query-key pairs by stage: {stages}"
            if moves:
                keys, gradients = tokens_sent(layout, CAUSAL, ring_rank)
                forward = keys * per_token * DTYPES[engine.dtype].itemsize
                backward = forward + gradients * per_token * DTYPES[engine.dtype].itemsize
                line += f"; sends {forward / 2**20:.2f} MiB on the ring forward, {backward / 2**20:.2f} back"
            lines.append(line)
        lines.append(f"  imbalance (lockstep stages / mean rank) {imbalance(layout):.3f}")
        return lines


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of a forward pass per token, causal attention counted once.

    Matrix products cost 2 per weight. Backward costs twice the forward.
    """
    matmul = 2 * (model.num_layers * layer_matmul_parameters(model) + model.vocab_size * model.hidden_size)
    return matmul + model.num_layers * attention_flops_per_token(model, sequence_length)


def attention_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Those of one layer's causal attention: a query attends to (L + 1) / 2 keys on average, at 4 per head and
    dimension (two products of 2).
    """
    return 4 * model.num_heads * model.head_dim * (sequence_length + 1) / 2
