"""Attention kernels and their registry. A new kernel is one file here and one entry in `KERNELS`, fastest first."""

# ruff: noqa: F401
from __future__ import annotations

from ring_attention.kernels.aten_flash import AtenFlashKernel
from ring_attention.kernels.base import (
    ANYWHERE,
    AttentionKernel,
    DqSum,
    GradientTargets,
    KernelParams,
    KernelSpec,
    SavedTensors,
    Scores,
)
from ring_attention.kernels.cpu_flash import CpuFlashKernel
from ring_attention.kernels.cudnn import CudnnKernel
from ring_attention.kernels.ffpa import FfpaKernel
from ring_attention.kernels.flash_attn_4 import FlashAttention4Kernel
from ring_attention.kernels.mem_efficient import MemEfficientKernel
from ring_attention.kernels.reference import ReferenceKernel

KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttention4Kernel(),
        FfpaKernel(),
        CudnnKernel(),
        AtenFlashKernel(),
        MemEfficientKernel(),
        CpuFlashKernel(),
        ReferenceKernel(),
    )
}


def choose_kernel(spec: KernelSpec, name: str | AttentionKernel = "auto") -> tuple[AttentionKernel, str]:
    """The fastest kernel that can do `spec`, or the named or given one; and the reason, for people.

    It depends on `spec`, `name` and the installed packages alone, so ranks of equal hardware and software agree.

    Raises:
        ValueError: if the named or given kernel is unknown or cannot do `spec`.
    """
    if name != "auto":
        if isinstance(name, str) and name not in KERNELS:
            raise ValueError(f"kernel={name} is unknown: use auto, {', '.join(KERNELS)}")
        kernel = name if isinstance(name, AttentionKernel) else KERNELS[name]
        if refusal := kernel.refusal(spec):
            raise ValueError(f"kernel={kernel.name} cannot run here: {refusal}; use kernel=auto")
        return kernel, "asked for"
    refusals = []
    for kernel in KERNELS.values():
        if not (refusal := kernel.refusal(spec)):
            return kernel, "; ".join([kernel.speed, *refusals])
        if kernel.device_type == spec.device_type:
            refusals.append(f"not {kernel.name}: {refusal}")
    raise AssertionError("the reference kernel supports everything")
