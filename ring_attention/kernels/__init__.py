"""The block kernels and their registry. A new kernel is one file here and one entry in `KERNELS`, fastest first."""

from __future__ import annotations

from ring_attention.kernels.aten_flash import AtenFlashKernel
from ring_attention.kernels.base import AttentionKernel, KernelSpec
from ring_attention.kernels.cpu_flash import CpuFlashKernel
from ring_attention.kernels.cudnn import CudnnKernel
from ring_attention.kernels.ffpa import FfpaKernel
from ring_attention.kernels.flash_attn_4 import FlashAttention4Kernel
from ring_attention.kernels.mem_efficient import MemEfficientKernel
from ring_attention.kernels.reference import ReferenceKernel

KERNELS: dict[str, AttentionKernel] = {
    block.name: block
    for block in (
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
    """The fastest kernel that can do `spec`, or the named or given one; with the reason, for people.

    Pure in (spec, name) and the packages installed, so all ranks of equal hardware and software choose alike.

    Raises:
        ValueError: if the named or given kernel is unknown or cannot do `spec`.
    """
    if isinstance(name, str) and name != "auto" and name not in KERNELS:
        raise ValueError(f"kernel={name} is unknown: use auto, {', '.join(KERNELS)}")
    if name != "auto":
        block = name if isinstance(name, AttentionKernel) else KERNELS[name]
        runs_here = block.device_type in (None, spec.device_type)
        refusal = block.supports(spec) if runs_here else f"it does not run on {spec.device_type}"
        if refusal is not None:
            raise ValueError(f"kernel={block.name} cannot run here: {refusal}; use kernel=auto")
        return block, "asked for"
    refusals = []
    for block in KERNELS.values():
        if block.device_type not in (None, spec.device_type):
            continue
        refusal = block.supports(spec)
        if refusal is None:
            return block, "; ".join([block.speed, *refusals])
        refusals.append(f"not {block.name}: {refusal}")
    raise AssertionError("the reference block supports everything")


__all__ = ["KERNELS", "AttentionKernel", "KernelSpec", "choose_kernel"]
