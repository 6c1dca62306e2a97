"""From training shards to batches: draws, streams, decoding, loader. Knows no model. May import ``tasks``."""
