"""From documents to this rank's tokens: `source` reads documents, `pack` cuts them into sequences, `shard` deals out
each rank's shards of them as `batch.TokenBatch`.
May import conf and ring_attention.layout, and no recipe.
"""
