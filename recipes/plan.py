"""The resolved plan of a run as lines of text: the banner, and with the arithmetic behind it, `explain=true`.

Needs the configuration and the hardware, no process group and no model: the launcher prints it without any rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from conf.schema import Config, ConfigError, ModelConfig, resolve_degrees
from ring_attention.blocks import BlockSpec, choose_block
from ring_attention.layout import Layout
from ring_attention.schedule import imbalance, work_per_rank

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Plan:
    """What follows from a configuration on `num_ranks` ranks of one kind of device.

    Raises:
        ConfigError: on construction, for degrees that do not fit the ranks.
    """

    config: Config
    num_ranks: int
    device_type: str
    device_name: str
    capability: tuple[int, int] | None

    def __post_init__(self) -> None:
        resolve_degrees(self.config, self.num_ranks)
        self.block_choice()

    @property
    def data_degree(self) -> int:
        return resolve_degrees(self.config, self.num_ranks)[0]

    @property
    def ring_degree(self) -> int:
        return resolve_degrees(self.config, self.num_ranks)[1]

    @property
    def layout(self) -> Layout:
        return Layout(self.config.attention.layout, self.ring_degree, self.config.data.sequence_length)

    @property
    def sequences_per_step(self) -> int:
        engine = self.config.engine
        return self.data_degree * engine.micro_batch_size * engine.gradient_accumulation_steps

    @property
    def data_tokens_per_step(self) -> int:
        """How far a step moves the corpus's cursor: a sequence of L predictions takes L + 1 tokens."""
        return self.sequences_per_step * (self.config.data.sequence_length + 1)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.config.data.sequence_length

    def block_choice(self) -> tuple[str, str]:
        """The block kernel's name and why it was chosen."""
        model = self.config.model
        spec = BlockSpec(
            self.device_type,
            self.capability,
            DTYPES[self.config.engine.dtype],
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            self.config.engine.deterministic,
        )
        try:
            block, reason = choose_block(spec, self.config.attention.block)
        except ValueError as error:
            raise ConfigError(f"attention.{error}".replace("use block", "use attention.block")) from error
        return block.name, reason

    def banner(self, run_dir: Path) -> list[str]:
        config, model, layout = self.config, self.config.model, self.layout
        block, reason = self.block_choice()
        padding = layout.padded_length - layout.length
        ring_note = "; a ring of 1: one rank holds whole sequences" if self.ring_degree == 1 else ""
        transport = "none, one rank" if self.ring_degree == 1 else self.config.attention.transport
        if transport == "p2p":
            transport += " over " + ("NCCL" if self.device_type == "cuda" else "gloo")
        rows = [
            ("ranks", f"{self.data_degree} data x {self.ring_degree} ring, on {self.device_name}{ring_note}"),
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
            ("FLOPs per token", f"{3 * self.forward_flops / 1e6:,.1f} M forward and backward, causal counted once"),
            ("attention", f"{config.attention.method}, layout {config.attention.layout}, transport {transport}"),
            ("block kernel", f"{block} ({reason})"),
            ("engine", f"ZeRO stage {config.engine.zero_stage}, {config.engine.dtype}"),
            ("run dir", str(run_dir)),
        ]
        return [f"{name:>16}  {value}" for name, value in rows]

    @property
    def forward_flops(self) -> float:
        return forward_flops_per_token(self.config.model, self.config.data.sequence_length)

    def explanation(self, run_dir: Path) -> list[str]:
        """The banner and how its numbers come about."""
        config, layout, engine = self.config, self.layout, self.config.engine
        lines = [*self.banner(run_dir), "", "batch"]
        lines += [
            f"  {self.data_degree} data ranks x {engine.micro_batch_size} sequences x "
            f"{engine.gradient_accumulation_steps} micro-batches = {self.sequences_per_step} sequences per step",
            f"  x {layout.length:,} tokens = {self.tokens_per_step:,} tokens per step, "
            f"{self.tokens_per_step * config.num_steps:,} in {config.num_steps} steps",
        ]
        lines += ["", f"layout {layout.name}: {2 * self.ring_degree} chunks of {layout.chunk_length:,} tokens"]
        work = work_per_rank(layout)
        for ring_rank, rank_work in enumerate(work):
            first, second = layout.chunks(ring_rank)
            stages = " ".join(f"{pairs / 1e6:.3f}" for pairs in rank_work)
            lines.append(
                f"  ring rank {ring_rank}: chunks {first} and {second}; million query-key pairs by stage: {stages}"
            )
        lines.append(f"  imbalance (lockstep stages / mean rank) {imbalance(layout):.3f}")
        parameters = num_parameters(config.model)
        lines += ["", f"parameters: {parameters:,}"]
        lines.append(f"FLOPs per token, forward: {self.forward_flops:,.0f}; backward is twice that")
        lines += ["", "weights, gradients and optimizer state per rank: a lower bound, without activations and buckets"]
        weights, gradients, states = self._state_bytes(parameters)
        total = weights + gradients + states
        lines.append(
            f"  weights {weights / 2**20:,.1f} + gradients {gradients / 2**20:,.1f} + optimizer {states / 2**20:,.1f} "
            f"= {total / 2**20:,.1f} MiB"
        )
        return lines

    def _state_bytes(self, parameters: int) -> tuple[float, float, float]:
        """Weights, gradients and optimizer state per rank in bytes; each ZeRO stage divides one more by all ranks."""
        stage, ranks = self.config.engine.zero_stage, self.num_ranks
        weight_size = 4 if self.config.engine.dtype == "fp32" else 2
        master_size = (
            8 if self.config.engine.dtype == "fp32" else 12
        )  # two Adam moments and, in half precision, fp32 weights
        return (
            parameters * weight_size / (ranks if stage >= 3 else 1),
            parameters * (4 if stage >= 1 else weight_size) / (ranks if stage >= 2 else 1),
            parameters * master_size / (ranks if stage >= 1 else 1),
        )


def num_parameters(model: ModelConfig) -> int:
    """Trainable parameters of `recipes.transformer.Transformer`."""
    norm = model.hidden_size * (1 if model.norm == "rmsnorm" else 2)
    biases = 0
    if model.bias:
        qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
        biases = qkv_size + 2 * model.hidden_size + model.mlp_size * (2 if model.mlp == "swiglu" else 1)
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tied_head else 2)
    return embeddings + norm + model.num_layers * (_layer_matmul_parameters(model) + biases + 2 * norm)


def _layer_matmul_parameters(model: ModelConfig) -> int:
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim * model.hidden_size
    return attention + (3 if model.mlp == "swiglu" else 2) * model.mlp_size * model.hidden_size


def forward_flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of a forward pass per token, causal attention counted once.

    Matrix products cost 2 per weight. A query attends to (L + 1) / 2 keys on average, at 4 per head and dimension (two
    products of 2). Backward costs twice the forward.
    """
    matmul = 2 * (model.num_layers * _layer_matmul_parameters(model) + model.vocab_size * model.hidden_size)
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * (sequence_length + 1) / 2
    return matmul + attention
