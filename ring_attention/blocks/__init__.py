"""The block kernels and their registry. A new kernel is one file here and one entry in `BLOCKS`, fastest first."""

from __future__ import annotations

from ring_attention.blocks.aten_flash import AtenFlashBlock
from ring_attention.blocks.base import Block, BlockSpec
from ring_attention.blocks.cpu_flash import CpuFlashBlock
from ring_attention.blocks.cudnn import CudnnBlock
from ring_attention.blocks.ffpa import FfpaBlock
from ring_attention.blocks.flash_attn_4 import FlashAttention4Block
from ring_attention.blocks.mem_efficient import MemEfficientBlock
from ring_attention.blocks.reference import ReferenceBlock

BLOCKS: dict[str, Block] = {
    block.name: block
    for block in (
        FlashAttention4Block(),
        FfpaBlock(),
        CudnnBlock(),
        AtenFlashBlock(),
        MemEfficientBlock(),
        CpuFlashBlock(),
        ReferenceBlock(),
    )
}


def choose_block(spec: BlockSpec, name: str | Block = "auto") -> tuple[Block, str]:
    """The fastest kernel that can do `spec`, or the named or given one; with the reason, for people.

    Pure in (spec, name) and the packages installed, so all ranks of equal hardware and software choose alike.

    Raises:
        ValueError: if the named or given kernel is unknown or cannot do `spec`.
    """
    if isinstance(name, str) and name != "auto" and name not in BLOCKS:
        raise ValueError(f"block={name} is unknown: use auto, {', '.join(BLOCKS)}")
    if name != "auto":
        block = name if isinstance(name, Block) else BLOCKS[name]
        runs_here = block.device_type in (None, spec.device_type)
        refusal = block.supports(spec) if runs_here else f"it does not run on {spec.device_type}"
        if refusal is not None:
            raise ValueError(f"block={block.name} cannot run here: {refusal}; use block=auto")
        return block, "asked for"
    refusals = []
    for block in BLOCKS.values():
        if block.device_type not in (None, spec.device_type):
            continue
        refusal = block.supports(spec)
        if refusal is None:
            return block, "; ".join([block.speed, *refusals])
        refusals.append(f"not {block.name}: {refusal}")
    raise AssertionError("the reference block supports everything")


__all__ = ["BLOCKS", "Block", "BlockSpec", "choose_block"]
