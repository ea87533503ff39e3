"""The memory timeline of a training step, by arithmetic: what one rank holds at each point where memory can peak.

`engine_memory` has what DeepSpeed and Adam allocate. Here are the model's tensors and those that autograd saves. On the
CPU all is plain PyTorch, and tests count it in the real engine (`python -m tests.tools.memory`). On GPUs other kernels
save other tensors: Liger, PyTorch's fused norms, flash-attn-4 in half precision, memory-efficient attention in fp32,
the fused Adam. docs/performance.md has measured peaks. Not included: workspaces of other kernels than cuBLAS,
fragmentation, and the gradients of all keys under attention=all_gather.

Names end in their unit: `_bytes`, or `_per_token` for bytes per token of this rank. "Numbers" are elements.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from conf.degrees import accumulation_steps
from conf.schema import Config, Degrees
from recipes.planning.engine_memory import gradient_sum_bytes, on_cpu, on_gpu, sharded_parameters
from recipes.planning.exchange_memory import ExchangeMemory, most_exchanged, symmetric_buffer_shards
from recipes.planning.memory import (
    LAYERS_ON_DEVICE,
    checkpoint_tensors,
    dtype_bytes,
    layer_matmul_parameters,
    loss_tiles,
    mlp_bytes,
    mlp_tile_tokens,
    tile_tokens,
)
from recipes.planning.pass_graphs import graph_memory

# PyTorch allocates 32 MiB on Hopper, 8 on older GPUs, for each cuBLAS handle: those of the threads of forward and
# backward pass
CUBLAS_BYTES = 2 * 2**25
MAX_LIVE = 1_000_000_000  # parameters that ZeRO-3 gathers at most: DeepSpeed's stage3_max_live_parameters
STATES, GATHERED = "weights, optimizer states, persistent buffers", "gathered parameters"


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
        ranks_per_host: decides whether a ring's passes are CUDA graphs.
    """

    config: Config
    degrees: Degrees
    method: str
    local_tokens: int
    on_gpu: bool
    ranks_per_host: int

    def __post_init__(self) -> None:
        config, model, num_ranks = self.config, self.config.model, math.prod(self.degrees)
        self._size = dtype_bytes(config)
        self._engine = (on_gpu if self.on_gpu else on_cpu)(config, num_ranks)
        self._mlp_tile = mlp_tile_tokens(config, self.local_tokens)
        self._has_ring = self.method in ("ring", "hybrid") and self.degrees.ring > 1
        # in batches whose documents allow it; they are not known here, so a pass may also go around the ring
        is_packed = config.data.document_mask and config.attention.layout == "balanced"
        self._has_exchange = self._has_ring and is_packed
        self._zero3_on_gpu = self.on_gpu and config.engine.zero_stage == 3  # it reduces gradients at once
        # numbers per token, and in matrices
        self._queries, self._keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self._head, self._mlp_down = model.vocab_size * model.hidden_size, model.mlp_size * model.hidden_size
        self._hidden = self._size * model.hidden_size  # bytes per token
        self._norm_per_token = self._norm_bytes()
        self._layer_per_token = self._layer_bytes()
        self._states = {STATES: self._engine.persistent - (self._engine.adam if config.num_steps == 1 else 0)}
        if config.engine.zero_stage == 3 and num_ranks > 1:
            gathered = min(sharded_parameters(model), MAX_LIVE)
            if config.num_steps == 1:  # at most: until a step's order is recorded, each module releases its own
                gathered = max(self._head, layer_matmul_parameters(model))
            self._states[GATHERED] = self._size * gathered
        if self.on_gpu:
            self._states["cuBLAS workspaces"] = CUBLAS_BYTES
        # receive buffers of the copy engine for K,V and their gradients, allocated by the first layer
        self._symmetric_per_token = 0
        if self.on_gpu and self._has_ring and config.attention.transport != "p2p":
            num_pairs = 1 if self.degrees.ring == 2 else 2
            self._symmetric_per_token = num_pairs * 2 * (self._size + self._gradient_size) * self._keys
            shards = symmetric_buffer_shards(self.degrees.ring) / num_pairs if self._has_exchange else 1
            self._states["the ring's symmetric buffers"] = shards * self._symmetric_per_token * self.local_tokens
        shape = self.degrees, self.method, self.ranks_per_host, self.local_tokens
        self._graphs = graph_memory(config, *shape) if self.on_gpu else None
        if self._graphs:  # from the second layer or step on
            working = self._attention_per_token() - self._symmetric_per_token - self._size * self._queries
            self._states["CUDA graphs of the ring's passes"] = self._graphs.kept(working) * self.local_tokens

    @property
    def _gradient_size(self) -> int:
        """Of a number of dK,dV on their way: flash-attn-4's sums travel in fp32 (`ring_attention.key_gradients`)."""
        has_sums = self.on_gpu and self._size == 2 and self._keys < self._queries
        return 4 if has_sums and self.config.attention.layout != "balanced" else self._size

    @property
    def unsupported(self) -> str | None:
        """Why there is no prediction; None if there is one. All else requires that."""
        config, engine, method = self.config, self.config.engine, self.config.parallelism.method
        accumulation = accumulation_steps(config, self.degrees)
        can_offload = self.on_gpu and engine.zero_stage < 3 and engine.dtype != "fp32"
        offload = "engine.offload_optimizer=true, except on GPUs with bf16 and ZeRO stages 1 and 2"
        applies = {
            f"recipe={config.recipe}": config.recipe != "pretrain",
            f"parallelism={method}": method != "sequence",
            f"gradient accumulation over {accumulation} micro-batches": accumulation > 1,
            "engine.offload_parameters=true": engine.offload_parameters,
            offload: engine.offload_optimizer and not can_offload,
            "engine.dtype=fp16": engine.dtype == "fp16",
            "LoRA": config.lora.rank > 0,
            "mixtures of experts": config.model.num_experts > 1,
        }
        return next((f"not predicted for {setting}" for setting in applies if applies[setting]), None)

    @property
    def timeline(self) -> list[MemoryPoint]:
        """Every point that is the peak of some configuration, in their order."""
        parts = {name: size for name, size in self._states.items() if name != GATHERED}
        parts |= {STATES: self._engine.persistent, "gradients, buckets, optimizer temporaries": self._engine.step_end}
        return [*self._loss_points(), *self._layer_points(), MemoryPoint("the end of the step", parts)]

    @property
    def peak(self) -> MemoryPoint:
        return max(self.timeline, key=lambda point: point.total)

    def longest_length(self, memory_bytes: float) -> int:
        """The most tokens of a sequence, a multiple of its ranks, that fit in a rank's memory; 0 if none do."""

        def peak_bytes(local_length: int) -> float:
            return replace(self, local_tokens=local_length * self.config.engine.micro_batch_size).peak.total

        return bisect.bisect(range(1, 2**40), memory_bytes, key=peak_bytes) * self.degrees.sequence

    def _loss_points(self) -> Iterator[MemoryPoint]:
        norm = self._norm_per_token * self.local_tokens
        yield self._backward_point("the loss, backward", {"final norm": norm, **self._loss_parts()})
        if self._engine.head_reduction:
            reduced = self._engine.buckets + self._engine.head_reduction
            parts = {
                "gradients and backward temporaries": self._hidden * self.local_tokens,
                "gradient buckets and the reduced gradient": reduced,
            }
            yield self._backward_point("the reduction of the head's gradient", parts)

    def _layer_points(self) -> Iterator[MemoryPoint]:
        """The backward pass of the last layer, while all others still hold their activations."""
        model, recomputed = self.config.model, self._recomputed_per_token()
        has_cpu_rmsnorm = model.norm == "rmsnorm" and not self.on_gpu  # with five tensors in fp32
        if has_cpu_rmsnorm and self.config.engine.recompute == "none":  # ... and the input of the final norm
            yield self._layer_point("the final norm, backward", 0, 24 * model.hidden_size, self._head)
        num_gradients = self._head
        if self.on_gpu and self.config.engine.offload_activations:
            # all layers but the first ones hold the same, and gradients accumulate
            num_gradients += max(0, model.num_layers - LAYERS_ON_DEVICE) * layer_matmul_parameters(model)
        name = "the last layer's MLP, backward"
        if self._mlp_tile:
            yield self._layer_point(name, recomputed, 2 * self._hidden, num_gradients, self._tiled_mlp_bytes())
        else:  # gradients of the MLP's product, of one factor, and of the layer's output
            gradients = (2 if model.mlp == "swiglu" else 1) * self._size * model.mlp_size + self._hidden
            # ZeRO-3 has no buckets: the gradient of the down projection waits for its reduction
            waiting = self._size * self._mlp_down if self._zero3_on_gpu else 0
            yield self._layer_point(name, recomputed, gradients, num_gradients + self._mlp_down, waiting)
        recomputed -= self._layer_per_token["MLP"]
        if self.on_gpu:  # the CPU's bytes per token of attention were counted with the MLP's gradients
            num_gradients += (3 if model.mlp == "swiglu" else 2) * self._mlp_down
        if has_cpu_rmsnorm and self.config.engine.recompute != "none":
            name, gradients = "the last layer's second norm, backward", 16 * model.hidden_size + self._hidden
            yield self._layer_point(name, recomputed, gradients, num_gradients)
        recomputed -= self._norm_per_token
        if self._graphs:  # they have the rest
            attention = self._size * self._queries + self._graphs.results  # the output's gradient, and copies
        else:
            attention = self._attention_per_token() - self._symmetric_per_token
        gradients = max(attention, self._exchange_per_token()) + self._hidden
        yield self._layer_point("the last layer's attention, backward", recomputed, gradients, num_gradients)

    def _backward_point(self, name: str, parts: dict[str, float], freed: float = 0) -> MemoryPoint:
        """A point in the backward pass: states, saved activations but those `freed` per token, and `parts`."""
        saved = (self._saved_per_token() - freed) * self.local_tokens
        return MemoryPoint(name, {**self._states, "saved activations": saved, **parts})

    def _layer_point(
        self, name: str, recomputed: float, gradients: float, num_gradients: int, extra_bytes: float = 0
    ) -> MemoryPoint:
        """A point in the backward pass of a layer.

        Args:
            recomputed: per token, of the layer's activations. Negative where some saved ones are free already.
            gradients: per token, with what computes them.
            num_gradients: numbers whose gradients have been computed.
        """
        gradient_bytes = gradients * self.local_tokens + extra_bytes + self._gradient_bytes(num_gradients)
        parts = {
            "recomputed layer": max(recomputed, 0) * self.local_tokens,
            "gradients and backward temporaries": gradient_bytes,
            "gradient buckets": self._engine.buckets,
        }
        return self._backward_point(name, parts, freed=max(-recomputed, 0))

    def _norm_bytes(self) -> float:
        """Per token: input, output and statistics. The CPU's RMSNorm saves its input, also normalised, in fp32."""
        hidden, has_mean = self._hidden, self.config.model.norm == "layernorm"
        if self.on_gpu:
            return 2 * hidden + (8 if has_mean else 4)
        return 2 * hidden + 2 * self._size if has_mean else 8 * self.config.model.hidden_size + 4 + hidden

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

    def _saved_per_token(self) -> float:
        """What all layers save for the backward pass."""
        engine, num_layers = self.config.engine, self.config.model.num_layers
        if engine.offload_activations:
            num_layers = min(LAYERS_ON_DEVICE, num_layers)
        tensors = self._layer_per_token.values() if engine.recompute == "none" else checkpoint_tensors(self.config)
        return num_layers * sum(tensors) + 4 * self.config.model.head_dim  # layers share the rotary cos and sin

    def _recomputed_per_token(self) -> float:
        """What the recomputation of one layer adds to what it saved."""
        if self.config.engine.recompute == "none":
            return 0
        recomputed = sum(self._layer_per_token.values()) - (sum(checkpoint_tensors(self.config)) - self._hidden)
        # the norm saves the layer's input, which is saved already, unless the CPU's RMSNorm casts it to fp32
        if self.on_gpu or self.config.model.norm == "layernorm" or self._size == 4:
            recomputed -= self._hidden
        return recomputed

    def _gradient_bytes(self, num_gradients: int) -> float:
        """Gradients, or their fp32 sums, once so many numbers have theirs."""
        if not self._engine.buckets and not self._zero3_on_gpu:  # they are reduced after the backward pass
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
        if not tile and self.on_gpu:  # both, or the logits' gradient beside the weight's
            numbers = self.local_tokens + max(self.local_tokens, hidden_size)
            return {"logits and their gradient": float(size * vocab_size * numbers)}
        if not tile:
            return {"logits and two gradients of them, fp32": 12.0 * vocab_size * self.local_tokens}
        # Each tile beside the sums in fp32: of the weight's gradient and of all tokens' so far. Or, in the backward
        # pass, the rounded gradient of the weight. That of tokens takes the place of the head's input.
        before = max(0, math.ceil(self.local_tokens / tile) - 2) * tile  # of all whole tiles the last one has most
        last_tiles = loss_tiles(self.local_tokens - before, tile)
        points = [(self._loss_tile_bytes(stop - start), before + stop) for start, stop in last_tiles]
        points.append((float(size * vocab_size * hidden_size), 0))
        largest, num_tokens = max(points, key=lambda point: point[0] + 4 * hidden_size * point[1])
        sums = 4.0 * hidden_size * (num_tokens + vocab_size)
        return {"logits of a tile, or the head's gradient": largest, "gradients of the loss, fp32": sums}

    def _loss_tile_bytes(self, num_tokens: int) -> float:
        """A tile's logits, over which a GPU's compiled kernel writes their gradient."""
        vocab_size, size = self.config.model.vocab_size, self._size
        if self.on_gpu:
            return size * vocab_size * num_tokens
        if size == 4:  # the CPU has probabilities beside them, and where the labels are
            return 9 * vocab_size * num_tokens
        # logits in fp32 as well; later the gradient, which the CPU casts with the weight
        return vocab_size * max(10 * num_tokens, 6 * num_tokens + 4 * self.config.model.hidden_size)

    def _tiled_mlp_bytes(self) -> float:
        """The backward pass of tiles: fp32 sums of the weights' gradients, and one tile's tensors."""
        model, size, tile = self.config.model, self._size, self._mlp_tile
        is_gated, width = model.mlp == "swiglu", model.mlp_size
        weights = (3 if is_gated else 2) * self._mlp_down
        if self.on_gpu:  # a tile's activations and their gradients; at last, in half precision, the cast sums
            return 4 * weights + max(mlp_bytes(self.config) * tile, 2 * weights if size == 2 else 0)
        # gate and up, the product, gradients of these, of one factor and of silu. Half precision lacks the last two,
        # but the CPU casts the gradient of gate and up, and the input.
        per_token = (32 if is_gated else 16) * width
        if size == 2:
            per_token = (18 if is_gated else 10) * width + 4 * model.hidden_size
        return 4 * weights + per_token * tile

    def _exchange_per_token(self) -> float:
        """The same without symmetric buffers, where packed documents travel in one exchange; else 0."""
        if not self._has_exchange:
            return 0
        exchange = ExchangeMemory(
            self.config.model.num_heads,
            self._queries,
            self._keys,
            self._size,
            has_varlen=self.on_gpu and self._size == 2,
            receives=not self._symmetric_per_token,
        )
        return max(map(exchange.peak_bytes, most_exchanged(1, self.degrees.ring)))

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
            # K,V, gradients sent and received, and one tile's. The factors of `keys` were measured where gradients
            # travel in half precision. In fp32 those of a step take as much more, received and sent.
            pairs = 1 if ring_degree == 2 else 2
            longer = (pairs + 1) * 2 * (self._gradient_size - size) * keys
            if ring_degree == 2:
                return rows / 2 + 9 * queries + 16 * keys + shared / 2 + longer
            return max(rows + 10 * queries + 28 * keys + shared, 6 * queries + 38 * keys) + longer
        tile = 6 * size * queries  # the output's gradient, K, V and three gradients, for all heads
        if not self._has_ring:
            return tile + (2 * size * keys if keys < queries else 0)
        # first half of a tile; fp32 sums and messages, as counted with 2, 3, 4 and 6 ranks
        counted = (8, 40, 40, 40) if keys < queries else (5, 12, 17, 25) if size == 2 else (8, 18, 26, 30)
        return tile + (3 * size + counted[min(ring_degree, 5) - 2]) * keys
