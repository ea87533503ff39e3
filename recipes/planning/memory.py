"""Sizes of a model's parameters, training states and activation tiles per rank, in bytes.

Pure functions of the configuration. `refusal` and `memory_timeline` build on them.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, NamedTuple

from conf.degrees import accumulation_steps
from conf.schema import INFERENCE, Config, Degrees, ModelConfig

LOGITS_BYTES = 2**30  # fp32 logits that exist at once, unless engine.tile_tokens is set
MLP_BYTES = 2**31  # hidden activations of an MLP and their gradients that exist at once, unless it is set
# of a device, where CUDA's context and NCCL's buffers take 1 to 2 GiB and fragmentation some more, and of a host, whose
# OOM killer ended a run that offloaded 96 % of its memory
MARGIN = 0.1
LAYERS_ON_DEVICE = 2  # whose activations stay on the device with engine.offload_activations
TILE_MULTIPLE = 256  # tokens: matrix products prefer round sizes


def num_parameters(model: ModelConfig) -> int:
    """Parameters of `recipes.model.transformer.Transformer`, or of the model at model.path."""
    return model.num_weights or _embeddings(model) + _norm(model) + model.num_layers * _layer(model)


def layer_matrices(model: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of one layer's matrices: qkv, attention's output, the MLP's up and down projections.

    Those of all experts count as one matrix.
    """
    hidden, heads, kv_heads = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    width = model.mlp_size * model.num_experts
    up = width * (2 if model.mlp == "swiglu" else 1)
    return [(heads + 2 * kv_heads, hidden), (hidden, heads), (up, hidden), (hidden, width)]


def layer_matmul_parameters(model: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    return sum(outputs * inputs for outputs, inputs in layer_matrices(model))


def _norm(model: ModelConfig) -> int:
    return model.hidden_size * (1 if model.norm == "rmsnorm" else 2)


def _layer(model: ModelConfig) -> int:
    biases = sum(outputs for outputs, _ in layer_matrices(model)) if model.bias else 0
    return layer_matmul_parameters(model) + biases + 2 * _norm(model)


def _embeddings(model: ModelConfig) -> int:
    """The embedding and the head."""
    return model.vocab_size * model.hidden_size * (1 if model.tied_head else 2)


def dtype_bytes(config: Config) -> int:
    """Bytes of one number in the model's dtype."""
    return 4 if config.engine.dtype == "fp32" else 2


def bucket_size(num_parameters: int) -> int:
    """Gradients in one of DeepSpeed's reduction buckets. It allocates whole buckets even for a small model."""
    return min(500_000_000, num_parameters)


def has_sharded_sums(config: Config) -> bool:
    """Whether each rank sums its share of the gradients in fp32, on ZeRO 1 as on ZeRO 2, if it trains.

    One rank without accumulation has nothing to sum: there gradients stay in the model's dtype. Not in fp32, where
    gradients need no other sums, and not in pipelines, which cannot go with DeepSpeed's stage 2.
    """
    is_half, is_sequence = config.engine.dtype != "fp32", config.parallelism.method == "sequence"
    return config.engine.zero_stage in (1, 2) and is_half and is_sequence


def sums_nothing(config: Config, num_ranks: int) -> bool:
    """Whether gradients stay where autograd put them until the step."""
    engine = config.engine
    return (
        has_sharded_sums(config)
        and num_ranks == engine.gradient_accumulation_steps == 1
        and not engine.offload_optimizer
    )


def tile_tokens(config: Config, local_tokens: int) -> int:
    """Tokens whose logits exist at once, of a rank's `local_tokens` per micro-batch; 0 if all do."""
    return _tile(config, local_tokens, LOGITS_BYTES // (4 * config.model.vocab_size))  # the loss is in fp32


def loss_tiles(num_tokens: int, tile_tokens: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles of a tiled loss.

    Gradients of the tokens of all tiles accumulate, so memory peaks in the last tile: it is cut in two if it is long.
    """
    starts = [*range(0, num_tokens, tile_tokens)]
    middle = starts[-1] + math.ceil(tile_tokens / 2)
    return [*itertools.pairwise([*starts, *([middle] if middle < num_tokens else []), num_tokens])]


def mlp_tile_tokens(config: Config, local_tokens: int) -> int:
    """Tokens whose hidden MLP activations exist at once; 0 if all do.

    The backward pass recomputes tiles. That adds no work to recomputed layers and to forward passes, so these use tiles
    by default. Layers that save their activations use tiles only if engine.tile_tokens is set.
    """
    if config.engine.tile_tokens is None and config.recipe == "pretrain" and config.engine.recompute == "none":
        return 0
    return _tile(config, local_tokens, MLP_BYTES // mlp_bytes(config))


def _tile(config: Config, local_tokens: int, max_tokens: int) -> int:
    """engine.tile_tokens, else a round number of at most `max_tokens` and half of all tokens; 0 for all tokens.

    A tile of nearly all tokens would save nothing: its own tensors exist beside the output for all tokens.
    """
    if config.parallelism.method == "tensor_pipeline":
        return 0
    tokens = config.engine.tile_tokens
    if tokens is None:
        tokens = max(1, max_tokens // TILE_MULTIPLE * TILE_MULTIPLE or max_tokens)
        if tokens < local_tokens:
            tokens = min(tokens, math.ceil(local_tokens / 2 / TILE_MULTIPLE) * TILE_MULTIPLE)
    return tokens if tokens < local_tokens else 0


def mlp_bytes(config: Config) -> int:
    """Hidden activations of an MLP and their gradients, per token."""
    widths = 6 if config.model.mlp == "swiglu" else 4  # gate, up and their product; input and output of GELU
    return widths * config.model.mlp_size * dtype_bytes(config)


def offloaded_bytes(config: Config, local_tokens: int) -> float:
    """Host memory for engine.offload_activations and one micro-batch."""
    tensors = [pinned_bytes(per_token * local_tokens) for per_token in checkpoint_tensors(config)]
    return max(0, config.model.num_layers - LAYERS_ON_DEVICE) * sum(tensors)


def pinned_bytes(size: float) -> float:
    """What PyTorch pins for a tensor: a power of two."""
    return 2.0 ** math.ceil(math.log2(size))


def checkpoint_tensors(config: Config) -> list[int]:
    """Bytes per token that a recomputed layer saves: its input and, if selective, attention's output and lse."""
    model, size = config.model, dtype_bytes(config)
    attention = [size * model.num_heads * model.head_dim, 4 * model.num_heads]
    return [size * model.hidden_size, *(attention if config.engine.recompute == "selective" else [])]


def cache_bytes(config: Config, degrees: Degrees) -> float:
    """Keys and values of a sequence that is decoded, per rank; in windowed layers those of a window alone."""
    model, length = config.model, config.data.sequence_length
    num_keys = (model.num_layers - model.num_window_layers) * length
    num_keys += model.num_window_layers * min(length, model.window or length)
    return 2 * dtype_bytes(config) * model.num_kv_heads * model.head_dim * num_keys / degrees.sequence


class StateBytes(NamedTuple):
    """Training states of the rank that holds most: a lower bound of its memory, without activations and buckets.

    Args:
        built: the fp32 weights as first built. They are gone once DeepSpeed has cast and ZeRO has sharded them. 0 for
            model.path, which is read in the engine's dtype, on ZeRO-3 one parameter after the other.
    """

    weights: float
    gradients: float
    optimizer: float
    built: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def needed(self) -> float:
        return max(self.total, self.built)

    def __str__(self) -> str:
        parts = f"weights {gib(self.weights)} + gradients {gib(self.gradients)} + optimizer {gib(self.optimizer)}"
        before = f"; building them in fp32 takes {gib(self.built)} GiB" if self.built > self.total else ""
        return f"{parts} = {gib(self.total)} GiB{before}"


def state_bytes(config: Config, degrees: Degrees) -> StateBytes:
    """Weights, gradients and optimizer states per rank, without what is offloaded to the host.

    ZeRO stages 1, 2 and 3 shard the optimizer states, then the gradients, then the weights over all ranks. Where
    `has_sharded_sums` or optimizer states are offloaded, stage 1 shards the gradients too. Tensor and pipeline ranks
    divide the layers, and data ranks their optimizer states (ZeRO-1). A pipeline rank holds the embedding or the head,
    or both if it is the only one. Norms and biases count as divided. Forward passes need weights alone.
    """
    model, engine, num_ranks = config.model, config.engine, math.prod(degrees)
    weight_size = 0 if engine.offload_parameters else dtype_bytes(config)
    gradient_size = 4 if engine.zero_stage >= 1 else weight_size
    optimizer_size = 8 if engine.dtype == "fp32" else 12  # Adam's two moments and, in half precision, fp32 weights
    if config.parallelism.method == "tensor_pipeline":
        layers = math.ceil(model.num_layers / degrees.pipeline) * _layer(model) / degrees.tensor
        ends = _embeddings(model) if degrees.pipeline == 1 else model.vocab_size * model.hidden_size
        parameters, num_shards = layers + _norm(model) + ends, (1, 1, degrees.data)
    else:
        parameters = num_parameters(model)
        of_gradients = 1 if engine.offload_optimizer or has_sharded_sums(config) else 2
        first_stages = 3, of_gradients, 1  # that shard weights, gradients, optimizer states
        num_shards = tuple(num_ranks if engine.zero_stage >= stage else 1 for stage in first_stages)
    has_sums = not has_sharded_sums(config) or num_ranks > 1 or accumulation_steps(config, degrees) > 1
    if not has_sums:
        gradient_size = weight_size
    if engine.offload_optimizer:
        optimizer_size = 0
        if engine.zero_stage == 3 or engine.dtype == "fp32" or not has_sums:
            gradient_size = 0  # else DeepSpeed 0.19.8 keeps the sums on the device
    if config.recipe in ("forward", *INFERENCE):
        gradient_size = optimizer_size = 0
    trained = parameters if model.num_trained is None else model.num_trained
    numbers, sizes = (parameters, trained, trained), (weight_size, gradient_size, optimizer_size)
    states = (number * size / shards for number, size, shards in zip(numbers, sizes, num_shards, strict=True))
    return StateBytes(*states, built=0 if model.path else 4 * parameters)


def gib(size: float) -> str:
    """Bytes as a number of GiB, without the unit."""
    size /= 2**30
    return f"{size:,.2f}" if size >= 1 else f"{size:.2g}"


def changed(config: Config, **fields: Any) -> Config:
    """A copy with other values, by names such as engine.zero_stage."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        group, field = name.split(".")
        setattr(getattr(config, group), field, value)
    return config
