"""Where a rank's memory goes in a training step, by arithmetic: what it holds when it may be fullest.

Below `plan`. What tensors there are is read off the model, the engine and what autograd keeps of each operation, and
counted in the tests, which hold this against the real engine (`python -m tests.memory`). Not in it: what kernels
allocate inside, what the allocator loses between blocks, and the gradients of all keys under attention=all_gather.
Sizes in bytes.

Shapes: E hidden size, M MLP size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.schema import Config, Degrees, ModelConfig
from recipes.memory import (
    LAYERS_ON_DEVICE,
    bucket_size,
    changed,
    gib,
    kept_layer_bytes,
    layer_matmul_parameters,
    mlp_tile_tokens,
    num_parameters,
    tile_tokens,
)

MAX_LIVE = 1_000_000_000  # parameters that ZeRO-3 has gathered at most: DeepSpeed's stage3_max_live_parameters
PERSISTENT = 100_000  # ZeRO-3 keeps smaller parameters whole: DeepSpeed's stage3_param_persistence_threshold


@dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment, by part."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def refused(config: Config) -> str | None:
    """Why a step's memory is not predicted; None if it is."""
    if config.recipe != "pretrain":
        return f"a step of recipe={config.recipe} is not predicted"
    if config.parallelism.method != "sequence":
        return "the layers of tensor and pipeline ranks are not predicted"
    if config.engine.gradient_accumulation_steps > 1 or config.engine.train_batch_size is not None:
        return "steps of several micro-batches are not predicted"
    if config.engine.offload_optimizer or config.engine.offload_parameters:
        return "steps with the optimizer or weights on the host are not predicted"
    if config.engine.dtype == "fp16":
        return "fp16 is not predicted"
    return None


def moments(config: Config, degrees: Degrees, method: str, local_tokens: int) -> list[Moment]:
    """The moments of a step that can be the fullest; `refused` says for which configurations.

    Args:
        method: the attention method, never auto.
        local_tokens: of this rank, padding included, of all sequences of a micro-batch.
    """
    model, engine = config.model, config.engine
    num_ranks, size = math.prod(degrees), 4 if engine.dtype == "fp32" else 2
    held, buckets, at_end = _engine_bytes(model, size, engine.zero_stage, num_ranks)
    mlp_tile = mlp_tile_tokens(config, local_tokens)
    # per token: what a layer keeps, what all do, and what the last one then computes again
    layer, hidden = _layer_bytes(model, size, method, mlp_tile), size * model.hidden_size
    norm = _norm_bytes(model, size)
    angles = 4 * model.head_dim  # cos and sin of the positions, which all layers share
    if engine.recompute == "none":
        kept, again = model.num_layers * sum(layer.values()), 0
    else:
        on_device = min(LAYERS_ON_DEVICE, model.num_layers) if engine.offload_activations else model.num_layers
        kept = on_device * kept_layer_bytes(config)
        again = sum(layer.values()) - (kept_layer_bytes(config) - hidden)  # attention's results are kept, if selective
        if model.norm == "layernorm" or size == 4:
            again -= hidden  # the layer's input, which its norm keeps: it is kept already
    kept += angles
    standing = {"weights, optimizer state, standing buffers": held}
    state = dict(standing)
    if engine.zero_stage == 3 and num_ranks > 1:
        state["gathered weights"] = size * min(num_parameters(model) - _small(model), MAX_LIVE)
    # half precision on stages 0 and 1: gradients in the model's dtype, before they are summed in fp32
    half_gradients = 0 if buckets else size * model.vocab_size * model.hidden_size

    def backward_of(name: str, again: float, gradients: float, more: float = 0) -> Moment:
        return Moment(
            f"{name}, backward",
            {
                **state,
                "kept for the backward pass": (kept + min(again, 0)) * local_tokens,
                "the layer computed again": max(again, 0) * local_tokens,
                "gradients and what makes them": gradients * local_tokens + more + half_gradients,
                "gradient buckets": buckets,
            },
        )

    if mlp_tile:
        of_mlp = backward_of("the last layer's MLP", again, 2 * hidden, _tiled_mlp_bytes(model, size, mlp_tile))
    else:  # gradients of the MLP's product and of one factor, and of the layer's output
        widths, down = 2 if model.mlp == "swiglu" else 1, 0 if buckets else size * model.mlp_size * model.hidden_size
        of_mlp = backward_of("the last layer's MLP", again, widths * size * model.mlp_size + hidden, down)
    left = again - layer["MLP"]  # of the layer, from here on
    found = [
        Moment(
            "the loss, backward",
            {
                **state,
                "kept for the backward pass": kept * local_tokens,
                "final norm": norm * local_tokens,
                **_loss_bytes(config, size, local_tokens),
            },
        ),
        of_mlp,
        backward_of(
            "the last layer's attention", left - norm, _attention_bytes(model, size, method, degrees.ring) + hidden
        ),
        Moment("the end of the step", {**standing, "gradients, buckets and the optimizer's temporaries": at_end}),
    ]
    if model.norm == "rmsnorm":  # five tensors in fp32; of the final norm its input, too
        if engine.recompute == "none":
            found.append(backward_of("the final norm", 0, 24 * model.hidden_size))
        else:
            found.append(backward_of("the last layer's second norm", left, 16 * model.hidden_size + hidden))
    return found


def _loss_bytes(config: Config, size: int, local_tokens: int) -> dict[str, float]:
    """What the loss works with: fp32 logits and two gradients of theirs, of all tokens or of a tile's."""
    vocab_size, hidden_size = config.model.vocab_size, config.model.hidden_size
    tile = tile_tokens(config, local_tokens)
    if not tile:
        return {"logits and two gradients of theirs, fp32": 12.0 * vocab_size * local_tokens}
    # the logits beside these; or, in half precision, then those and their gradient, which the CPU casts with the weight
    casts = 4 * vocab_size * (tile + hidden_size) if size == 2 else 0
    return {
        "logits of a tile and their gradients": max(
            (12 + size) * vocab_size * tile, 2 * size * vocab_size * tile + casts
        ),
        "gradients of the loss, fp32": 4.0 * hidden_size * (local_tokens + vocab_size),
    }


def _norm_bytes(model: ModelConfig, size: int) -> float:
    """Per token: input, output and statistics; RMSNorm has its input, and that normalised, in fp32."""
    hidden = model.hidden_size
    return 2 * size * hidden + 2 * size if model.norm == "layernorm" else 8 * hidden + 4 + size * hidden


def _tiled_mlp_bytes(model: ModelConfig, size: int, tile: int) -> float:
    """What the backward pass of tiles works with: fp32 sums of the weights' gradients, and a tile's tensors."""
    gated, width = model.mlp == "swiglu", model.mlp_size
    # what goes up, the product, and gradients: of both, of one factor, of silu; in half precision without the last
    # two, but the CPU casts the gradient of what goes up, and the input
    half = (18 if gated else 10) * width + 4 * model.hidden_size
    per_token = 4 * (8 if gated else 4) * width if size == 4 else half
    return 4 * (3 if gated else 2) * width * model.hidden_size + per_token * tile


def _attention_bytes(model: ModelConfig, size: int, method: str, ring_degree: int) -> float:
    """Per token: what attention's backward pass works with, as the CPU's kernel, which copies keys to all heads."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # the output's gradient, keys and values and three gradients for all heads
    block = 6 * size * queries
    if method in ("ring", "hybrid") and ring_degree > 1:
        # half of a block at first; sums in fp32 and messages, as counted with 2 and with 4 ranks
        sums = 8 if ring_degree == 2 else 28 if keys == queries else 40
        return block + (3 * size + sums) * keys
    return block + (2 * size * keys if keys < queries else 0)


def _layer_bytes(model: ModelConfig, size: int, method: str, mlp_tile: int) -> dict[str, float]:
    """Per token: what one layer keeps for its backward pass, by part."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = size * (2 * queries + 2 * keys) + 4 * model.num_heads  # q, out, k and v, lse
    if method in ("ulysses", "hybrid"):
        attention += size * 2 * keys  # k and v as they were sent, too
    # gate and up, silu(gate), their product; GELU's input and output
    mlp = 0 if mlp_tile else size * model.mlp_size * (4 if model.mlp == "swiglu" else 2)
    return {"norms": 2 * _norm_bytes(model, size), "attention": attention, "MLP": mlp}


def _engine_bytes(model: ModelConfig, size: int, stage: int, num_ranks: int) -> tuple[float, float, float]:
    """What DeepSpeed 0.19.8 and Adam hold: always; in buckets while gradients come; and beyond the first at the end."""
    parameters = num_parameters(model)
    bucket = bucket_size(parameters)
    # which decay: Adam takes them in one pass, the others after them
    matrices = model.num_layers * layer_matmul_parameters(model)
    matrices += 0 if model.tied_head else model.vocab_size * model.hidden_size
    parted = num_ranks > 1
    if stage == 0:
        # at the end the gradients, those in one piece, and in half precision that in fp32
        return parameters * (12 if size == 4 else 14), 0, parameters * 8
    cut = parameters / num_ranks
    temporaries = 4 * matrices / num_ranks  # of Adam, each
    if stage == 3:
        held = cut * (20 if size == 4 else 18) + 4 * bucket + (size * _small(model) if parted else 0)
        return held, 0, max(8 * bucket if parted else 0, 3 * temporaries)
    if size == 4:
        reduced = 8 * bucket + (4 * bucket if parted else 0)
        return 4 * parameters + 12 * cut, 8 * bucket, max(reduced, 4 * bucket + 3 * temporaries)
    if stage == 1:
        return 6 * parameters + 12 * cut, 0, 2 * parameters + max(4 * bucket if parted else 0, 2 * temporaries)
    return 2 * parameters + 12 * cut, 4 * bucket, 10 * bucket + 4 * matrices / num_ranks


def _small(model: ModelConfig) -> int:
    """Numbers in parameters that ZeRO-3 keeps whole: all but the large matrices."""
    hidden, heads, kv_heads = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    up = model.mlp_size * (2 if model.mlp == "swiglu" else 1)
    of_layer = [width * hidden for width in (heads + 2 * kv_heads, heads, up, model.mlp_size)]
    ends = [model.vocab_size * hidden] * (1 if model.tied_head else 2)
    return num_parameters(model) - sum(size for size in of_layer * model.num_layers + ends if size >= PERSISTENT)


def lines(
    config: Config, degrees: Degrees, method: str, local_tokens: int, memory_bytes: int | None, on_gpu: bool
) -> list[str]:
    """The fullest moment, part by part, and the longest sequences that fit."""
    reason = refused(config)
    if reason:
        return [f"memory of a step: {reason}"]
    found = moments(config, degrees, method, local_tokens)
    fullest = max(found, key=lambda moment: moment.total)
    size = 4 if config.engine.dtype == "fp32" else 2
    layer = _layer_bytes(config.model, size, method, mlp_tile_tokens(config, local_tokens))
    kernels = "by what plain PyTorch keeps; a GPU's kernels keep less" if on_gpu else "by what PyTorch keeps"
    text = [
        f"memory of a step, per rank: {gib(fullest.total)} GiB when fullest, which is at: {fullest.name}",
        *(f"  {gib(size):>8} GiB  {name}" for name, size in fullest.parts.items()),
        *(f"  {gib(moment.total):>8} GiB at: {moment.name}" for moment in found if moment is not fullest),
        "  bytes per token and layer, all kept: "
        + ", ".join(f"{name} {number:,.0f}" for name, number in layer.items()),
        f"  {kernels}; without what kernels allocate inside",
    ]
    if memory_bytes is not None:
        others = ["none", "selective"] if config.engine.recompute == "none" else [config.engine.recompute]
        for recompute in others:
            longest = longest_length(changed(config, **{"engine.recompute": recompute}), degrees, method, memory_bytes)
            text.append(
                f"  {gib(memory_bytes)} GiB hold sequences of {longest:,} tokens with engine.recompute={recompute}"
            )
    return text


def longest_length(config: Config, degrees: Degrees, method: str, memory_bytes: int) -> int:
    """Tokens of a sequence, a multiple of its ranks, with which every moment fits; 0 if none does."""

    def fits(local_length: int) -> bool:
        tokens = local_length * config.engine.micro_batch_size
        return all(moment.total <= memory_bytes for moment in moments(config, degrees, method, tokens))

    if not fits(1):
        return 0
    fitting, too_long = 1, 2
    while fits(too_long):
        fitting, too_long = too_long, 2 * too_long
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        fitting, too_long = (middle, too_long) if fits(middle) else (fitting, middle)
    return fitting * degrees.sequence
