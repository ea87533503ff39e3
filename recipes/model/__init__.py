"""The dense transformer: layers, MLP, head, fused operations, and activation offload.

May import conf, data, ring_attention and recipes.planning.
"""
