"""Other libraries' distributed attention, which `bench_attention` times beside ours.

Each baseline gets its shards in its own layout and PyTorch's fastest kernel that it supports. ring-flash-attn and
yunchang are missing: they import FlashAttention 2.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from conf.schema import ConfigError
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KERNELS, KernelSpec
from ring_attention.layout import Layout
from ring_attention.sequence_attention import SequenceAttention

FLEX_BLOCK = 128  # tokens: PyTorch's context parallelism of flex_attention places blocks of so many
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # the output from q, k, v, all [B, S, heads, D]


class ShardedAttention(NamedTuple):
    """Attention over sequences that all ranks share."""

    layout: Layout
    rank: int  # which shard this process holds
    attend: Attend  # the shard's output from its q, k, v
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


def torch_flex_context_parallel(groups: ParallelGroups, ends: tuple[int, ...], spec: KernelSpec) -> ShardedAttention:
    """PyTorch's context parallelism of flex_attention, with a document mask and its balancer of blocks.

    Args:
        ends: 0, then the end of each document; the last is the sequence's.

    Raises:
        ConfigError: on the CPU, for a length that it cannot shard, and if this PyTorch does not have it or cannot
            compile it.
    """
    from torch._dynamo.exc import TorchDynamoException

    if spec.device_type == "cpu":
        raise ConfigError("PyTorch's flex_attention has no backward pass on the CPU")
    try:
        attention = _flex_context_parallel(groups, ends, spec.device_type)
        _try_both_passes(attention, spec)
    except TorchDynamoException as error:
        raise ConfigError(f"PyTorch cannot compile it here: {str(error).splitlines()[0]}") from error
    return attention


def _try_both_passes(attention: ShardedAttention, spec: KernelSpec) -> None:
    """Compile them."""
    heads, length = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), attention.layout.local_length
    shapes = [(1, length, num, spec.head_dim) for num in heads]
    leaves = [torch.zeros(shape, dtype=spec.dtype, device=spec.device_type, requires_grad=True) for shape in shapes]
    attention.attend(*leaves).sum().backward()


def _flex_context_parallel(groups: ParallelGroups, ends: tuple[int, ...], device_type: str) -> ShardedAttention:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    try:
        from torch.distributed.tensor.experimental._context_parallel import _ContextParallel, _PTRRLoadBalancer
        from torch.distributed.tensor.experimental._context_parallel._attention import _create_cp_block_mask
    except ImportError as error:
        raise ConfigError(f"PyTorch {torch.__version__} has it elsewhere or not at all: {error}") from error

    length, degree = ends[-1], groups.sequence_degree
    if length % (FLEX_BLOCK * degree):
        raise ConfigError(f"{length} tokens are not a multiple of {FLEX_BLOCK * degree}, {FLEX_BLOCK} for each rank")
    boundaries, positions = (torch.tensor(x, device=device_type) for x in (ends, range(length)))
    document_L = torch.bucketize(positions, boundaries, right=True)

    def allows(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_L[query] == document_L[key])

    mesh = init_device_mesh(device_type, (degree,))
    full_mask = torch.compile(create_block_mask)(allows, 1, 1, length, length, device=device_type)
    balancer = _PTRRLoadBalancer(full_mask, degree)
    own_mask = _create_cp_block_mask(allows, 1, 1, length, length, mesh, balancer)
    flex = _Flex(torch.compile(flex_attention, dynamic=False))
    attention = parallelize_module(flex, mesh, _ContextParallel(2, _ContextParallel.AttentionType.FLEX))

    def attend(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSKD, v_BSKD))
        return attention(q, k, v, block_mask=own_mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    layout = _Reordered("contiguous", degree, length, order=balancer._generate_indices()[0].cpu())
    return ShardedAttention(layout, groups.get_sequence_parallel_rank(), attend)


class _Flex(nn.Module):
    """flex_attention as the module whose keys and values PyTorch gathers."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.attention(*args, **kwargs)


@dataclass(frozen=True)
class _Reordered(Layout):
    """The sequence in another order, cut contiguously. `order` has the position of each token in that order, [L]."""

    order: Tensor = field(kw_only=True, compare=False)

    def positions(self, sequence_rank: int) -> Tensor:
        return self.order[sequence_rank * self.local_length :][: self.local_length]


def deepspeed_ulysses(groups: ParallelGroups, length: int, spec: KernelSpec) -> ShardedAttention:
    """deepspeed.sequence.layer.DistributedAttention around PyTorch's attention.

    Raises:
        ConfigError: if the ranks do not divide the length or the key-value heads; on GPUs if cuDNN refuses the shape.
    """
    context = contextlib.nullcontext
    if spec.device_type == "cuda":
        _check_cudnn(spec)
        context = functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)

    def local(q_BGHD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BGHD, k_BGKD, v_BGKD))
        is_grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped).transpose(1, 2)

    return ulysses_around(local, groups, length, spec)._replace(context=context)


def ulysses_around(local: Attend, groups: ParallelGroups, length: int, spec: KernelSpec) -> ShardedAttention:
    """DeepSpeed's DistributedAttention around `local`, which gets full sequences of this rank's heads.

    Raises:
        ConfigError: if the ranks do not divide the length or the key-value heads.
    """
    from deepspeed.sequence.layer import DistributedAttention

    degree = groups.sequence_degree
    if length % degree or spec.num_kv_heads % degree:
        raise ConfigError(f"{length} tokens or {spec.num_kv_heads} kv heads are not a multiple of the {degree} ranks")
    attention = DistributedAttention(local, groups.get_sequence_parallel_group(), scatter_idx=2, gather_idx=1)  # pyright: ignore[reportArgumentType]
    layout, rank = Layout("contiguous", degree, length), groups.get_sequence_parallel_rank()
    return ShardedAttention(layout, rank, lambda q, k, v: attention(q, k, v, 0))


BASELINES = {"torch context_parallel": torch_context_parallel, "DeepSpeed Ulysses": deepspeed_ulysses}
