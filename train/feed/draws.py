"""Which rows of a row group an epoch reads, and in which order: resampled, shuffled, or in runs of one class.

A draw depends on the seed, the epoch and the row group alone, so that whoever needs it makes it again.
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
from lookalike.train.feed.units import Unit

Rows = NDArray[np.int64]


class BalanceConfig(Config):
    """Batches with several pictures of a class, as metric learning needs them (NormSoftmax: 3 classes of 25)."""

    field: Literal["group", "category"] = "group"
    """Column whose value is the class; rows without one (-1) are left out."""
    samples: int = Field(4, ge=2, le=4096)
    """Pictures of a class that stand together in a batch."""


@dataclass(frozen=True)
class Light:
    """What a draw needs to know of the rows [n] of a unit."""

    keys: NDArray[np.uint64]
    repeat: NDArray[np.float32]
    classes: Rows | None


@dataclass(frozen=True)
class Draw:
    """How rows of one dataset are drawn."""

    seed: int
    resample: bool = True
    balance: BalanceConfig | None = None

    @property
    def columns(self) -> list[str]:
        """Columns of a shard that decide; none when every row is read once."""
        balanced = [self.balance.field] if self.balance else []
        return ["image_id", "repeat", *balanced] if self.resample or balanced else []

    def light(self, table: pa.Table) -> Light:
        """``columns`` of a unit's table as arrays."""
        classes = None
        if self.balance:
            classes = pc.fill_null(table[self.balance.field], -1).to_numpy().astype(np.int64)
        return Light(stable_keys(table["image_id"].to_pylist()), table["repeat"].to_numpy(), classes)

    def order(self, unit: Unit, epoch: int, light: Light | None) -> Rows:
        """Rows of ``unit`` that ``epoch`` reads, in order; ``light`` is None when ``columns`` is empty."""
        rows: Rows = np.arange(unit.num_rows)
        if self.resample:
            assert light is not None
            copies = round_repeats(light.repeat, light.keys, seed=self.seed, epoch=epoch)
            rows = np.repeat(rows, copies)
        generator = np.random.default_rng(derive_seed(self.seed, unit.uri.rsplit("/", 1)[-1], unit.row_group, epoch))
        rows = generator.permutation(rows)
        if self.balance is None:
            return rows
        assert light is not None
        assert light.classes is not None
        return arrange_runs(rows, light.classes[rows], self.balance.samples, generator)


def arrange_runs(rows: Rows, classes: Rows, samples: int, generator: np.random.Generator) -> Rows:
    """``rows`` [n], of ``classes`` [n] (below 0: none, left out), as runs of ``samples`` rows of one class.

    Copies of a row come as late in their class as they can. The last run of a class is filled up from the class's
    beginning, so a class with fewer rows repeats them (the copies are augmented apart). Runs of a class are spread
    evenly over the result, so that neighbours, which share a batch, are of as many classes as there are.
    """
    known = classes >= 0
    rows, classes = rows[known], classes[known]
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
    chosen: Rows = rows[starts[of_run[spread], None] + within % counts[of_run[spread], None]]
    return chosen.reshape(-1)


def _copy_numbers(rows: Rows) -> Rows:
    """How many equal values stand before each one."""
    order = np.argsort(rows, kind="stable")
    _, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
    numbers = np.empty_like(rows)
    numbers[order] = np.arange(len(rows)) - np.repeat(starts, counts)
    return numbers
