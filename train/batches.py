"""A training worker's batches: from its settings to tensors on its device."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from lookalike.train.decoding import actor_batches
from lookalike.train.loader import Batch, BatchDataset, build_loader, on_device
from lookalike.train.settings import LoopConfig, TrainConfig
from lookalike.train.streams import Segment, build_streams
from lookalike.vision.transforms import build_augmentation


def worker_batches(
    config: LoopConfig, rank: int, world: int, start: int, history: Sequence[Segment] = (), *, origin: int = 0
) -> BatchDataset:
    """Worker ``rank``'s share of every batch from step ``start`` on.

    ``history``: what fewer or more workers read before step ``origin``; see ``close_segment``.
    """
    train = config.train
    files = {name: config.files[name] for name in train.mix}
    streams = build_streams(files, seed=train.seed, rank=rank, world=world, resample=train.resample,
                            balance=train.balance, history=history)  # fmt: skip
    augment = build_augmentation(config.encoder.transform, train.augment)
    return BatchDataset(streams, train.pictures(world), augment, seed=train.seed, start=start,
                        stop=config.total_steps, origin=origin, views=train.views,
                        num_classes=config.num_classes)  # fmt: skip


def feed(dataset: BatchDataset, config: LoopConfig, device: torch.device) -> Iterator[Batch]:
    """The dataset's batches on ``device``, images normalised, decoded where the settings say."""
    train = config.train
    built: Iterable[Batch] = (
        actor_batches(dataset, train.decode_actors, num_cpus=train.decode_cpus, resource=train.decode_resource)
        if train.decode_actors else build_loader(dataset, train.loader_processes)
    )  # fmt: skip
    return on_device(built, device, config.encoder.transform)


def close_segment(
    history: Sequence[Segment], train: TrainConfig, world: int, steps: int,
    marks: Sequence[Mapping[str, tuple[int, int]]] = (),
) -> list[Segment]:  # fmt: skip
    """``history`` with the stretch in which ``world`` workers did ``steps`` steps, which another number continues.

    ``marks``: ``BatchDataset.marks`` of each worker, by rank, at its end; without, they are computed again.
    """
    if steps == 0:
        return list(history)
    rows = {name: steps * count for name, count in train.pictures(world).items()}
    places = {name: [mark[name] for mark in marks] for name in rows} if marks else {}
    return [*history, Segment(world=world, rows=rows, marks=places)]
