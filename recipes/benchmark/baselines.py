"""Attention over ranks by other libraries, for `bench_attention` to time beside ours.

Each peer gets its shards as its own users would lay them, and PyTorch's fastest kernel for it. A peer that cannot run
here says why. Not here: ring-flash-attn and yunchang, which import FlashAttention 2's own package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from conf.schema import ConfigError
from ring_attention.groups import ParallelGroups
from ring_attention.kernels import KERNELS, KernelSpec
from ring_attention.layout import Layout


@dataclass
class Baseline:
    """One library on this rank.

    Args:
        layout: how it cuts sequences; this rank's number in it is that in the group.
        attend: from this rank's q, k, v, as [B, S, heads, D], to its output.
        around: what its calls must be within.
    """

    name: str
    layout: Layout
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def _refuse_without_cudnn(spec: KernelSpec) -> None:
    refusal = KERNELS["cudnn"].refusal(spec)
    if refusal is not None:
        raise ConfigError(f"PyTorch's fastest kernel for it, cuDNN's, {refusal}")


def torch_context_parallel(groups: ParallelGroups, length: int, spec: KernelSpec) -> Baseline:
    """torch.distributed.tensor.experimental.context_parallel, which gathers or passes K,V on, with cuDNN's attention.

    Raises:
        ConfigError: without a GPU, for what cuDNN refuses, and for a length that its balanced layout cannot cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    degree = groups.sequence_degree
    if spec.device_type != "cuda":
        raise ConfigError("it has no kernel for the CPU")
    _refuse_without_cudnn(spec)
    if length % (2 * degree):
        raise ConfigError(f"{length} tokens are not a multiple of {2 * degree}, twice the ranks")
    mesh = init_device_mesh("cuda", (degree,))

    @contextlib.contextmanager
    def around() -> Any:
        # it wants to cut something; our shards are cut
        with (
            context_parallel(mesh, buffers=[torch.zeros(length, device="cuda")], buffer_seq_dims=[0]),
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        ):
            yield

    def attend(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        if q_BSHD.shape[2] != k_BSKD.shape[2]:  # it takes as many key-value heads as heads
            k_BSKD, v_BSKD = (x.repeat_interleave(q_BSHD.shape[2] // x.shape[2], 2) for x in (k_BSKD, v_BSKD))
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BSHD, k_BSKD, v_BSKD))
        # looked up when called: the context replaces it
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return Baseline("torch context_parallel", Layout("zigzag", degree, length), attend, around)


def deepspeed_ulysses(groups: ParallelGroups, length: int, spec: KernelSpec) -> Baseline:
    """deepspeed.sequence.layer.DistributedAttention around PyTorch's attention.

    Raises:
        ConfigError: for a length or a number of key-value heads that the ranks do not divide, and on GPUs for what
            cuDNN refuses.
    """
    from deepspeed.sequence.layer import DistributedAttention

    degree = groups.sequence_degree
    if length % degree or spec.num_kv_heads % degree:
        raise ConfigError(f"{length} tokens or {spec.num_kv_heads} kv heads are not a multiple of the {degree} ranks")
    on_gpu = spec.device_type == "cuda"
    if on_gpu:
        _refuse_without_cudnn(spec)

    def local(q_BGHD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BGHD, k_BGKD, v_BGKD))
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    attention = DistributedAttention(local, groups.get_sequence_parallel_group(), scatter_idx=2, gather_idx=1)  # pyright: ignore[reportArgumentType]
    around = (lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)) if on_gpu else contextlib.nullcontext
    layout = Layout("contiguous", degree, length)
    return Baseline("DeepSpeed Ulysses", layout, lambda q, k, v: attention(q, k, v, 0), around)


BASELINES = {"torch context_parallel": torch_context_parallel, "DeepSpeed Ulysses": deepspeed_ulysses}
