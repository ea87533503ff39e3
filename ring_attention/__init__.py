"""Ring attention for DeepSpeed's sequence-parallel group: exact attention over a sequence that is sharded across ranks.

The modules are in `attention`, the algorithm in `ring`; `kernels` compute, `transport` moves tensors. The library
imports nothing else of this project, and needs torch alone. `ring_attention.groups` and Ulysses import DeepSpeed, which
takes seconds, so `ParallelGroups` is not imported here.
"""

from ring_attention.attention import (
    AllGatherAttention,
    HybridAttention,
    LocalAttention,
    RingAttention,
    UlyssesAttention,
)
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL, FULL, Mask

__all__ = [
    "CAUSAL",
    "FULL",
    "AllGatherAttention",
    "HybridAttention",
    "Layout",
    "LocalAttention",
    "Mask",
    "RingAttention",
    "UlyssesAttention",
]
