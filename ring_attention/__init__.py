"""Ring attention for DeepSpeed's sequence-parallel group: exact attention over a sequence that is sharded across ranks.

The modules are in `attention`, the algorithm in `ring`; `kernels` compute, `transport` moves tensors. Imports nothing
else of this project. `groups` is not imported here, since it imports DeepSpeed, which takes seconds.
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
