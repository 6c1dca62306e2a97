"""A dataset as an endless stream of rows for each worker, addressed by position.

Position -> (epoch, unit, rows) needs no pixels and no row but the sizes that units have in an epoch. Those follow from
the footers, or, for resampled and balanced datasets, from ids and repeat factors, which are read a few units ahead.
"""

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count as numbers
from itertools import islice
from typing import NamedTuple

import numpy as np

from lookalike.errors import UsageError
from lookalike.seeds import derive_seed
from lookalike.telemetry import fields, get_logger
from lookalike.train.feed.draws import BalanceConfig, Draw, Light
from lookalike.train.feed.units import Unit, list_units, read_unit

log = get_logger(__name__)
AHEAD = 16  # units whose sizes are read at a time
CACHED_ROWS = 1 << 20  # rows whose light columns are kept: 20 bytes each


class Slice(NamedTuple):
    """Rows ``start`` .. ``stop`` of the order in which ``epoch`` reads ``unit`` of ``dataset``."""

    dataset: str
    unit: Unit
    epoch: int
    start: int
    stop: int


class Piece(NamedTuple):
    """A unit, by its number, in an epoch."""

    epoch: int
    unit: int


class UnitSizes:
    """Rows that a unit has in an epoch, remembered; light columns of recent units are kept."""

    def __init__(self, name: str, units: Sequence[Unit], draw: Draw) -> None:
        self.name, self.units, self.draw = name, units, draw
        self.tally: Counter[str] = Counter()
        """Of balanced datasets: ``rows`` of the orders made, those ``repeated``, and rows left out for ``no_class``."""
        self._sizes: dict[tuple[int, int], int] = {}
        self._lights: OrderedDict[int, Light] = OrderedDict()
        self._kept = 0

    def __call__(self, piece: Piece) -> int:
        """Rows of the piece's whole unit in its epoch."""
        if not self.draw.columns:
            return self.units[piece.unit].num_rows
        return self._sizes.get((piece.epoch, piece.unit)) or self.fetch([piece])[0]

    def fetch(self, pieces: Sequence[Piece]) -> list[int]:
        """Sizes of several pieces; what must be read for them is read side by side."""
        if self.draw.columns:
            missing = {p.unit for p in pieces if (p.epoch, p.unit) not in self._sizes and p.unit not in self._lights}
            with ThreadPoolExecutor(AHEAD) as pool:
                for number, light in zip(missing, pool.map(self._read, missing), strict=True):
                    self._keep(number, light)
            for piece in pieces:
                if (piece.epoch, piece.unit) not in self._sizes:
                    self._sizes[piece.epoch, piece.unit] = self._measure(piece)
            while self._kept > CACHED_ROWS and len(self._lights) > 1:
                self._kept -= len(self._lights.popitem(last=False)[1].keys)
            return [self._sizes[piece.epoch, piece.unit] for piece in pieces]
        return [self(piece) for piece in pieces]

    def _read(self, number: int) -> Light:
        return self.draw.light(read_unit(self.units[number], self.draw.columns))

    def _keep(self, number: int, light: Light) -> None:
        self._lights[number] = light
        self._kept += len(light.keys)

    def _measure(self, piece: Piece) -> int:
        light = self._lights[piece.unit]
        rows = self.draw.order(self.units[piece.unit], piece.epoch, light)
        if light.classes is not None:
            self.tally.update(
                rows=len(rows), repeated=len(rows) - len(set(rows.tolist())), no_class=int((light.classes < 0).sum())
            )
        return len(rows)


def deal(name: str, seed: int, num_units: int, rank: int, world: int) -> Iterator[Piece]:
    """The endless list of pieces of stream ``rank`` of ``world``: every epoch permutes all units anew and deals them
    out in turn; streams do not wait for each other at its end."""
    for epoch in numbers():
        order = np.random.default_rng(derive_seed(seed, name, epoch)).permutation(num_units)
        yield from (Piece(epoch, int(unit)) for unit in order[rank::world])


class Stream:
    """One dataset's endless stream of rows, the ``rank``-th of ``world``."""

    def __init__(self, sizes: UnitSizes, seed: int, rank: int, world: int) -> None:
        self.name, self.units, self.draw = sizes.name, sizes.units, sizes.draw
        self.sizes, self.rank = sizes, rank
        self._share = deal(sizes.name, seed, len(sizes.units), rank, world)
        self._pieces: list[Piece] = []  # one small entry a row group read: the part of a run that was planned
        self._ends: list[int] = []
        self._reported = False

    def slices(self, position: int, count: int) -> list[Slice]:
        """Where rows ``position`` .. ``position + count`` of the stream are."""
        self._extend(position + count)
        number, found = bisect_right(self._ends, position), []
        while count:
            piece, end = self._pieces[number], self._ends[number]
            taken = min(count, end - position)
            if taken:
                stop = self.sizes(piece) - (end - position) + taken
                found.append(Slice(self.name, self.units[piece.unit], piece.epoch, stop - taken, stop))
            position, count, number = position + taken, count - taken, number + 1
        return found

    def _extend(self, position: int) -> None:
        while not self._ends or self._ends[-1] < position:
            pieces = list(islice(self._share, AHEAD if self.draw.columns else 1))
            for piece, size in zip(pieces, self.sizes.fetch(pieces), strict=True):
                self._pieces.append(piece)
                self._ends.append((self._ends[-1] if self._ends else 0) + size)
            if len(self._ends) > 2 * len(self.units) and self._ends[-1] == 0:
                reason = f"a {self.draw.balance.field}" if self.draw.balance else "a repeat factor above 0"
                raise UsageError(
                    f"dataset {self.name!r} has no row with {reason}; leave it out of the mix"
                    + (" or out of balance" if self.draw.balance else "")
                )
            self._report()

    def _report(self) -> None:
        tally = self.sizes.tally
        if self._reported or not tally:
            return
        self._reported = True
        log.info("balance %s", fields(dataset=self.name, **tally))
        if tally["repeated"] * 2 > tally["rows"]:
            assert self.draw.balance
            log.warning(
                "balance %s",
                fields(
                    dataset=self.name,
                    repeated=f"{tally['repeated']} of {tally['rows']} rows",
                    why=f"row groups hold few rows of a {self.draw.balance.field}",
                    remedy=f"write shards with together: {self.draw.balance.field}",
                ),
            )


def build_streams(
    files: Mapping[str, Sequence[str]],
    *,
    seed: int,
    rank: int,
    world: int,
    resample: bool,
    balance: Mapping[str, BalanceConfig] | None = None,
) -> dict[str, Stream]:
    """Stream ``rank`` of ``world`` of each dataset.

    Raises ``UsageError`` when a dataset has no rows, or fewer row groups than streams.
    """
    streams = {}
    for name, uris in files.items():
        units = tuple(unit for unit in list_units(uris) if unit.num_rows)
        require_units(name, units, world)
        sizes = UnitSizes(name, units, Draw(seed, resample, (balance or {}).get(name)))
        streams[name] = Stream(sizes, seed, rank, world)
    return streams


def require_units(name: str, units: Sequence[Unit], world: int) -> None:
    """Raise ``UsageError`` when a dataset has no rows, or fewer row groups than workers."""
    if not any(unit.num_rows for unit in units):
        raise UsageError(f"dataset {name!r} has no rows; leave it out of the mix, or look at its corpus and labels")
    if len(units) < world:
        raise UsageError(
            f"dataset {name!r} has {len(units)} row groups for {world} workers; write shards with "
            "smaller shards.rows_per_group, or use fewer workers"
        )


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
