"""A training worker's batches: from its settings to tensors on its device."""

from collections.abc import Iterable, Iterator

import torch

from lookalike.train.feed.decoding import actor_batches
from lookalike.train.feed.loader import Batch, BatchDataset, build_loader, on_device
from lookalike.train.feed.streams import build_streams
from lookalike.train.run.settings import LoopConfig
from lookalike.vision.transforms import build_augmentation


def worker_batches(config: LoopConfig, stream: int, start: int) -> BatchDataset:
    """Batches of one data stream, beginning at forward pass ``start``."""
    train = config.train
    files = {name: config.files[name] for name in train.mix}
    streams = build_streams(
        files,
        seed=train.seed,
        rank=stream,
        world=train.workers.num,
        resample=train.loader.resample,
        balance=train.loader.balance,
    )
    augment = build_augmentation(config.encoder.transform, train.augment)
    return BatchDataset(
        streams,
        train.pictures(),
        augment,
        seed=train.seed,
        start=start,
        stop=config.total_steps * train.compute.accumulation,
        views=train.loader.views,
        num_classes=config.class_fields,
        attributes=config.attributes,
    )


def feed(dataset: BatchDataset, config: LoopConfig, device: torch.device) -> Iterator[Batch]:
    """The dataset's batches on ``device``, images normalised, decoded where the settings say."""
    train = config.train
    built: Iterable[Batch] = (
        actor_batches(
            dataset, train.loader.actors, num_cpus=train.loader.actor_cpus, resource=train.loader.actor_resource
        )
        if train.loader.actors
        else build_loader(dataset, train.loader.processes)
    )
    return on_device(built, device, config.encoder.transform)
