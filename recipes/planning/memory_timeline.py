"""Where a rank's memory goes in a training step, by arithmetic: what it holds when it may be fullest.

Below `plan`; what the engine holds is in `memory_engine`. What tensors there are is read off the model, the engine and
what autograd keeps of each operation. On the CPU, where all is plain PyTorch, they are counted in the tests, through
the real engine (`python -m tests.tools.memory`). On a GPU other kernels keep and make other tensors: those of
`recipes.model.ops` with Liger, PyTorch's norms in one kernel, flash-attn-4 in half precision and memory-efficient
attention in fp32, the fused Adam; peaks that were measured are in docs/performance.md. Not in it: what kernels allocate
inside (cuBLAS 64 MiB on Hopper), what the allocator loses between blocks, and the gradients of all keys under
attention=all_gather. Sizes in bytes.

Shapes: E hidden size, M MLP size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.schema import Config, Degrees, ModelConfig
from recipes.planning.engine_memory import engine_memory, gradient_sum_bytes, num_persistent_parameters
from recipes.planning.memory import (
    LAYERS_ON_DEVICE,
    changed,
    gib,
    kept_layer_bytes,
    layer_matmul_parameters,
    mlp_bytes,
    mlp_tile_tokens,
    num_parameters,
    tile_tokens,
)

MAX_LIVE = 1_000_000_000  # parameters that ZeRO-3 has gathered at most: DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class MemoryPoint:
    """What a rank holds at one moment, by part."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def refused(config: Config, on_gpu: bool) -> str | None:
    """Why a step's memory is not predicted; None if it is."""
    if config.recipe != "pretrain":
        return f"a step of recipe={config.recipe} is not predicted"
    if config.parallelism.method != "sequence":
        return "the layers of tensor and pipeline ranks are not predicted"
    if config.engine.gradient_accumulation_steps > 1 or config.engine.train_batch_size is not None:
        return "steps of several micro-batches are not predicted"
    if config.engine.offload_parameters:
        return "steps with weights on the host are not predicted"
    if config.engine.offload_optimizer:
        if not on_gpu:
            return "the optimizer on the host is predicted for GPUs only"
        if config.engine.zero_stage == 3 or config.engine.dtype == "fp32":
            return "the optimizer on the host is predicted for bf16 on ZeRO stages 1 and 2 only"
    if config.engine.dtype == "fp16":
        return "fp16 is not predicted"
    return None


def memory_timeline(
    config: Config, degrees: Degrees, method: str, local_tokens: int, on_gpu: bool
) -> list[MemoryPoint]:
    """The moments of a step that can be the fullest; `refused` says for which configurations.

    Of the only step where num_steps is 1, else of a later one: then Adam's moments are there all along.

    Args:
        method: the attention method, never auto.
        local_tokens: of this rank, padding included, of all sequences of a micro-batch.
    """
    model, engine = config.model, config.engine
    num_ranks, size = math.prod(degrees), 4 if engine.dtype == "fp32" else 2
    states = engine_memory(config, num_ranks, on_gpu)
    mlp_tile = mlp_tile_tokens(config, local_tokens)
    # per token: what a layer keeps, what all do, and what the last one then computes again
    layer, hidden = _layer_bytes(model, size, method, mlp_tile, on_gpu), size * model.hidden_size
    norm = _norm_bytes(model, size, on_gpu)
    angles = 4 * model.head_dim  # cos and sin of the positions, which all layers share
    if engine.recompute == "none":
        kept, again = model.num_layers * sum(layer.values()), 0
    else:
        on_device = min(LAYERS_ON_DEVICE, model.num_layers) if engine.offload_activations else model.num_layers
        kept = on_device * kept_layer_bytes(config)
        again = sum(layer.values()) - (kept_layer_bytes(config) - hidden)  # attention's results are kept, if selective
        if on_gpu or model.norm == "layernorm" or size == 4:
            again -= hidden  # the layer's input, which its norm keeps: it is kept already
    kept += angles
    standing = states.held - (states.adam if config.num_steps == 1 else 0)
    state = {"weights, optimizer state, standing buffers": standing}
    if engine.zero_stage == 3 and num_ranks > 1:
        state["gathered weights"] = size * min(num_parameters(model) - num_persistent_parameters(model), MAX_LIVE)
    mailbox = _symmetric_buffer_bytes(config, size, method, degrees.ring) if on_gpu else 0
    if mailbox:
        state["the ring's symmetric_buffers"] = mailbox * local_tokens
    # numbers whose gradients have come when the backward pass of the layer begins at which most is held
    head = model.vocab_size * model.hidden_size
    before = head
    if on_gpu and engine.offload_activations:  # not the last: no layer keeps more, until none is brought back any more
        before += max(0, model.num_layers - LAYERS_ON_DEVICE) * layer_matmul_parameters(model)
    mlp_down = model.mlp_size * model.hidden_size
    # the CPU's bytes per token of attention were counted with the MLP's gradients
    mlp = mlp_down * (3 if model.mlp == "swiglu" else 2) if on_gpu else 0
    is_summed = states.buckets > 0 or (on_gpu and engine.zero_stage == 3)  # as they come

    def have_come(num_come: int) -> float:
        if not is_summed:
            return size * num_come
        if not on_gpu:
            return 0
        if model.tied_head:  # its gradient waits for the embedding's
            return size * head + gradient_sum_bytes(model, size, states.gradients, num_come - head)
        return gradient_sum_bytes(model, size, states.gradients, num_come)

    def backward_of(name: str, again: float, gradients: float, num_come: int, more: float = 0) -> MemoryPoint:
        return MemoryPoint(
            f"{name}, backward",
            {
                **state,
                "kept for the backward pass": (kept + min(again, 0)) * local_tokens,
                "the layer computed again": max(again, 0) * local_tokens,
                "gradients and what makes them": gradients * local_tokens + more + have_come(num_come),
                "gradient buckets": states.buckets,
            },
        )

    if mlp_tile:
        of_tiles = _tiled_mlp_bytes(config, mlp_tile, on_gpu)
        of_mlp = backward_of("the last layer's MLP", again, 2 * hidden, before, of_tiles)
    else:  # gradients of the MLP's product and of one factor, and of the layer's output
        widths = 2 if model.mlp == "swiglu" else 1
        down = size * mlp_down if is_summed and not states.buckets else 0  # ZeRO-3 reduces it next
        of_mlp = backward_of(
            "the last layer's MLP", again, widths * size * model.mlp_size + hidden, before + mlp_down, down
        )
    left = again - layer["MLP"]  # of the layer, from here on
    of_attention = _attention_bytes(model, size, method, degrees.ring, on_gpu) - mailbox
    found = [
        MemoryPoint(
            "the loss, backward",
            {
                **state,
                "kept for the backward pass": kept * local_tokens,
                "final norm": norm * local_tokens,
                **_loss_bytes(config, size, local_tokens, on_gpu),
            },
        ),
        of_mlp,
        backward_of("the last layer's attention", left - norm, of_attention + hidden, before + mlp),
        MemoryPoint(
            "the end of the step",
            {
                "weights, optimizer state, standing buffers": states.held,
                "gradients, buckets and the optimizer's temporaries": states.at_end,
            },
        ),
    ]
    if model.norm == "rmsnorm" and not on_gpu:  # five tensors in fp32; of the final norm its input, too
        if engine.recompute == "none":
            found.append(backward_of("the final norm", 0, 24 * model.hidden_size, head))
        else:
            found.append(
                backward_of("the last layer's second norm", left, 16 * model.hidden_size + hidden, before + mlp)
            )
    if states.for_head:
        found.append(
            MemoryPoint(
                "the reduction of the head's gradient",
                {
                    **state,
                    "kept for the backward pass": kept * local_tokens,
                    "gradients and what makes them": hidden * local_tokens,
                    "gradient buckets and what is reduced": states.buckets + states.for_head,
                },
            )
        )
    return found


def _loss_bytes(config: Config, size: int, local_tokens: int, on_gpu: bool) -> dict[str, float]:
    """What the loss works with: fp32 logits and two gradients of theirs, of all tokens or of a tile's.

    On a GPU logits and one gradient in the model's dtype: fp32 is in the compiled kernels only.
    """
    vocab_size, hidden_size = config.model.vocab_size, config.model.hidden_size
    tile = tile_tokens(config, local_tokens)
    if on_gpu:
        if not tile:  # with both, or with the gradient and what it gives: that of the weight
            most = max(2 * local_tokens, local_tokens + hidden_size)
            return {"logits and their gradient": float(size * vocab_size * most)}
        # in the forward pass a tile beside the sums; in the backward pass these rounded, that of the norm's output in
        # its place
        return {
            "logits of a tile and their gradient, or rounded sums": size * vocab_size * max(2.0 * tile, hidden_size),
            "gradients of the loss, fp32": 4.0 * hidden_size * (local_tokens + vocab_size),
        }
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


def _norm_bytes(model: ModelConfig, size: int, on_gpu: bool) -> float:
    """Per token: input, output and statistics; on the CPU RMSNorm has its input, and that normalised, in fp32."""
    hidden = model.hidden_size
    if on_gpu:
        return 2 * size * hidden + (8 if model.norm == "layernorm" else 4)
    return 2 * size * hidden + 2 * size if model.norm == "layernorm" else 8 * hidden + 4 + size * hidden


def _tiled_mlp_bytes(config: Config, tile: int, on_gpu: bool) -> float:
    """What the backward pass of tiles works with: fp32 sums of the weights' gradients, and a tile's tensors."""
    model, size = config.model, 4 if config.engine.dtype == "fp32" else 2
    gated, width = model.mlp == "swiglu", model.mlp_size
    weights = (3 if gated else 2) * width * model.hidden_size
    if on_gpu:  # a tile's activations and their gradients; in half precision at last the sums, rounded
        return 4 * weights + max(mlp_bytes(config) * tile, 2 * weights if size == 2 else 0)
    # what goes up, the product, and gradients: of both, of one factor, of silu; in half precision without the last
    # two, but the CPU casts the gradient of what goes up, and the input
    half = (18 if gated else 10) * width + 4 * model.hidden_size
    per_token = 4 * (8 if gated else 4) * width if size == 4 else half
    return 4 * weights + per_token * tile


def _has_ring(method: str, ring_degree: int) -> bool:
    return method in ("ring", "hybrid") and ring_degree > 1


def _symmetric_buffer_bytes(config: Config, size: int, method: str, ring_degree: int) -> float:
    """Per token: what K,V and their gradients are copied into, which stands from the first layer on."""
    if not _has_ring(method, ring_degree) or config.attention.transport == "p2p":
        return 0
    rooms = 2 if ring_degree == 2 else 4
    return rooms * 2 * size * config.model.num_kv_heads * config.model.head_dim


def _attention_bytes(model: ModelConfig, size: int, method: str, ring_degree: int, on_gpu: bool) -> float:
    """Per token: what attention's backward pass works with, messages and where they are received included.

    On the CPU, and in fp32 on GPUs, keys are copied to all heads; else as flash-attn-4 does it, which sums dq in fp32
    and, where query heads share keys, dk and dv.
    """
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    has_ring = _has_ring(method, ring_degree)
    if on_gpu and size == 2:
        of_rows = 8 * model.num_heads  # lse and the sums of dout * out
        shared = 8 * keys if keys < queries else 0
        if not has_ring:  # the output's gradient, three gradients, dq in fp32
            return of_rows + 8 * queries + 4 * keys + shared
        # half of the local block, with dq in fp32, beside all there is, while gradients come home; on more ranks own
        # gradients in fp32, K,V, gradients as they are sent and received; and a block's. Keys' terms as measured
        if ring_degree == 2:
            return of_rows / 2 + 9 * queries + 16 * keys + shared / 2
        return max(of_rows + 10 * queries + 28 * keys + shared, 6 * queries + 38 * keys)
    # the output's gradient, keys and values and three gradients for all heads
    block = 6 * size * queries
    if has_ring:
        # half of a block at first; sums in fp32 and messages, as counted with 2, 3, 4 and 6 ranks
        counted = (8, 40, 40, 40) if keys < queries else (5, 12, 17, 25) if size == 2 else (8, 18, 26, 30)
        return block + (3 * size + counted[min(ring_degree, 5) - 2]) * keys
    return block + (2 * size * keys if keys < queries else 0)


def _layer_bytes(model: ModelConfig, size: int, method: str, mlp_tile: int, on_gpu: bool) -> dict[str, float]:
    """Per token: what one layer keeps for its backward pass, by part."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = size * (2 * queries + 2 * keys) + 4 * model.num_heads  # q, out, k and v, lse
    if method in ("ulysses", "hybrid"):
        attention += size * 2 * keys  # k and v as they were sent, too
    # gate and up, silu(gate), which Liger does not keep, and their product; GELU's input and output
    widths = (3 if on_gpu else 4) if model.mlp == "swiglu" else 2
    mlp = 0 if mlp_tile else size * model.mlp_size * widths
    return {"norms": 2 * _norm_bytes(model, size, on_gpu), "attention": attention, "MLP": mlp}


def peak(config: Config, degrees: Degrees, method: str, local_tokens: int, on_gpu: bool) -> MemoryPoint | None:
    """When a step takes most; None if it is not predicted."""
    if refused(config, on_gpu):
        return None
    return max(memory_timeline(config, degrees, method, local_tokens, on_gpu), key=lambda moment: moment.total)


def lines(
    config: Config, degrees: Degrees, method: str, local_tokens: int, memory_bytes: int | None, on_gpu: bool
) -> list[str]:
    """The fullest moment, part by part, and the longest sequences that fit."""
    reason = refused(config, on_gpu)
    if reason:
        return [f"memory of a step: {reason}"]
    found = memory_timeline(config, degrees, method, local_tokens, on_gpu)
    most = max(found, key=lambda moment: moment.total)
    size = 4 if config.engine.dtype == "fp32" else 2
    layer = _layer_bytes(config.model, size, method, mlp_tile_tokens(config, local_tokens), on_gpu)
    kernels = "by what kernels keep, Liger's among them" if on_gpu else "by what PyTorch keeps"
    text = [
        f"memory of a step, per rank: {gib(most.total)} GiB when fullest, which is at: {most.name}",
        *(f"  {gib(size):>8} GiB  {name}" for name, size in most.parts.items()),
        *(f"  {gib(moment.total):>8} GiB at: {moment.name}" for moment in found if moment is not most),
        "  bytes per token and layer, all kept: "
        + ", ".join(f"{name} {number:,.0f}" for name, number in layer.items()),
        f"  {kernels}; without what kernels allocate inside",
    ]
    if memory_bytes is not None:
        others = ["none", "selective"] if config.engine.recompute == "none" else [config.engine.recompute]
        for recompute in others:
            trial = changed(config, **{"engine.recompute": recompute})
            longest = longest_length(trial, degrees, method, memory_bytes, on_gpu)
            held = f"hold sequences of {longest:,} tokens" if longest else "hold no sequence"
            text.append(f"  {gib(memory_bytes)} GiB {held} with engine.recompute={recompute}")
    return text


def longest_length(config: Config, degrees: Degrees, method: str, memory_bytes: int, on_gpu: bool) -> int:
    """Tokens of a sequence, a multiple of its ranks, with which every moment fits; 0 if none does."""

    def fits(local_length: int) -> bool:
        tokens = local_length * config.engine.micro_batch_size
        return all(moment.total <= memory_bytes for moment in memory_timeline(config, degrees, method, tokens, on_gpu))

    if not fits(1):
        return 0
    fitting, too_long = 1, 2
    while fits(too_long):
        fitting, too_long = too_long, 2 * too_long
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        fitting, too_long = (middle, too_long) if fits(middle) else (fitting, middle)
    return fitting * degrees.sequence
