"""Ring attention for DeepSpeed's sequence-parallel group: exact attention over a sequence cut across ranks.

The process groups, `ring_attention.groups.ParallelGroups`, are imported by their own name: they bring in DeepSpeed,
which takes seconds, while everything here needs torch alone.
"""

from ring_attention.attention import LocalAttention, RingAttention
from ring_attention.layout import Layout

__all__ = ["Layout", "LocalAttention", "RingAttention"]
