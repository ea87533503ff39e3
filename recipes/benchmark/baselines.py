"""Other libraries' distributed attention, which `bench_attention` times beside ours.

Each baseline gets its shards in its own layout and PyTorch's fastest kernel that it supports. ring-flash-attn and
yunchang are missing: they import FlashAttention 2.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from conf.schema import ConfigError
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KERNELS, KernelSpec
from ring_attention.layout import Layout
from ring_attention.sequence_attention import SequenceAttention


class ShardedAttention(NamedTuple):
    """Attention over sequences that all ranks share."""

    layout: Layout
    rank: int  # which shard this process holds
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # the shard's output from its q, k, v, all [B, S, heads, D]
    grid: str = ""  # for people
    has_messages: bool = False  # whether `messages_stay_local` keeps its messages on their rank
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # what its calls must run within
    module: SequenceAttention | None = None  # if it is one of ours


def _check_cudnn(spec: KernelSpec) -> None:
    if refusal := KERNELS["cudnn"].refusal(spec):
        raise ConfigError(f"PyTorch's fastest kernel for it, cuDNN's, {refusal}")


def torch_context_parallel(groups: ParallelGroups, length: int, spec: KernelSpec) -> ShardedAttention:
    """torch.distributed.tensor.experimental.context_parallel with cuDNN's attention.

    Raises:
        ConfigError: for what cuDNN does not support, such as a CPU, and for a length that its layout cannot shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    degree = groups.sequence_degree
    _check_cudnn(spec)
    if length % (2 * degree):
        raise ConfigError(f"{length} tokens are not a multiple of {2 * degree}, twice the ranks")
    mesh = init_device_mesh("cuda", (degree,))

    @contextlib.contextmanager
    def context() -> Any:
        # it insists on sharding a buffer; our tensors are already sharded
        with (
            context_parallel(mesh, buffers=[torch.zeros(length, device="cuda")], buffer_seq_dims=[0]),
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        ):
            yield

    def attend(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        if q_BSHD.shape[2] != k_BSKD.shape[2]:  # it needs as many key-value heads as query heads
            k_BSKD, v_BSKD = (x.repeat_interleave(q_BSHD.shape[2] // x.shape[2], 2) for x in (k_BSKD, v_BSKD))
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BSHD, k_BSKD, v_BSKD))
        # looked up at each call, because the context replaces it
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    layout = Layout("zigzag", degree, length)
    return ShardedAttention(layout, groups.get_sequence_parallel_rank(), attend, context=context)


def deepspeed_ulysses(groups: ParallelGroups, length: int, spec: KernelSpec) -> ShardedAttention:
    """deepspeed.sequence.layer.DistributedAttention around PyTorch's attention.

    Raises:
        ConfigError: if the ranks do not divide the length or the key-value heads; on GPUs if cuDNN refuses the shape.
    """
    from deepspeed.sequence.layer import DistributedAttention

    degree = groups.sequence_degree
    if length % degree or spec.num_kv_heads % degree:
        raise ConfigError(f"{length} tokens or {spec.num_kv_heads} kv heads are not a multiple of the {degree} ranks")
    context = contextlib.nullcontext
    if spec.device_type == "cuda":
        _check_cudnn(spec)
        context = functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)

    def local(q_BGHD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BGHD, k_BGKD, v_BGKD))
        is_grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped).transpose(1, 2)

    attention = DistributedAttention(local, groups.get_sequence_parallel_group(), scatter_idx=2, gather_idx=1)  # pyright: ignore[reportArgumentType]
    layout, rank = Layout("contiguous", degree, length), groups.get_sequence_parallel_rank()
    return ShardedAttention(layout, rank, lambda q, k, v: attention(q, k, v, 0), context=context)


BASELINES = {"torch context_parallel": torch_context_parallel, "DeepSpeed Ulysses": deepspeed_ulysses}
