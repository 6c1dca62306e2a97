"""Batches from training shards: shuffled by epoch, resampled by repeat factor, mixed over datasets, addressed by step.

The trainer plans: a step's plan names the slices of row groups it reads (``streams``), without touching a pixel. Any
process can build: a batch is a pure function of its plan, so the trainer's own process, processes beside it, or actors
anywhere in the cluster (``decoding``) make the same bytes, and a resumed run reads the batches of an undisturbed run.
Pixels stay uint8 until they are on the device, where they are normalised (``move_images``).

Ray Data's ``streaming_split`` could feed trainers too, but it hands rows out in the order of requests and forgets its
place when the worker group restarts; plans are exact on resume. Their price: every builder that makes a batch of a row
group reads the row group again, and a slow worker's row groups are not handed to a fast one.
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
from lookalike.train.feed.draws import Draw, DrawColumns
from lookalike.train.feed.mixture import Mixture
from lookalike.train.feed.row_groups import REMEDY, RowGroup, read_row_group, split_attributes
from lookalike.train.feed.streams import Slice, Stream
from lookalike.train.tasks import ATTRIBUTE
from lookalike.vision.images import ImageError, decode
from lookalike.vision.transforms import TransformConfig, normalize_pixels

Batch = dict[str, Any]
"""``images`` uint8 [n, 3, H, W] channels-last (float32 once on the device); ``labels`` int64 [n, K] padded with -1;
``category``, ``group``, the attributes that tasks read (``attribute.colour``) and ``row``, int64 [n]; ``row`` is a
picture's own number, the same wherever the picture stands twice. ``ids``: a list of image ids. ``place``: stream and
number of the batch; what a task draws depends on them, not on the worker that computes it. With two views of a picture
all columns are repeated as a whole: row n + i is the other view of row i."""

Augment = Callable[[Image.Image], Image.Image]


class BatchPlan(NamedTuple):
    """The slices that make up the batch of a step."""

    step: int
    slices: list[Slice]


class _LoadedRowGroup(NamedTuple):
    row_group: RowGroup
    table: pa.Table
    columns: DrawColumns | None


class BatchBuilder:
    """Makes batches from plans; keeps the last row group of each dataset in memory."""

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
        self._last: dict[str, _LoadedRowGroup] = {}

    def build(self, plan: BatchPlan) -> Batch:
        """The batch of a plan; damaged shards raise ``ArtifactError`` naming file, row group, image and remedy."""
        tables = [(piece.row_group, self._read(piece)) for piece in plan.slices]
        pictures = (picture for row_group, table in tables for picture in open_pictures(row_group, table))
        with torch.random.fork_rng(devices=[]):  # leaves the trainer's own random state alone
            torch.default_generator.manual_seed(derive_seed(self.seed, "augment", self.rank, plan.step))
            pixels = [[np.asarray(self.augment(picture)) for _ in range(self.views)] for picture in pictures]
        images = np.stack([each[v] for v in range(self.views) for each in pixels])
        ids = [image_id for _, table in tables for image_id in table["image_id"].to_pylist()]
        names = [
            piece.dataset for piece, (_, table) in zip(plan.slices, tables, strict=True) for _ in range(len(table))
        ]
        columns = {
            "row": torch.tensor([derive_seed(0, *picture) for picture in zip(names, ids, strict=True)]),
            **label_columns([table for _, table in tables], self.stated),
        }
        return {
            "images": torch.from_numpy(images).permute(0, 3, 1, 2),
            **{name: column.repeat(self.views, *[1] * (column.ndim - 1)) for name, column in columns.items()},
            "ids": ids * self.views,
            "place": (self.rank, plan.step),
        }

    def attempt(self, plan: BatchPlan) -> Batch | LookalikeError:
        """``build``, with a ``LookalikeError`` returned: loader processes and Ray would wrap a raised one in traces."""
        try:
            return self.build(plan)
        except LookalikeError as error:
            return error

    def _read(self, piece: Slice) -> pa.Table:
        draw = self.draws[piece.dataset]
        loaded = self._last.get(piece.dataset)
        if loaded is None or loaded.row_group != piece.row_group:
            table = split_attributes(piece.row_group, read_row_group(piece.row_group), self.stated, self.attributes)
            check_labels(piece.row_group, table, self.num_classes)
            loaded = _LoadedRowGroup(piece.row_group, table, draw.read(table) if draw.columns else None)
            self._last[piece.dataset] = loaded
        rows = draw.order(piece.row_group, piece.epoch, loaded.columns)
        return loaded.table.take(pa.array(rows[piece.start : piece.stop]))


def open_pictures(row_group: RowGroup, table: pa.Table) -> Iterator[Image.Image]:
    """Decode the table's pictures; a damaged picture raises ``ArtifactError``."""
    for image_id, data in zip(table["image_id"], table["image"], strict=True):
        try:
            yield decode(data.as_py() or b"")
        except ImageError as error:
            raise ArtifactError(
                f"{row_group.place}, image {image_id.as_py()!r}: {error.reason}, though the corpus accepted "
                f"it; if the file is damaged, {REMEDY}"
            ) from error


def attribute_fields(names: Iterable[str]) -> list[str]:
    """The names that are attributes."""
    return [name for name in names if name.startswith(ATTRIBUTE)]


def label_columns(tables: Sequence[pa.Table], stated: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """``labels`` int64 [n, K] padded with -1; ``category``, ``group`` and the attributes ``stated``, int64 [n]."""
    labels = [row or [] for table in tables for row in table["labels"].to_pylist()]
    width = max(1, *(len(row) for row in labels))
    plain = {
        name: np.concatenate([pc.fill_null(table[name], -1).to_numpy() for table in tables])
        for name in ("category", "group", *stated)
    }
    return {
        "labels": torch.tensor([row + [-1] * (width - len(row)) for row in labels]),
        **{name: torch.from_numpy(values.astype(np.int64)) for name, values in plain.items()},
    }


def check_labels(row_group: RowGroup, table: pa.Table, num_classes: Mapping[str, int]) -> None:
    """Raise ``ArtifactError`` for a label that is not a class of ``classes.json``."""
    for field, classes in num_classes.items():
        lists = pa.types.is_list(table[field].type)
        values = pc.list_flatten(table[field]) if lists else table[field]
        wrong = values.filter(pc.or_(pc.greater_equal(values, classes), pc.less(values, 0 if lists else -1)))
        if len(wrong):
            column = f"'attributes', {field!r}," if field.startswith(ATTRIBUTE) else repr(field)
            raise ArtifactError(
                f"{row_group.place}: column {column} holds {wrong[0].as_py()}, but classes.json has "
                f"{classes} classes (0 to {classes - 1}); {REMEDY}"
            )


class BatchDataset(IterableDataset[Batch]):
    """Batches ``start`` .. ``stop`` of a mixture of streams, made in this process.

    ``lead``: passes of the mixture before the first batch. Streams that have leads of their own together keep its
    shares in every step, not each for itself.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        mixture: Mixture,
        augment: Augment,
        *,
        seed: int,
        start: int,
        stop: int,
        lead: int = 0,
        views: int = 1,
        num_classes: Mapping[str, int] | None = None,
        attributes: Sequence[str] = (),
    ) -> None:
        self.streams, self.mixture, self.lead = dict(streams), mixture, lead
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

    def plan(self, step: int) -> BatchPlan:
        number = self.lead + step
        places, counts = self.mixture.between(self.lead, number), self.mixture.between(number, number + 1)
        return BatchPlan(step, [s for name in counts for s in self.streams[name].slices(places[name], counts[name])])

    def plans(self) -> Iterator[BatchPlan]:
        return (self.plan(step) for step in range(self.start, self.stop))

    def __iter__(self) -> Iterator[Batch]:
        return (self.builder.build(plan) for plan in self.plans())


class PlannedBatches(Dataset[Batch | LookalikeError]):
    """The builder as a torch dataset, whose items are batches and whose indices are plans."""

    def __init__(self, builder: BatchBuilder) -> None:
        self.builder = builder

    def __getitem__(self, plan: BatchPlan) -> Batch | LookalikeError:
        return self.builder.attempt(plan)


class Plans:
    """The plans of a dataset as a torch sampler, which makes them one by one in the trainer's process."""

    def __init__(self, dataset: BatchDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[BatchPlan]:
        return self.dataset.plans()


def build_loader(dataset: BatchDataset, processes: int) -> Iterable[Batch]:
    """Batches in step order, built in ``processes`` beside this one; 0 builds them here."""
    if processes == 0:
        return dataset
    loader = DataLoader(
        PlannedBatches(dataset.builder),
        batch_size=None,
        sampler=Plans(dataset),
        num_workers=processes,
        multiprocessing_context="spawn",
        collate_fn=keep_batch,
    )
    return raise_errors(loader)


def keep_batch(batch: Any) -> Any:
    """The batch unchanged; torch's own conversion would walk through its ids."""
    return batch


def raise_errors(batches: Iterable[Batch | LookalikeError]) -> Iterator[Batch]:
    """Pass batches on, and raise an error among them."""
    for batch in batches:
        if isinstance(batch, LookalikeError):
            raise batch
        yield batch


def move_labels(batch: Batch, device: torch.device) -> Batch:
    """The batch with all columns but the images on ``device``."""
    return {
        name: move(value, device) if isinstance(value, torch.Tensor) and name != "images" else value
        for name, value in batch.items()
    }


def move_images(batch: Batch, device: torch.device, transform: TransformConfig) -> Batch:
    """The batch with its images on ``device``, normalised there, so that pixels travel as uint8."""
    return {**batch, "images": normalize_pixels(move(batch["images"], device), transform)}


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``; the copy to a GPU goes through pinned memory, while the GPU computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
