"""What a configuration needs before anything runs: rank grid, FLOPs, memory, throughput, as pure arithmetic.

May import conf, data, ring_attention and recipes.run.
"""
