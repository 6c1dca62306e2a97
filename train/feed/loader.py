"""Batches from training shards: shuffled by epoch, resampled by repeat factor, mixed over datasets, addressed by step.

The trainer plans: a step's plan names the slices of row groups it reads (``streams``), without touching a pixel. Anyone
builds: a batch is a pure function of its plan, so the trainer's own process, processes beside it, or actors anywhere in
the cluster (``decoding``) make the same bytes, and a run that resumes reads what the undisturbed run would have read.
Pixels stay uint8 until they are on the device, where they are normalised (``on_device``).

Ray Data's ``streaming_split`` would feed trainers too, but gives a row to whoever asks first and forgets its place when
the worker group restarts; plans are exact on resume, whatever died. Their price: a row group is read again by every
builder that makes one of its batches, and a slow worker's row groups are not handed to a fast one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lookalike.errors import ArtifactError, LookalikeError
from lookalike.seeds import derive_seed
from lookalike.train.feed.draws import Draw, Light
from lookalike.train.feed.streams import Slice, Stream
from lookalike.train.feed.units import REMEDY, Unit, read_unit, split_attributes
from lookalike.train.tasks import ATTRIBUTE
from lookalike.vision.images import ImageError, decode
from lookalike.vision.transforms import TransformConfig, normalize_pixels

Batch = dict[str, Any]
"""``images`` uint8 [n, 3, H, W] channels-last (float32 once on the device); ``labels`` int64 [n, K] padded with -1;
``category``, ``group``, the attributes that tasks read (``attribute.colour``) and ``row``, int64 [n], the last one
unique over the workers' pictures of a step; ``ids``, a list of image ids. With two views of a picture all columns are
repeated whole: row n + i is row i's other view."""

Augment = Callable[[Image.Image], Image.Image]


class Plan(NamedTuple):
    """What the batch of a step is made from."""

    step: int
    slices: list[Slice]


class BatchBuilder:
    """Makes batches from plans; holds the row group read last of each dataset."""

    def __init__(
        self,
        draws: Mapping[str, Draw],
        augment: Augment,
        *,
        seed: int,
        rank: int,
        views: int = 1,
        num_classes: Mapping[str, int] | None = None,
        attributes: Sequence[str] = (),
    ) -> None:
        self.draws, self.augment = dict(draws), augment
        self.seed, self.rank, self.views, self.num_classes = seed, rank, views, dict(num_classes or {})
        self.attributes, self.stated = tuple(attributes), attribute_fields(self.num_classes)
        self._held: dict[str, tuple[Unit, pa.Table, Light | None]] = {}

    def build(self, plan: Plan) -> Batch:
        """The batch of a plan. Damaged shards raise ``ArtifactError`` naming file, row group, image and remedy."""
        tables = [(piece.unit, self._read(piece)) for piece in plan.slices]
        pictures = (picture for unit, table in tables for picture in open_pictures(unit, table))
        with torch.random.fork_rng(devices=[]):  # the trainer's own random state, its GPU's too, stays as it is
            torch.default_generator.manual_seed(derive_seed(self.seed, "augment", self.rank, plan.step))
            pixels = [[np.asarray(self.augment(picture)) for _ in range(self.views)] for picture in pictures]
        n = len(pixels)
        columns = {
            "row": torch.arange(self.rank * n, (self.rank + 1) * n),
            **label_columns([table for _, table in tables], self.stated),
        }
        ids = [image_id for _, table in tables for image_id in table["image_id"].to_pylist()]
        return {
            "images": torch.from_numpy(np.stack([each[v] for v in range(self.views) for each in pixels])).permute(
                0, 3, 1, 2
            ),
            **{name: column.repeat(self.views, *[1] * (column.ndim - 1)) for name, column in columns.items()},
            "ids": ids * self.views,
        }

    def attempt(self, plan: Plan) -> Batch | LookalikeError:
        """``build``, with an error of ours as a value: the transports would wrap it in traces of their own."""
        try:
            return self.build(plan)
        except LookalikeError as error:
            return error

    def _read(self, piece: Slice) -> pa.Table:
        draw = self.draws[piece.dataset]
        if piece.dataset not in self._held or self._held[piece.dataset][0] != piece.unit:
            table = split_attributes(piece.unit, read_unit(piece.unit), self.stated, self.attributes)
            check_labels(piece.unit, table, self.num_classes)
            self._held[piece.dataset] = piece.unit, table, draw.light(table) if draw.columns else None
        _, table, light = self._held[piece.dataset]
        rows = draw.order(piece.unit, piece.epoch, light)
        return table.take(pa.array(rows[piece.start : piece.stop]))


def open_pictures(unit: Unit, table: pa.Table) -> Iterator[Image.Image]:
    """The table's pictures, decoded; one that is damaged raises ``ArtifactError``."""
    for image_id, data in zip(table["image_id"], table["image"], strict=True):
        try:
            yield decode(data.as_py() or b"")
        except ImageError as error:
            raise ArtifactError(
                f"{unit.place}, image {image_id.as_py()!r}: {error.reason}, though the corpus accepted "
                f"it; if the file is damaged, {REMEDY}"
            ) from error


def attribute_fields(names: Iterable[str]) -> list[str]:
    """Those of some fields that are attributes."""
    return [name for name in names if name.startswith(ATTRIBUTE)]


def label_columns(tables: Sequence[pa.Table], stated: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """``labels`` int64 [n, K] padded with -1; ``category``, ``group`` and the attributes ``stated`` int64 [n]; of all
    rows."""
    labels = [known or [] for table in tables for known in table["labels"].to_pylist()]
    width = max(1, *(len(known) for known in labels))
    plain = {
        name: np.concatenate([pc.fill_null(table[name], -1).to_numpy() for table in tables])
        for name in ("category", "group", *stated)
    }
    return {
        "labels": torch.tensor([known + [-1] * (width - len(known)) for known in labels]),
        **{name: torch.from_numpy(values.astype(np.int64)) for name, values in plain.items()},
    }


def check_labels(unit: Unit, table: pa.Table, num_classes: Mapping[str, int]) -> None:
    """Raise ``ArtifactError`` for a label that is no class of ``classes.json``."""
    for field, classes in num_classes.items():
        lists = pa.types.is_list(table[field].type)
        values = pc.list_flatten(table[field]) if lists else table[field]
        wrong = values.filter(pc.or_(pc.greater_equal(values, classes), pc.less(values, 0 if lists else -1)))
        if len(wrong):
            column = f"'attributes', {field!r}," if field.startswith(ATTRIBUTE) else repr(field)
            raise ArtifactError(
                f"{unit.place}: column {column} holds {wrong[0].as_py()}, but classes.json has "
                f"{classes} classes (0 to {classes - 1}); {REMEDY}"
            )


class BatchDataset(IterableDataset[Batch]):
    """Batches ``start`` .. ``stop`` of a mixture of streams, made in this process.

    ``counts``: the pictures of each dataset in a batch.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        counts: Mapping[str, int],
        augment: Augment,
        *,
        seed: int,
        start: int,
        stop: int,
        views: int = 1,
        num_classes: Mapping[str, int] | None = None,
        attributes: Sequence[str] = (),
    ) -> None:
        self.streams, self.counts = dict(streams), dict(counts)
        self.start, self.stop = start, stop
        draws = {name: stream.draw for name, stream in streams.items()}
        self.builder = BatchBuilder(
            draws,
            augment,
            seed=seed,
            rank=next(iter(streams.values())).rank,
            views=views,
            num_classes=num_classes,
            attributes=attributes,
        )

    def plan(self, step: int) -> Plan:
        """What the batch of ``step`` is made from."""
        return Plan(
            step,
            [piece for name, count in self.counts.items() for piece in self.streams[name].slices(step * count, count)],
        )

    def plans(self) -> Iterator[Plan]:
        """The plans of all steps."""
        return (self.plan(step) for step in range(self.start, self.stop))

    def __iter__(self) -> Iterator[Batch]:
        return (self.builder.build(plan) for plan in self.plans())


class PlannedBatches(Dataset[Batch | LookalikeError]):
    """The builder as torch's loader processes want it: an item is the batch of a plan."""

    def __init__(self, builder: BatchBuilder) -> None:
        self.builder = builder

    def __getitem__(self, plan: Plan) -> Batch | LookalikeError:
        """See ``BatchBuilder.attempt``."""
        return self.builder.attempt(plan)


class Plans:
    """The plans of a dataset as torch's sampler: made as they are asked for, in the trainer's process."""

    def __init__(self, dataset: BatchDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Plan]:
        return self.dataset.plans()


def build_loader(dataset: BatchDataset, num_workers: int) -> Iterable[Batch]:
    """Batches in step order, built in ``num_workers`` processes beside this one, or in this one when there are none."""
    if num_workers == 0:
        return dataset
    loader = DataLoader(
        PlannedBatches(dataset.builder),
        batch_size=None,
        sampler=Plans(dataset),
        num_workers=num_workers,
        multiprocessing_context="spawn",
        collate_fn=as_it_is,
    )
    return raised(loader)


def as_it_is(batch: Any) -> Any:
    """The batch untouched; torch's own conversion would walk through its ids."""
    return batch


def raised(batches: Iterable[Batch | LookalikeError]) -> Iterator[Batch]:
    """The batches; an error among them is raised."""
    for batch in batches:
        if isinstance(batch, LookalikeError):
            raise batch
        yield batch


def on_device(batches: Iterable[Batch], device: torch.device, transform: TransformConfig) -> Iterator[Batch]:
    """Batches with their tensors on ``device`` and their images normalised there: uint8 travels, float32 does not."""
    for batch in batches:
        moved = {
            name: move(value, device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }
        yield {**moved, "images": normalize_pixels(moved["images"], transform)}


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``; to a GPU it goes through pinned memory, while the GPU computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
