"""Ring attention for DeepSpeed's sequence-parallel group: exact attention over a sequence cut across ranks.

The process groups, `ring_attention.groups.ParallelGroups`, are imported by their own name: they bring in DeepSpeed,
which takes seconds, while everything here needs torch alone.
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
