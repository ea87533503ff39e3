"""From a corpus to this rank's tokens: `source` reads documents, `pack` cuts sequences, `shard` deals them out."""
