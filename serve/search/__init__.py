"""One search: router, batching, retries, shard workers, encoder. May import ``generations`` and the rooms below it."""
