"""Ring attention for Hugging Face's causal language models, as `attn_implementation="ring"`.

    register()
    model = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="ring", dtype="bfloat16")
    check(model)
    batch = shard({"input_ids": ids, "labels": ids}, attention)     # the whole batch, on every rank
    loss(model(**batch), batch).backward()

`attention` is a module of `ring_attention.attention`: it carries the method, the ranks and the layout. The plan of a
batch (its mask, its labels) travels with the batch as the model's keyword `ring_plan`, so recomputation and several
batches at once stay right. Needs transformers, the extra `hf`.

Shapes: B batch, L tokens of the whole sequence, S local tokens, H query heads, K key-value heads, D head size,
V vocabulary.
"""

from __future__ import annotations

import collections
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ring_attention.decoding import CachedAttention
from ring_attention.hf_batch import (
    IGNORED_LABEL,
    LENGTHS,
    check_padding,
    check_same_batch,
    positions_of,
    read_documents,
    shifted_labels,
)
from ring_attention.hf_refusals import NAME, num_learned_positions, problems, rope_types, text_config
from ring_attention.mask import CAUSAL, Mask
from ring_attention.sequence_attention import SequenceAttention
from ring_attention.transport.collectives import sum_over_world_, world_size

OLDEST, TOO_NEW = (5, 17), (5, 25)  # transformers; the extra `hf` in pyproject.toml says the same
# pieces of transformers' mask functions (masking_utils) that the ring computes. Packing is read from the whole batch.
_MASK_PIECES = {
    "causal_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
    "and_masks.<locals>.and_mask",
}
# what models hand to attention functions without a meaning for the result
_HARMLESS = {
    "position_ids",
    "use_cache",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
}
_POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies depend on the largest position of the batch


@dataclass
class BatchPlan:
    """What attention must know of a batch beside its tensors.

    Args:
        mask: over the whole padded sequence; each layer adds its window.
        labels_BS: this rank's, shifted: the token to predict at each position, or IGNORED_LABEL.
        max_position: of the whole batch.
        calls: how often each layer has called attention in the current forward pass, by its index.
    """

    attention: SequenceAttention | CachedAttention
    mask: Mask
    labels_BS: Tensor | None
    max_position: int
    calls: collections.Counter[int] = field(default_factory=collections.Counter)
    is_complete: bool = False  # every layer has called attention once
    _by_window: dict[int | None, Mask] = field(default_factory=dict)

    def mask_of(self, window: int | None) -> Mask:
        """The mask of a layer that sees `window` tokens, itself included; None is all."""
        if window not in self._by_window:
            self._by_window[window] = self.mask if window is None else replace(self.mask, left=window - 1)
        return self._by_window[window]


@dataclass(frozen=True)
class LayerMask:
    """What transformers says a layer sees, given to the layer in place of a mask tensor: `window` as in `mask_of`."""

    window: int | None


def register() -> None:
    """Make attn_implementation="ring" known to transformers, for attention and for masks.

    Raises:
        ValueError: if transformers is not installed, or in a version that was not tested.
    """
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("transformers is not installed: pip install -e '.[hf]' -c constraints.txt") from None
    version = tuple(int(part) for part in installed.split(".")[:2])
    if not OLDEST <= version < TOO_NEW:
        oldest, too_new = (".".join(map(str, bound)) for bound in (OLDEST, TOO_NEW))
        raise ValueError(f"transformers {installed} was not tested: use one from {oldest} on, below {too_new}")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _layer_mask)


def check(model: nn.Module) -> None:
    """Refuse what would not be exact, and guard the model's forward passes.

    Afterwards a forward pass raises ValueError if it is not given a batch of `shard`, if it is given `labels` or
    `attention_mask` (of a shard they would be wrong), or if not every layer called this module's attention once.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.

    Raises:
        ValueError: names every layer or setting that would not be exact, with the reason and what to do.
    """
    get_base_model = getattr(model, "get_base_model", None)
    model = get_base_model() if get_base_model else model
    if found := list(problems(model)):
        raise ValueError(f"{type(model).__name__} cannot run under ring attention: {'; '.join(found)}")
    if getattr(model, "_ring_is_guarded", False):
        return
    model._ring_is_guarded = True  # pyright: ignore[reportArgumentType]
    num_layers, num_positions = text_config(model).num_hidden_layers, num_learned_positions(model)
    base: nn.Module = model.base_model  # pyright: ignore[reportAssignmentType]
    model.register_forward_pre_hook(_refuse_labels, with_kwargs=True)
    base.register_forward_pre_hook(lambda _, args, kwargs: _start_pass(kwargs, num_positions), with_kwargs=True)
    base.register_forward_hook(lambda _, args, kwargs, output: _end_pass(kwargs, num_layers), with_kwargs=True)
    for module in base.modules():
        if rope_types(module) & set(_POSITION_DEPENDENT_ROPE):
            _show_largest_position(base, module)


def shard(
    batch: Mapping[str, Any],
    attention: SequenceAttention | CachedAttention,
    *,
    device: torch.device | str | None = None,
    pad_token_id: int = 0,
) -> dict[str, Any]:
    """This rank's part of a whole batch, as keywords of the model's forward.

    Args:
        batch: the same on all ranks that share the sequence. `input_ids` [B, L]; `labels` [B, L] as transformers takes
            them, NOT shifted; `attention_mask` [B, L] of 0 and 1 with padding on the right. Documents packed into one
            sequence by any of `position_ids` [B or 1, L] that restart at 0, `seq_idx` [B or 1, L], or `cu_seq_lens_q`
            [documents + 1] of a batch of one row. CPU tensors, so that nothing waits for a GPU.
        device: where the result lies; None is where input_ids are.
        pad_token_id: fills the sequence up to a multiple of the ranks. No other token sees it, and it has no label.

    Returns:
        input_ids and position_ids [B, S], use_cache=False, and the batch's plan as `ring_plan`. The first token of a
        document is nobody's label.

    Raises:
        ValueError: for left padding, shapes that do not fit, sources of documents that contradict each other, or an
            unknown entry; on every rank if ranks hold different batches of a new shape.
    """
    unknown = set(batch) - {"input_ids", "labels", "attention_mask", "position_ids", "seq_idx"} - set(LENGTHS)
    if unknown:
        raise ValueError(f"batch has {', '.join(sorted(unknown))}, which shard does not know: leave it out")
    ids_BL = torch.as_tensor(batch["input_ids"])
    if ids_BL.dim() != 2:
        raise ValueError(f"input_ids has shape {list(ids_BL.shape)}, but must be [batch, tokens]")
    num_rows, length = ids_BL.shape
    given = {name: torch.as_tensor(value) for name, value in batch.items() if value is not None}
    for name in ("labels", "attention_mask", "position_ids", "seq_idx"):
        legal = ((num_rows, length),) if name == "labels" else ((num_rows, length), (1, length))
        if name in given and given[name].shape not in legal:
            raise ValueError(
                f"{name} has shape {list(given[name].shape)}, input_ids {list(ids_BL.shape)}: give whole rows"
            )
    check_same_batch(attention, ids_BL, given)
    if ids_BL.numel() == 0:
        raise ValueError(f"input_ids has shape {list(ids_BL.shape)}: leave out rows without tokens")
    if "attention_mask" in given:
        check_padding(given["attention_mask"])
    documents = read_documents(given, num_rows, length)
    positions = given["position_ids"] if "position_ids" in given else positions_of(documents, length)
    labels = shifted_labels(given, documents, length) if "labels" in given else None
    if documents is not None and len(documents) > 1 and attention.layout(length).name == "balanced":
        raise ValueError(
            f"layout=balanced lays out one row of documents, not {len(documents)}: flatten the batch, or use zigzag"
        )
    layout = attention.layout(length, None if documents is None else tuple(documents[0]))
    rank = attention.sequence_rank

    def part(tensor: Tensor, fill: int) -> Tensor:
        return layout.shard(tensor.expand(num_rows, -1), rank, 1, fill).to(device or ids_BL.device, non_blocking=True)

    plan = BatchPlan(
        attention,
        CAUSAL if documents is None else CAUSAL.packed(documents),
        None if labels is None else part(labels, IGNORED_LABEL),
        max(int(positions.max()), attention.max_position if isinstance(attention, CachedAttention) else 0),
    )
    return {
        "input_ids": part(ids_BL, pad_token_id),
        "position_ids": part(positions, 0),
        "use_cache": False,
        "ring_plan": plan,
    }


def next_token(ids_B1: Tensor, position: int, attention: CachedAttention) -> dict[str, Any]:
    """The token at `position` as keywords of the model's forward, for decoding. Every rank must give the same.

    It follows the tokens of a forward pass with `shard(batch, attention)` before, and those of earlier calls.
    """
    attention.step(position)
    return {
        "input_ids": ids_B1,
        "position_ids": torch.full_like(ids_B1, position),
        "use_cache": False,
        "ring_plan": BatchPlan(attention, CAUSAL, None, position),
    }


def loss(
    outputs: Any, batch: Mapping[str, Any], *, num_labels: Tensor | None = None, averaged_over: int | None = None
) -> Tensor:
    """The mean cross-entropy per label over ALL ranks, a scalar in fp32 with the same value on every rank.

    Gradients are exact once they are averaged over ranks, as DeepSpeed and DistributedDataParallel do: each rank's
    share is scaled up by the ranks of that average.

    Args:
        outputs: of `model(**batch)`; its logits [B, S, V].
        batch: from `shard`.
        num_labels: of all ranks and all micro-batches of a step, from `count_labels`; None counts this batch. DeepSpeed
            divides by its gradient_accumulation_steps, so divide the count by them.
        averaged_over: ranks that gradients are averaged over; None is all. With an mpu of sequence parallelism,
            DeepSpeed's ZeRO stages 0 to 2 divide by `mpu.get_data_parallel_world_size()`.

    Raises:
        ValueError: if the batch had no labels, or the forward pass was not one that `check` guards.
    """
    plan: BatchPlan = batch["ring_plan"]
    if plan.labels_BS is None:
        raise ValueError("the batch has no labels: give the rows labels, such as a copy of input_ids")
    if not plan.is_complete:
        raise ValueError("this forward pass was not checked: call ring_attention.hf.check(model) once, before it")
    logits = outputs.logits.flatten(0, -2)
    compute_dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = plan.labels_BS.flatten()
    local = F.cross_entropy(logits.to(compute_dtype), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    num_labels = count_labels([batch]) if num_labels is None else num_labels
    share = local / num_labels.clamp(min=1)
    scale = world_size() if averaged_over is None else averaged_over
    mean = sum_over_world_(share.detach().clone())
    return share * scale + (mean - share.detach() * scale)  # the value of the mean, the gradient of this rank's share


def count_labels(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """How many labels the batches of one step have over all ranks, a scalar. Every rank must call it.

    Args:
        batches: from `shard`, with labels.
    """
    counts = [(batch["ring_plan"].labels_BS != IGNORED_LABEL).sum() for batch in batches]
    return sum_over_world_(torch.stack(counts).sum())


# ------------------------------------------------------------------ the attention of a layer


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    ring_plan: BatchPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls: q [B, H, S, D], k and v [B, K, S, D] to ([B, S, H, D], no weights)."""
    layer = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    if ring_plan is None:
        raise ValueError(f"{layer} got no ring_plan: call the model with **ring_attention.hf.shard(batch, attention)")
    unknown = {name for name, value in kwargs.items() if value is not None and value is not False} - _HARMLESS
    if unknown:
        raise ValueError(
            f"{layer} hands {', '.join(sorted(unknown))} to its attention, which ring attention does not apply: the "
            "result would be wrong"
        )
    if not isinstance(attention_mask, LayerMask):
        raise ValueError(
            f"{layer} got {type(attention_mask).__name__} as its mask instead of what transformers' create_causal_mask "
            "makes: masks as tensors are not supported"
        )
    window = attention_mask.window
    if sliding_window is not None and sliding_window != window:
        raise ValueError(f"{layer} has sliding_window={sliding_window}, but its mask has {window}: one must be wrong")
    if is_causal is False:
        raise ValueError(f"{layer} attends in both directions (is_causal=False): only causal layers are supported")
    ring_plan.calls[module.layer_idx] += 1  # pyright: ignore[reportArgumentType]
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings promote q and k to fp32, but not v
        dtype = torch.get_autocast_dtype(query.device.type)  # that autocast gives torch's attention too
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q_BSHD, k_BSKD, v_BSKD = (x.transpose(1, 2) for x in (query, key, value))
    mask = ring_plan.mask_of(window)
    options = {"mask": mask, "softmax_scale": scaling, "dropout_p": dropout, "softcap": softcap, "sinks": s_aux}
    return ring_plan.attention(q_BSHD, k_BSKD, v_BSKD, 0, **options), None


def _layer_mask(*args: Any, mask_function: Callable, attention_mask: Any = None, **kwargs: Any) -> LayerMask:
    """The function that transformers calls to make a mask. Its pieces say what the mask is, or that it is refused."""
    if attention_mask is not None:
        raise ValueError("attention_mask of a shard is wrong: give the whole batch's to ring_attention.hf.shard")
    windows = []
    for piece in _pieces(mask_function):
        name = piece.__qualname__
        if name not in _MASK_PIECES:
            raise ValueError(
                f"a layer's mask is made of {name.split('.')[0]}, which ring attention does not compute: only causal "
                "masks, windows and packed documents are exact"
            )
        windows += [value for variable, value in _closure(piece) if variable == "sliding_window"]
    return LayerMask(min(windows, default=None))


def _pieces(mask_function: Callable) -> Iterator[Callable]:
    """A mask function and all those that it is made of."""
    yield mask_function
    for _, value in _closure(mask_function):
        for inner in value if isinstance(value, tuple) else (value,):
            if callable(inner):
                yield from _pieces(inner)


def _closure(function: Callable) -> list[tuple[str, Any]]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return [(name, cell.cell_contents) for name, cell in zip(names, cells, strict=True)]


# ------------------------------------------------------------------ the guards of a model


def _refuse_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise ValueError(
            "labels= would be shifted within this rank's part of the sequence, which gives a wrong loss: give labels "
            "to ring_attention.hf.shard, and take the loss from ring_attention.hf.loss"
        )


def _start_pass(kwargs: dict[str, Any], num_positions: int | None) -> None:
    plan = kwargs.get("ring_plan")
    if not isinstance(plan, BatchPlan):
        raise ValueError(
            "the model got no ring_plan: call it with **ring_attention.hf.shard(batch, attention). For generate() load "
            'its weights with attn_implementation="sdpa", or use ring_attention.decoding'
        )
    for name in ("attention_mask", "cu_seq_lens_q", "seq_idx"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} of a shard is wrong: give the whole batch's to ring_attention.hf.shard")
    if kwargs.get("position_ids") is None:
        raise ValueError("position_ids are missing: call the model with **ring_attention.hf.shard(batch, attention)")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: ring attention never has the weights of attention; leave it out")
    if num_positions is not None and plan.max_position >= num_positions:  # else only ranks with the last tokens fail
        raise ValueError(
            f"the batch has position {plan.max_position}, but the model has learned embeddings of {num_positions} "
            "positions: give shorter sequences"
        )
    plan.calls.clear()
    plan.is_complete = False


def _end_pass(kwargs: dict[str, Any], num_layers: int) -> None:
    plan: BatchPlan = kwargs["ring_plan"]
    wrong = [f"layer {layer} {plan.calls[layer]} times" for layer in range(num_layers) if plan.calls[layer] != 1]
    if wrong:
        raise ValueError(
            f"of {num_layers} layers, ring attention was called by {', '.join(wrong)}: every layer must call it once"
        )
    plan.is_complete = True


def _show_largest_position(base: nn.Module, rotary: nn.Module) -> None:
    """Let a rotary embedding whose frequencies depend on the largest position see that of all ranks.

    The position is appended to this rank's, and its cos and sin are dropped again.
    """
    largest: list[int] = [0]

    def before_model(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        largest[0] = kwargs["ring_plan"].max_position

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(("x", "position_ids"), args, strict=False)) | kwargs
        positions = named["position_ids"]
        named["position_ids"] = torch.cat((positions, positions.new_full((len(positions), 1), largest[0])), 1)
        return (), named

    def after(_: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = output
        return cos[:, :-1], sin[:, :-1]

    base.register_forward_pre_hook(before_model, with_kwargs=True)
    rotary.register_forward_pre_hook(before, with_kwargs=True)
    rotary.register_forward_hook(after)
