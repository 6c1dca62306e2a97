"""Batches from training shards: shuffled by epoch, resampled by repeat factor, mixed over datasets, resumable by step.

Every random choice derives from the seed, the dataset, the epoch and the step, so a run that resumes at step s reads
exactly the batches that the undisturbed run would have read. Encoded bytes travel; pixels are decoded last.

A shard's row group is the unit that is shuffled, handed to a worker and held in memory; shards were shuffled globally
when they were written.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.sampling import round_repeats, stable_keys
from lookalike.seeds import derive_seed
from lookalike.vision.images import decode
from lookalike.vision.transforms import Transform


@dataclass(frozen=True)
class Unit:
    """One row group of one shard file."""

    uri: str
    row_group: int
    num_rows: int


def list_units(uris: Sequence[str]) -> list[Unit]:
    """All row groups of parquet files, in file order."""
    units = []
    for uri in uris:
        filesystem, path = storage.arrow_filesystem(uri)
        meta = pq.read_metadata(path, filesystem=filesystem)
        units += [Unit(uri, i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)]
    return units


def read_unit(unit: Unit, columns: list[str] | None = None) -> pa.Table:
    """The rows of a unit."""
    filesystem, path = storage.arrow_filesystem(unit.uri)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        return file.read_row_group(unit.row_group, columns=columns)


@dataclass(frozen=True)
class Stream:
    """One dataset's endless stream of rows for one of ``world`` workers."""

    name: str
    units: tuple[Unit, ...]
    seed: int
    rank: int
    world: int
    resample: bool = True

    def rows(self, start: int = 0) -> Iterator[tuple[pa.Table, int]]:
        """(unit's table, row) pairs from position ``start`` on, epoch after epoch."""
        epoch, skip = 0, start
        while True:
            for unit in self._units_of(epoch):
                order = self._order(epoch, unit)
                if skip >= len(order):
                    skip -= len(order)
                    continue
                table = read_unit(unit)
                for row in order[skip:]:
                    yield table, int(row)
                skip = 0
            epoch += 1

    def _units_of(self, epoch: int) -> list[Unit]:
        generator = np.random.default_rng(derive_seed(self.seed, self.name, epoch))
        order = generator.permutation(len(self.units))
        return [self.units[i] for i in order[self.rank :: self.world]]

    def _order(self, epoch: int, unit: Unit) -> npt.NDArray[np.int64]:
        light = read_unit(unit, ["image_id", "repeat"])
        rows: npt.NDArray[np.int64] = np.arange(light.num_rows)
        if self.resample:
            keys = stable_keys(light["image_id"].to_pylist())
            copies = round_repeats(light["repeat"].to_numpy(), keys, seed=self.seed, epoch=epoch)
            rows = np.repeat(rows, copies)
        generator = np.random.default_rng(derive_seed(self.seed, unit.uri.rsplit("/", 1)[-1], unit.row_group, epoch))
        return generator.permutation(rows)


def build_streams(
    files: Mapping[str, Sequence[str]], *, seed: int, rank: int, world: int, resample: bool
) -> dict[str, Stream]:
    """A stream per dataset; raises ``UsageError`` when a dataset has fewer row groups than workers."""
    streams = {}
    for name, uris in files.items():
        units = tuple(list_units(uris))
        require_units(name, units, world)
        streams[name] = Stream(name, units, seed, rank, world, resample)
    return streams


def require_units(name: str, units: Sequence[Unit], world: int) -> None:
    """Raise ``UsageError`` when a dataset has fewer row groups than workers."""
    if len(units) < world:
        raise UsageError(f"dataset {name!r} has {len(units)} row groups for {world} workers; write shards with "
                         "smaller shards.rows_per_group, or use fewer workers")  # fmt: skip


def split_batch(batch_size: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Rows of each dataset in every batch: ``batch_size`` shared out by weight, largest remainders rounded up."""
    total = sum(mix.values())
    exact = {name: batch_size * weight / total for name, weight in mix.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: batch_size - sum(counts.values())]:
        counts[name] += 1
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise UsageError(f"batch_size {batch_size} leaves no row for {empty}; raise it or the dataset's weight in mix")
    return counts


class BatchDataset(IterableDataset[dict[str, torch.Tensor]]):
    """Batches ``start`` .. ``stop`` of a mixture of streams; decoding and augmentation happen here."""

    def __init__(
        self, streams: Mapping[str, Stream], counts: Mapping[str, int], transform: Transform, *, seed: int,
        start: int, stop: int,
    ) -> None:  # fmt: skip
        self.streams, self.counts, self.transform = dict(streams), dict(counts), transform
        self.seed, self.start, self.stop = seed, start, stop

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rows = {name: stream.rows(self.start * self.counts[name]) for name, stream in self.streams.items()}
        rank = next(iter(self.streams.values())).rank
        for step in range(self.start, self.stop):
            picked = [pair for name, count in self.counts.items() for pair in islice(rows[name], count)]
            if (step - self.start) % workers != worker:
                continue  # another loader process builds this batch
            torch.manual_seed(derive_seed(self.seed, "augment", rank, step))
            yield collate(picked, self.transform)


def collate(rows: Sequence[tuple[pa.Table, int]], transform: Transform) -> dict[str, torch.Tensor]:
    """Images [n, 3, H, W] float32, labels [n, K] int64 padded with -1, category [n] and group [n] int64."""
    images = torch.stack([transform(decode(table["image"][row].as_py())) for table, row in rows])
    labels = [table["labels"][row].as_py() or [] for table, row in rows]
    width = max(1, *(len(known) for known in labels))
    return {
        "images": images.contiguous(memory_format=torch.channels_last),
        "labels": torch.tensor([known + [-1] * (width - len(known)) for known in labels]),
        "category": torch.tensor([table["category"][row].as_py() for table, row in rows]),
        "group": torch.tensor([table["group"][row].as_py() for table, row in rows]),
    }


def build_loader(dataset: BatchDataset, num_workers: int) -> "DataLoader[dict[str, torch.Tensor]]":
    """A torch loader over ready batches, in step order whatever the number of loader processes."""
    return DataLoader(dataset, batch_size=None, num_workers=num_workers,
                      multiprocessing_context="spawn" if num_workers else None)  # fmt: skip
