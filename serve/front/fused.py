"""All workers in one process: the placement ``fused``, and local mode."""

from collections.abc import Sequence

from lookalike.serve.generations.generation import Generation
from lookalike.serve.search.router import Router
from lookalike.serve.search.workers import ShardWorker
from lookalike.serve.settings.config import ServeConfig


def open_workers(config: ServeConfig, generation: Generation, generations: Sequence[Generation]) -> Router:
    """A router to workers in this process that hold ``generations``: a group for each hash shard of ``generation``.

    There is an encoder if any of the generations has one.
    """
    num_groups, retries = generation.meta.num_hash_shards, config.retries.model_copy(update={"hedge_ms": None})
    shards = [ShardWorker(group, num_groups, generations) for group in range(num_groups)]
    if all(held.encoder is None for held in (generation, *generations)):
        return Router(shards, retries=retries)
    from lookalike.serve.search.encoding import EncoderWorker  # imports torch

    return Router(shards, encoder=EncoderWorker(config, generations), retries=retries)
