"""From documents to this rank's tokens: `source` reads documents, `tokenizer` makes tokens of them, `pack` cuts these
into sequences, `shard` deals out each rank's shards of them as `TokenBatch`.
May import conf and ring_attention.layout, and no recipe.
"""
