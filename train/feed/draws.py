"""Which rows of a row group an epoch reads, and in which order: resampled, shuffled, or in runs of one class.

A draw depends only on seed, epoch and row group, so that every process can make it again.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from lookalike.config import Config
from lookalike.sampling import round_repeats, stable_keys
from lookalike.seeds import derive_seed
from lookalike.train.feed.row_groups import RowGroup

Rows = NDArray[np.int64]


class BalanceConfig(Config):
    """Batches with several pictures per class, as metric learning needs them (NormSoftmax: 3 classes of 25)."""

    field: Literal["group", "category"] = "group"
    """Column whose value is the class; rows without one (-1) are left out."""
    samples: int = Field(4, ge=2, le=4096)
    """Pictures of one class in a row within a batch."""


@dataclass(frozen=True)
class DrawColumns:
    """Columns that decide a draw, for the rows [n] of a row group."""

    keys: NDArray[np.uint64]
    repeat: NDArray[np.float32]
    classes: Rows | None


@dataclass(frozen=True)
class Draw:
    """Resampling, balance and seed of one dataset."""

    seed: int
    resample: bool = True
    balance: BalanceConfig | None = None

    @property
    def columns(self) -> list[str]:
        """Columns of a shard that decide the draw; none if every row is read once."""
        balanced = [self.balance.field] if self.balance else []
        return ["image_id", "repeat", *balanced] if self.resample or balanced else []

    def read(self, table: pa.Table) -> DrawColumns:
        """``columns`` of a row group's table as arrays."""
        classes = None
        if self.balance:
            classes = pc.fill_null(table[self.balance.field], -1).to_numpy().astype(np.int64)
        return DrawColumns(stable_keys(table["image_id"].to_pylist()), table["repeat"].to_numpy(), classes)

    def order(self, row_group: RowGroup, epoch: int, columns: DrawColumns | None) -> Rows:
        """Rows of ``row_group`` that ``epoch`` reads, in order; ``columns`` is None if no column decides."""
        rows: Rows = np.arange(row_group.num_rows)
        if self.resample:
            assert columns is not None
            copies = round_repeats(columns.repeat, columns.keys, seed=self.seed, epoch=epoch)
            rows = np.repeat(rows, copies)
        file = row_group.uri.rsplit("/", 1)[-1]
        generator = np.random.default_rng(derive_seed(self.seed, file, row_group.number, epoch))
        rows = generator.permutation(rows)
        if self.balance is None:
            return rows
        assert columns is not None
        assert columns.classes is not None
        return arrange_runs(rows, columns.classes[rows], self.balance.samples, generator)


def arrange_runs(rows: Rows, classes: Rows, samples: int, generator: np.random.Generator) -> Rows:
    """``rows`` [n] of ``classes`` [n] as runs of ``samples`` rows of one class; rows of a class below 0 are left out.

    Copies of a row come as late in their class as possible. The last run of a class is filled up from the class's
    beginning, so a class with fewer rows repeats them (each copy is augmented anew). Runs of a class are spread evenly
    over the result, so that neighbours, which share a batch, are of many classes.
    """
    labelled = classes >= 0
    rows, classes = rows[labelled], classes[labelled]
    if len(rows) == 0:
        return rows
    order = np.lexsort((_copy_numbers(rows), classes))  # stable: within a copy number the random order stays
    rows, classes = rows[order], classes[order]
    _, starts, counts = np.unique(classes, return_index=True, return_counts=True)
    runs = -(-counts // samples)
    of_run = np.repeat(np.arange(len(counts)), runs)  # class of each run
    number = np.arange(len(of_run)) - np.repeat(np.cumsum(runs) - runs, runs)  # of the run within its class
    spread = np.argsort((number + generator.random(len(of_run))) / runs[of_run], kind="stable")
    within = number[spread, None] * samples + np.arange(samples)
    runs_of_rows: Rows = rows[starts[of_run[spread], None] + within % counts[of_run[spread], None]]
    return runs_of_rows.reshape(-1)


def _copy_numbers(rows: Rows) -> Rows:
    """Number of equal values before each value."""
    order = np.argsort(rows, kind="stable")
    _, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
    numbers = np.empty_like(rows)
    numbers[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    return numbers
