"""The memory timeline of a training step, by arithmetic: what one rank holds at each point where memory can peak.

`engine_memory` has what DeepSpeed and Adam allocate. The tensors here are those of the model, and those that autograd
saves for each operation. On the CPU, all plain PyTorch, tests count them through the real engine
(`python -m tests.tools.memory`). On a GPU other kernels save and allocate other tensors: `recipes.model.ops` with
Liger, PyTorch's fused norms, flash-attn-4 in half precision, memory-efficient attention in fp32, the fused Adam.
docs/performance.md has measured peaks. Not included: what kernels allocate inside (cuBLAS 64 MiB on Hopper), what the
allocator loses to fragmentation, and the gradients of all keys under attention=all_gather.

Names end in their unit: `_bytes`, or `_per_token` for bytes per token of this rank. "Numbers" are elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from conf.schema import Config, Degrees
from recipes.planning.engine_memory import engine_memory, gradient_sum_bytes, num_persistent_parameters
from recipes.planning.memory import (
    LAYERS_ON_DEVICE,
    checkpoint_bytes,
    dtype_bytes,
    layer_matmul_parameters,
    mlp_bytes,
    mlp_tile_tokens,
    num_parameters,
    tile_tokens,
)

MAX_LIVE = 1_000_000_000  # parameters that ZeRO-3 gathers at most: DeepSpeed's stage3_max_live_parameters
STATES = "weights, optimizer states, persistent buffers"


@dataclass(frozen=True)
class MemoryPoint:
    """What a rank holds at one point of a step, in bytes by part."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass
class StepMemory:
    """The memory of one rank in a training step: in the only step if num_steps is 1, else in a later one.

    Args:
        method: the attention method, never auto.
        local_tokens: of one micro-batch on this rank, all its sequences and padding included.
    """

    config: Config
    degrees: Degrees
    method: str
    local_tokens: int
    on_gpu: bool

    def __post_init__(self) -> None:
        model, num_ranks = self.config.model, math.prod(self.degrees)
        self._size = dtype_bytes(self.config)
        self._engine = engine_memory(self.config, num_ranks, self.on_gpu)
        self._mlp_tile = mlp_tile_tokens(self.config, self.local_tokens)
        self._has_ring = self.method in ("ring", "hybrid") and self.degrees.ring > 1
        # numbers per token, and in matrices
        self._queries, self._keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self._head, self._mlp_down = model.vocab_size * model.hidden_size, model.mlp_size * model.hidden_size
        self._hidden = self._size * model.hidden_size  # bytes per token
        self._norm_per_token = self._norm_bytes()
        self.layer_per_token = self._layer_bytes()
        self._saved_per_token, self._recomputed_per_token = self._activation_bytes()
        self._states = {STATES: self._engine.persistent - (self._engine.adam if self.config.num_steps == 1 else 0)}
        if self.config.engine.zero_stage == 3 and num_ranks > 1:
            sharded = num_parameters(model) - num_persistent_parameters(model)
            self._states["gathered parameters"] = self._size * min(sharded, MAX_LIVE)
        # receive buffers of the copy engine for K,V and their gradients, allocated by the first layer
        self._symmetric_per_token = 0
        if self.on_gpu and self._has_ring and self.config.attention.transport != "p2p":
            self._symmetric_per_token = (2 if self.degrees.ring == 2 else 4) * 2 * self._size * self._keys
            self._states["the ring's symmetric buffers"] = self._symmetric_per_token * self.local_tokens
        # numbers whose gradients exist when the backward pass of the fullest layer begins, and after its MLP
        self._num_gradients = self._head
        if self.on_gpu and self.config.engine.offload_activations:
            # all layers but the first ones hold the same, and gradients accumulate
            self._num_gradients += max(0, model.num_layers - LAYERS_ON_DEVICE) * layer_matmul_parameters(model)
        # the CPU's bytes per token of attention were counted with the MLP's gradients
        mlp_matrices = (3 if model.mlp == "swiglu" else 2) if self.on_gpu else 0
        self._num_gradients_after_mlp = self._num_gradients + mlp_matrices * self._mlp_down
        # whether gradients are reduced as soon as they are computed, not after the backward pass
        self._reduces_early = self._engine.buckets > 0 or (self.on_gpu and self.config.engine.zero_stage == 3)

    @property
    def unsupported(self) -> str | None:
        """Why there is no prediction, and for what there is; None if there is one. All else requires that."""
        engine, parallelism = self.config.engine, self.config.parallelism.method
        accumulates = engine.gradient_accumulation_steps > 1 or engine.train_batch_size is not None
        can_offload = self.on_gpu and engine.zero_stage < 3 and engine.dtype != "fp32"
        for applies, what, supported in (
            (self.config.recipe != "pretrain", f"recipe={self.config.recipe}", "recipe=pretrain"),
            (parallelism != "sequence", "tensor and pipeline ranks", "parallelism.method=sequence"),
            (
                accumulates,
                "steps of several micro-batches",
                "engine.gradient_accumulation_steps=1 without engine.train_batch_size",
            ),
            (engine.offload_parameters, "offloaded weights", "engine.offload_parameters=false"),
            (
                engine.offload_optimizer and not can_offload,
                f"an offloaded optimizer with engine.zero_stage={engine.zero_stage} engine.dtype={engine.dtype} here",
                "engine.offload_optimizer=false, or on GPUs bf16 with stages 1 and 2",
            ),
            (engine.dtype == "fp16", "engine.dtype=fp16", "bf16 and fp32"),
        ):
            if applies:
                return f"not predicted for {what}, only for {supported}"
        return None

    @property
    def timeline(self) -> list[MemoryPoint]:
        """Every point that is the peak of some configuration."""
        points = [self._loss(), self._mlp(), self._attention(), self._step_end()]
        if self.config.model.norm == "rmsnorm" and not self.on_gpu:
            points.append(self._norm())
        if self._engine.head_reduction:
            points.append(self._head_reduction())
        return points

    @property
    def peak(self) -> MemoryPoint:
        return max(self.timeline, key=lambda point: point.total)

    def at_local_length(self, local_length: int) -> StepMemory:
        """With so many tokens of each sequence on this rank."""
        return replace(self, local_tokens=local_length * self.config.engine.micro_batch_size)

    def longest_length(self, memory_bytes: float) -> int:
        """The most tokens of a sequence, a multiple of its ranks, that fit in a rank's memory; 0 if none do."""

        def fits(local_length: int) -> bool:
            return self.at_local_length(local_length).peak.total <= memory_bytes

        if not fits(1):
            return 0
        fitting, too_long = 1, 2
        while fits(too_long):
            fitting, too_long = too_long, 2 * too_long
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            fitting, too_long = (middle, too_long) if fits(middle) else (fitting, middle)
        return fitting * self.degrees.sequence

    # The points of a step. In the backward pass, that of the last layer is the peak: all others still hold theirs.

    def _loss(self) -> MemoryPoint:
        return MemoryPoint(
            "the loss, backward",
            {
                **self._states,
                "saved activations": self._saved_per_token * self.local_tokens,
                "final norm": self._norm_per_token * self.local_tokens,
                **self._loss_parts(),
            },
        )

    def _mlp(self) -> MemoryPoint:
        model, hidden = self.config.model, self._hidden
        name, recomputed = "the last layer's MLP, backward", self._recomputed_per_token
        if self._mlp_tile:
            return self._layer_point(
                name, recomputed, 2 * hidden, self._num_gradients, self._tiled_mlp_bytes(self._mlp_tile)
            )
        # gradients of the MLP's product, of one factor, and of the layer's output
        widths = 2 if model.mlp == "swiglu" else 1
        gradients = widths * self._size * model.mlp_size + hidden
        # ZeRO-3 has no buckets: the gradient of the down projection waits for its reduction
        down = self._mlp_down if self._reduces_early and not self._engine.buckets else 0
        return self._layer_point(name, recomputed, gradients, self._num_gradients + self._mlp_down, self._size * down)

    def _attention(self) -> MemoryPoint:
        recomputed = self._recomputed_per_token - self.layer_per_token["MLP"] - self._norm_per_token
        gradients = self._attention_per_token() - self._symmetric_per_token + self._hidden
        return self._layer_point(
            "the last layer's attention, backward", recomputed, gradients, self._num_gradients_after_mlp
        )

    def _norm(self) -> MemoryPoint:
        """RMSNorm on the CPU: five tensors in fp32, and of the final norm its input."""
        hidden_size = self.config.model.hidden_size
        if self.config.engine.recompute == "none":
            return self._layer_point("the final norm, backward", 0, 24 * hidden_size, self._head)
        recomputed = self._recomputed_per_token - self.layer_per_token["MLP"]
        gradients = 16 * hidden_size + self._hidden
        return self._layer_point(
            "the last layer's second norm, backward", recomputed, gradients, self._num_gradients_after_mlp
        )

    def _head_reduction(self) -> MemoryPoint:
        return MemoryPoint(
            "the reduction of the head's gradient",
            {
                **self._states,
                "saved activations": self._saved_per_token * self.local_tokens,
                "gradients and backward temporaries": self._hidden * self.local_tokens,
                "gradient buckets and the reduced gradient": self._engine.buckets + self._engine.head_reduction,
            },
        )

    def _step_end(self) -> MemoryPoint:
        return MemoryPoint(
            "the end of the step",
            {
                STATES: self._engine.persistent,
                "gradients, buckets, optimizer temporaries": self._engine.step_end,
            },
        )

    def _layer_point(
        self, name: str, recomputed: float, gradients: float, num_gradients: int, extra_bytes: float = 0
    ) -> MemoryPoint:
        """A point in the backward pass of a layer.

        Args:
            recomputed: per token, of the layer's activations. Negative where some saved ones are free already.
            gradients: per token, with what computes them.
            num_gradients: numbers whose gradients have been computed.
        """
        return MemoryPoint(
            name,
            {
                **self._states,
                "saved activations": (self._saved_per_token + min(recomputed, 0)) * self.local_tokens,
                "recomputed layer": max(recomputed, 0) * self.local_tokens,
                "gradients and backward temporaries": gradients * self.local_tokens
                + extra_bytes
                + self._gradient_bytes(num_gradients),
                "gradient buckets": self._engine.buckets,
            },
        )

    # What the points are made of.

    def _norm_bytes(self) -> float:
        """Per token: input, output and statistics. The CPU's RMSNorm saves its input, also normalised, in fp32."""
        hidden_size, size = self.config.model.hidden_size, self._size
        has_mean = self.config.model.norm == "layernorm"
        if self.on_gpu:
            return 2 * size * hidden_size + (8 if has_mean else 4)
        return 2 * size * hidden_size + 2 * size if has_mean else 8 * hidden_size + 4 + size * hidden_size

    def _layer_bytes(self) -> dict[str, float]:
        """Per token: what a layer saves for its backward pass, by part."""
        model = self.config.model
        attention = self._size * 2 * (self._queries + self._keys) + 4 * model.num_heads  # q, out, k, v, lse
        if self.method in ("ulysses", "hybrid"):
            attention += self._size * 2 * self._keys  # k and v as they were sent
        # gate and up, silu(gate) except with Liger, and the product; or the input and output of GELU
        widths = (3 if self.on_gpu else 4) if model.mlp == "swiglu" else 2
        mlp = 0 if self._mlp_tile else self._size * model.mlp_size * widths
        return {"norms": 2 * self._norm_per_token, "attention": attention, "MLP": mlp}

    def _activation_bytes(self) -> tuple[float, float]:
        """Per token: what all layers save for the backward pass, and what the recomputation of one layer adds."""
        model, engine, layer = self.config.model, self.config.engine, sum(self.layer_per_token.values())
        cos_sin = 4 * model.head_dim  # which the layers share
        if engine.recompute == "none":
            return model.num_layers * layer + cos_sin, 0
        on_device = min(LAYERS_ON_DEVICE, model.num_layers) if engine.offload_activations else model.num_layers
        checkpoint = checkpoint_bytes(self.config)
        recomputed = layer - (checkpoint - self._hidden)
        # the norm saves the layer's input, which is saved already, unless the CPU's RMSNorm casts it to fp32
        if self.on_gpu or model.norm == "layernorm" or self._size == 4:
            recomputed -= self._hidden
        return on_device * checkpoint + cos_sin, recomputed

    def _gradient_bytes(self, num_gradients: int) -> float:
        """Gradients, or their fp32 sums, once so many numbers have theirs."""
        if not self._reduces_early:
            return self._size * num_gradients
        if not self.on_gpu:
            return 0
        waiting = 0
        if self.config.model.tied_head:  # its gradient waits for the embedding's
            waiting, num_gradients = self._size * self._head, num_gradients - self._head
        return waiting + gradient_sum_bytes(self.config.model, self._size, self._engine.gradients, num_gradients)

    def _loss_parts(self) -> dict[str, float]:
        """Logits in fp32 and two gradients of them. On a GPU, where only compiled kernels use fp32, logits and one."""
        vocab_size, hidden_size, size = self.config.model.vocab_size, self.config.model.hidden_size, self._size
        tile = tile_tokens(self.config, self.local_tokens)
        sums = {"gradients of the loss, fp32": 4.0 * hidden_size * (self.local_tokens + vocab_size)} if tile else {}
        if self.on_gpu and not tile:
            # both, or the logits' gradient beside the weight's
            numbers = max(2 * self.local_tokens, self.local_tokens + hidden_size)
            return {"logits and their gradient": float(size * vocab_size * numbers)}
        if self.on_gpu:
            # the forward pass holds a tile beside the fp32 sums; the backward pass casts these one after the other
            numbers = max(2.0 * tile, hidden_size)
            return {"logits of a tile and their gradient, or cast gradients": size * vocab_size * numbers, **sums}
        if not tile:
            return {"logits and two gradients of them, fp32": 12.0 * vocab_size * self.local_tokens}
        # fp32 beside the logits; or, in half precision, logits and their gradient, which the CPU casts with the weight
        casts = 4 * vocab_size * (tile + hidden_size) if size == 2 else 0
        logits = max((12 + size) * vocab_size * tile, 2 * size * vocab_size * tile + casts)
        return {"logits of a tile and their gradients": logits, **sums}

    def _tiled_mlp_bytes(self, tile: int) -> float:
        """The backward pass of tiles: fp32 sums of the weights' gradients, and one tile's tensors."""
        model, size = self.config.model, self._size
        is_gated, width = model.mlp == "swiglu", model.mlp_size
        weights = (3 if is_gated else 2) * width * model.hidden_size
        if self.on_gpu:  # a tile's activations and their gradients; at last, in half precision, the cast sums
            return 4 * weights + max(mlp_bytes(self.config) * tile, 2 * weights if size == 2 else 0)
        # gate and up, the product, gradients of these, of one factor and of silu. Half precision lacks the last two,
        # but the CPU casts the gradient of gate and up, and the input.
        half_per_token = (18 if is_gated else 10) * width + 4 * model.hidden_size
        per_token = 4 * (8 if is_gated else 4) * width if size == 4 else half_per_token
        return 4 * weights + per_token * tile

    def _attention_per_token(self) -> float:
        """What attention's backward pass allocates, messages and receive buffers included.

        flash-attn-4, on GPUs in half precision, sums dq in fp32 and, where query heads share keys, dk and dv too. Other
        kernels copy keys to all heads.
        """
        queries, keys, size, ring_degree = self._queries, self._keys, self._size, self.degrees.ring
        if self.on_gpu and size == 2:
            rows = 8 * self.config.model.num_heads  # lse and the row sums of dout * out
            shared = 8 * keys if keys < queries else 0
            if not self._has_ring:  # the output's gradient, three gradients, dq in fp32
                return rows + 8 * queries + 4 * keys + shared
            # Two ranks: half of the local tile, with dq in fp32, while gradients return. More: own gradients in fp32,
            # K,V, gradients sent and received, and one tile's. The factors of `keys` were measured.
            if ring_degree == 2:
                return rows / 2 + 9 * queries + 16 * keys + shared / 2
            return max(rows + 10 * queries + 28 * keys + shared, 6 * queries + 38 * keys)
        tile = 6 * size * queries  # the output's gradient, K, V and three gradients, for all heads
        if not self._has_ring:
            return tile + (2 * size * keys if keys < queries else 0)
        # first half of a tile; fp32 sums and messages, as counted with 2, 3, 4 and 6 ranks
        counted = (8, 40, 40, 40) if keys < queries else (5, 12, 17, 25) if size == 2 else (8, 18, 26, 30)
        return tile + (3 * size + counted[min(ring_degree, 5) - 2]) * keys
