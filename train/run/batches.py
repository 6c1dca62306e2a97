"""A training worker's batches: from its settings to tensors on its device."""

from collections.abc import Iterator

from lookalike.train.feed.decoding import actor_batches
from lookalike.train.feed.loader import Batch, BatchDataset, build_loader
from lookalike.train.feed.streams import build_streams
from lookalike.train.run.settings import LoopConfig
from lookalike.vision.transforms import build_augmentation


def worker_batches(config: LoopConfig, stream: int, start: int) -> BatchDataset:
    """Batches of one data stream, beginning at forward pass ``start``."""
    train, loader = config.train, config.train.loader
    files = {name: config.files[name] for name in train.mix}
    streams = build_streams(
        files, seed=train.seed, rank=stream, world=train.workers.num, resample=loader.resample, balance=loader.balance
    )
    augment = build_augmentation(config.encoder.transform, train.augment)
    return BatchDataset(
        streams,
        train.mixture,
        augment,
        seed=train.seed,
        lead=stream * train.compute.accumulation,
        start=start,
        stop=config.total_steps * train.compute.accumulation,
        views=loader.views,
        num_classes=config.class_fields,
        attributes=config.attributes,
    )


def feed(dataset: BatchDataset, config: LoopConfig) -> Iterator[Batch]:
    """The dataset's batches, decoded where the settings say."""
    loader = config.train.loader
    if loader.actors:
        return iter(actor_batches(dataset, loader.actors, num_cpus=loader.actor_cpus, resource=loader.actor_resource))
    return iter(build_loader(dataset, loader.processes))
