"""What all attention modules share: the constructor, the call with its checks, the choice of the kernel, the ring.

Shapes: B batch, S local tokens, H query heads, K key-value heads, D head size, E value head size.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ring_attention.direct import attend_over_ring
from ring_attention.kernels import AttentionKernel, KernelSpec, Scores, choose_kernel
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, Mask
from ring_attention.ring import Ring
from ring_attention.transport import P2PTransport
from ring_attention.transport.agreement import check_equal

Hosts = Sequence[Hashable] | None


class SequenceAttention(nn.Module):
    """Attention over a sequence whose tokens are spread over the ranks of a group.

    `sequence_rank` is the part of the sequence that this rank holds, as `Layout.shard` and `Layout.positions` take it.
    A deep copy shares the process groups and the transport.

    Args:
        local_attention: "auto" for the fastest kernel, a kernel's name, or a kernel. DistributedAttention takes a
            module or function here; these see whole sequences, so `mask` says instead what they compute.
        sequence_process_group: the ranks that share a sequence.
        scatter_idx, gather_idx: as in DistributedAttention: 2 (heads are dim 2), and 0 or 1. The dim of the tokens
            follows from batch_dim_idx in each call.
        sp_stream: goes to DistributedAttention in modules that use it.
        num_kv_heads: of each call's keys; None takes any number.
        mask: which keys a query sees.
        layout: "contiguous", "zigzag" or "balanced": how the caller shards sequences (`Layout.shard`).
        transport: how K,V travel around a ring: one of `ring_attention.transport.TRANSPORTS`, or "auto" for the faster.
        hosts: the host of each rank of the group, needed where ranks are not in the order of hosts.
        ulysses_degree: ranks within Ulysses; a divisor of the group's ranks and of the key-value heads.

    Raises:
        ValueError: for an unknown layout, transport or kernel, or an option that the module does not take.
    """

    options: tuple[str, ...] = ()  # of transport, hosts and ulysses_degree, those that the module takes
    _group: Any = None  # the ranks that exchange messages; None if this rank computes alone

    def __init__(
        self,
        local_attention: AttentionKernel | str,
        sequence_process_group: Any = None,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
        *,
        mask: Mask = CAUSAL,
        layout: str = "contiguous",
        transport: str = "auto",
        hosts: Hosts = None,
        ulysses_degree: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(local_attention, (AttentionKernel, str)):
            name = getattr(local_attention, "__name__", type(local_attention).__name__)
            raise ValueError(
                f'local_attention is {name}, but must be "auto", a kernel or its name: give what it computes as '
                "mask=CAUSAL (the default), FULL or Mask(left=...), and another scale as softmax_scale= of the call"
            )
        if scatter_idx != 2 or gather_idx not in (0, 1):
            raise ValueError(
                f"scatter_idx={scatter_idx}, gather_idx={gather_idx} must be 2 and 0 or 1: heads are dim 2, and tokens "
                "dim 0 or 1, as in [B, S, H, D] and [S, B, H, D]"
            )
        _check_mask(mask)
        Layout(layout, 1, 1)  # refuses an unknown name here rather than in the first call
        given = {"transport": transport != "auto", "hosts": hosts, "ulysses_degree": ulysses_degree}
        if extra := [name for name, value in given.items() if value and name not in self.options]:
            raise ValueError(f"{type(self).__name__} takes no {', '.join(extra)}: leave it out")
        if "ulysses_degree" in self.options and ulysses_degree is None:
            raise ValueError(f"{type(self).__name__} needs ulysses_degree, a divisor of the group's ranks")
        self._kernel, self._mask, self._layout_name = local_attention, mask, layout
        self._num_kv_heads = num_kv_heads
        # compilers skip the call: schedules are Python, and transfers must keep their order on all ranks
        self._outside_compilers = _disable_compilers()
        self.ulysses_degree = 1 if ulysses_degree is None else ulysses_degree
        self._transport, ulysses_rank = self._join(sequence_process_group, transport, hosts, sp_stream)
        self.ring_degree = self._transport.ring_degree if self._transport else 1
        ring_rank = self._transport.ring_rank if self._transport else 0
        self.sequence_rank = ring_rank * self.ulysses_degree + ulysses_rank

    def _join(self, group: Any, transport: str, hosts: Hosts, sp_stream: Any) -> tuple[P2PTransport | None, int]:
        """Returns (the transport of this rank's ring, None without one; the rank within Ulysses)."""
        return None, 0

    @property
    def transport_used(self) -> str | None:
        """What carries this rank's keys and values, which a call finds out. None before, and without a ring."""
        return self._transport.used if self._transport else None

    @property
    def transport_reason(self) -> str:
        """Why `transport_used` is not the transport that was chosen; empty if it is."""
        return self._transport.reason if self._transport else ""

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceAttention:
        memo |= {id(shared): shared for shared in self._shared()}
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _shared(self) -> list[Any]:
        """What a deep copy has in common with the module."""
        return [self._group, self._transport]

    def layout(self, length: int, documents: tuple[int, ...] | None = None) -> Layout:
        """How sequences of `length` tokens must be spread over the ranks.

        Args:
            documents: of the batch, 0 and then the end of each, as in its mask; only layout=balanced looks at them.
        """
        degrees = self.ring_degree, length, self.ulysses_degree
        if self._layout_name != "balanced":
            return Layout(self._layout_name, *degrees)
        return Layout("balanced", *degrees, documents, is_causal=(self._mask.left, self._mask.right) == (None, 0))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: None = None,
        *args: None,
        mask: Mask | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout_p: float = 0.0,
        **kwargs: None,
    ) -> Tensor:
        """Attention of this rank's queries over the whole sequence. Every rank must call it, with equal masks.

        Args:
            query: [B, S, H, D] for batch_dim_idx 0, [S, B, H, D] for 1; S local tokens, equal on all ranks.
            key: the same with K heads, H a multiple of K.
            value: as key; its head size may differ if the kernel supports that.
            rotary_pos_emb, args, kwargs: DistributedAttention would apply them or pass them on. Must be None here.
            mask: over the whole sequence, padding included. None is the constructor's.
            softmax_scale: None is 1 / sqrt(D).
            softcap: scores are softcap * tanh(score / softcap), as in Gemma 2. None is no cap.
            sinks: [H], a logit per query head that joins the softmax's denominator, as in gpt-oss. Equal on all ranks.
                Its gradient is this rank's part: the ranks' sum is the whole.

        Returns:
            The output, in the shape and dtype of `query`, but with the value's head size.

        Raises:
            ValueError: for tensors that do not fit each other, the layout or the kernel, an argument that must be None,
                or dropout. On every rank, if ranks differ in shapes, dtypes, mask, scale or softcap: compared when they
                are new to the group, and documents then too.
        """
        extra = {"rotary_pos_emb": rotary_pos_emb, **{f"argument {6 + n}": x for n, x in enumerate(args)}, **kwargs}
        call = (query, key, value, batch_dim_idx, extra, mask, softmax_scale, softcap, sinks, dropout_p)
        return self._outside_compilers(self, *call)

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        extra: dict[str, Any],
        mask: Mask | None,
        softmax_scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
        dropout_p: float,
    ) -> Tensor:
        for name, argument in extra.items():
            if argument is not None:
                raise ValueError(
                    f"{name} is {type(argument).__name__}, which nothing here applies: give what a query sees as "
                    "mask=Mask(...), and rotate query and key before, by the global positions of Layout.positions"
                )
        if dropout_p:
            raise ValueError(f"dropout_p={dropout_p} must be 0: use dropout after the output projection instead")
        mask = self._mask if mask is None else mask
        _check_mask(mask)
        if self._group is not None:
            self._check_ranks(query, key, value, batch_dim_idx, mask, softmax_scale, softcap, sinks)
        _check_tensors(query, key, value, batch_dim_idx)
        if self._num_kv_heads not in (None, key.shape[2]):
            raise ValueError(
                f"num_kv_heads={self._num_kv_heads}, but key has {key.shape[2]} heads: build the module with "
                f"num_kv_heads={key.shape[2]}, or leave it out"
            )
        num_rows, batch = len(mask.documents or ((),)), query.shape[batch_dim_idx]
        if num_rows not in (1, batch):
            raise ValueError(
                f"the mask has documents for {num_rows} rows, the batch has {batch}: give them once or per row"
            )
        scores = _scores(query.shape[-1], softmax_scale, softcap)
        if sinks is not None:
            _check_sinks(sinks, query)
            sinks = sinks.to(torch.promote_types(query.dtype, torch.float32))
        # kernels read heads as runs of numbers: without this the CPU's flash kernel gives wrong results (measured)
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):  # compute in the dtype of the tensors
            return self._attend(query, key, value, batch_dim_idx, mask, scores, sinks)

    def _check_ranks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        mask: Mask,
        softmax_scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        """Before any other check of the tensors, so that no rank raises alone while others wait for it."""
        tensors = {"query": query, "key": key, "value": value}
        values: dict[str, Hashable] = {f"the shape of {name}": x.shape for name, x in tensors.items()}
        values |= {f"the dtype of {name}": x.dtype for name, x in tensors.items()}
        values |= {
            "batch_dim_idx": batch_dim_idx,
            "mask": (mask.left, mask.right, mask.documents is None),
            "softmax_scale": softmax_scale,
            "softcap": softcap,
            "the shape of sinks": getattr(sinks, "shape", None),
            "the dtype of sinks": getattr(sinks, "dtype", None),
            "the module": (type(self).__name__, self._layout_name, self.ulysses_degree, self._num_kv_heads),
        }
        # packed documents differ from batch to batch: no reason to wait for the other ranks each time
        check_equal(self._group, values, {"the mask's documents": mask.documents}, query.device)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        mask: Mask,
        scores: Scores,
        sinks: Tensor | None,
    ) -> Tensor:
        """Over this rank's ring. Modules with Ulysses put an all-to-all around it."""
        inputs = (query, key, value)
        q_BSHD, k_BSKD, v_BSKE = (x.transpose(0, 1) for x in inputs) if batch_dim_idx == 1 else inputs
        ring_length = q_BSHD.shape[1]
        layout = self.layout(ring_length * self.ring_degree)
        if layout.name == "balanced" and mask.documents is not None:
            first, *others = mask.documents
            if others:
                raise ValueError(
                    f"layout=balanced lays out one row of documents, not {1 + len(others)}: use a batch of one longer "
                    "row, or layout=zigzag"
                )
            layout = replace(layout, documents=first)
        if layout.ring_length != ring_length:
            raise ValueError(
                f"{ring_length} tokens are not {layout.chunks_per_ring_rank} equal chunks, which layout={layout.name} "
                "needs on each rank of the ring: cut sequences with the module's layout(length).shard"
            )
        mask = mask.within(layout.padded_length)
        spec = KernelSpec.of(q_BSHD, k_BSKD, v_BSKE, mask.left is not None, scores.softcap is not None)
        ring = Ring(layout, mask, self._transport, choose_kernel(spec, self._kernel)[0], scores)
        out_BSHE = self._compute(q_BSHD, k_BSKD, v_BSKE, sinks, ring)
        return out_BSHE.transpose(0, 1) if batch_dim_idx == 1 else out_BSHE

    def _compute(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKE: Tensor, sinks_H: Tensor | None, ring: Ring) -> Tensor:
        ring.connect(q_BSHD, k_BSKD, v_BSKE, sinks_H)
        return attend_over_ring(q_BSHD, k_BSKD, v_BSKE, sinks_H, ring)


@functools.cache
def _disable_compilers() -> Any:
    return torch.compiler.disable(SequenceAttention._forward)  # imports the compiler for seconds: not in a step


def _check_mask(mask: Mask) -> None:
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is {type(mask).__name__}, but must be a ring_attention.Mask, such as Mask(left=4095) or "
            "CAUSAL.packed(cu_seqlens): masks given as a tensor are not supported"
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int) -> None:
    if batch_dim_idx not in (0, 1):
        raise ValueError(f"batch_dim_idx={batch_dim_idx} must be 0 ([B, S, H, D]) or 1 ([S, B, H, D])")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}: cast them to one dtype")
    q, k, v = list(query.shape), list(key.shape), list(value.shape)
    if not len(q) == len(k) == len(v) == 4:
        rule = "four dims are needed, [B, S, heads, head size]"
    elif not q[:2] == k[:2] == v[:2]:
        rule = "the first two dims must be equal"
    elif 0 in (k[2], q[3], v[3]):
        rule = "no head or size may be 0"
    elif k[2] != v[2] or q[2] % k[2]:
        rule = "keys and values need equally many heads, and queries a multiple of that"
    elif q[3] != k[3]:
        rule = "query and key need equal head sizes"
    else:
        return
    raise ValueError(f"query has shape {q}, key {k}, value {v}: {rule}")


def _scores(head_dim: int, softmax_scale: float | None, softcap: float | None) -> Scores:
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    if not 0 < scale < math.inf:
        raise ValueError(f"softmax_scale={scale} must be above 0, and finite: kernels mask by -inf * scale")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be above 0, and finite: use softcap=None for scores without a cap")
    return Scores(scale, None if softcap is None else float(softcap))


def _check_sinks(sinks: Tensor, query: Tensor) -> None:
    num_heads = query.shape[2]
    if not isinstance(sinks, Tensor):
        given = type(sinks).__name__
    elif sinks.is_floating_point() and sinks.shape == (num_heads,) and sinks.device == query.device:
        return
    else:
        given = f"{list(sinks.shape)} of {sinks.dtype} on {sinks.device}"
    raise ValueError(
        f"sinks is {given}, but must be a float tensor [{num_heads}] on {query.device}: a logit for each head of the "
        "query, all of them on every rank"
    )
