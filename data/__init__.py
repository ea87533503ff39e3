"""From documents to this rank's tokens: `source` reads documents, `tokenizer` and `chat` make tokens, `store` keeps
these on disk, `packing` and `corpus` make sequences (`stream` without a store), `shard` deals out each rank's parts.
May import conf and ring_attention.layout, and no recipe.
"""
