"""A dataset as endless streams of rows, one per worker, addressed by position.

Position -> (epoch, row group, rows) needs no pixels, only the size of each row group in an epoch. Sizes follow from the
footers or, for resampled and balanced datasets, from ids and repeat factors, which are read a few row groups ahead.
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
from lookalike.train.feed.draws import BalanceConfig, Draw, DrawColumns
from lookalike.train.feed.row_groups import RowGroup, list_row_groups, read_row_group

log = get_logger(__name__)
AHEAD = 16  # row groups whose sizes are read at a time
CACHED_ROWS = 1 << 20  # rows whose draw columns are kept: 20 bytes each


class Slice(NamedTuple):
    """Rows ``start`` .. ``stop`` of the order in which ``epoch`` reads ``row_group`` of ``dataset``."""

    dataset: str
    row_group: RowGroup
    epoch: int
    start: int
    stop: int


class Piece(NamedTuple):
    """A part of a row group, by its number, in an epoch.

    It is rows ``start`` .. ``stop`` of the file's; of the rows drawn it is the same part.
    """

    epoch: int
    row_group: int
    start: int
    stop: int


class RowGroupSizes:
    """Rows drawn of each row group in an epoch, cached, as are the draw columns of recent row groups."""

    def __init__(self, name: str, row_groups: Sequence[RowGroup], draw: Draw) -> None:
        self.name, self.row_groups, self.draw = name, row_groups, draw
        self.tally: Counter[str] = Counter()
        """Of balanced datasets: ``rows`` drawn, rows ``repeated``, and rows left out for ``no_class``."""
        self._sizes: dict[tuple[int, int], int] = {}
        self._columns: OrderedDict[int, DrawColumns] = OrderedDict()
        self._cached_rows = 0

    def bounds(self, piece: Piece) -> tuple[int, int]:
        """Where a piece begins and ends in the order in which its epoch reads the row group.

        No cut goes through a run of balanced rows.
        """
        return self.fetch([piece])[0]

    def fetch(self, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """``bounds`` of several pieces; their columns are read in parallel."""
        if self.draw.columns:
            new = {piece.row_group for piece in pieces if (piece.epoch, piece.row_group) not in self._sizes}
            if missing := new - self._columns.keys():
                with ThreadPoolExecutor(AHEAD) as pool:
                    self._columns.update(zip(missing, pool.map(self._read, missing), strict=True))
                self._cached_rows += sum(len(self._columns[number].keys) for number in missing)
            for piece in pieces:
                if (piece.epoch, piece.row_group) not in self._sizes:
                    self._sizes[piece.epoch, piece.row_group] = self._measure(piece)
            while self._cached_rows > CACHED_ROWS and len(self._columns) > 1:
                self._cached_rows -= len(self._columns.popitem(last=False)[1].keys)
        return [(self._cut(piece, piece.start), self._cut(piece, piece.stop)) for piece in pieces]

    def _cut(self, piece: Piece, row: int) -> int:
        rows = self.row_groups[piece.row_group].num_rows
        drawn = self._sizes[piece.epoch, piece.row_group] if self.draw.columns else rows
        run = self.draw.balance.samples if self.draw.balance else 1
        return drawn * row // (rows * run) * run

    def _read(self, number: int) -> DrawColumns:
        return self.draw.read(read_row_group(self.row_groups[number], self.draw.columns))

    def _measure(self, piece: Piece) -> int:
        columns = self._columns[piece.row_group]
        rows = self.draw.order(self.row_groups[piece.row_group], piece.epoch, columns)
        if columns.classes is not None:
            self.tally.update(
                rows=len(rows), repeated=len(rows) - len(set(rows.tolist())), no_class=int((columns.classes < 0).sum())
            )
        return len(rows)


def deal(name: str, seed: int, rows: Sequence[int], rank: int, world: int) -> Iterator[Piece]:
    """The endless pieces of stream ``rank`` of ``world``: every epoch permutes all row groups, of ``rows`` rows each,
    and deals them out in turn; those on the borders are parted, so that every stream has as many rows.

    Streams do not wait for each other at the end of an epoch.
    """
    for epoch in numbers():
        order = np.random.default_rng(derive_seed(seed, name, epoch)).permutation(len(rows))
        order = np.concatenate([order[i::world] for i in range(world)])
        sizes = np.asarray(rows)[order]
        ends = np.cumsum(sizes)
        starts, total = ends - sizes, int(ends[-1])
        low, high = total * rank // world, total * (rank + 1) // world
        for i in np.flatnonzero((ends > low) & (starts < high)):
            start, stop = max(low - starts[i], 0), min(high - starts[i], sizes[i])
            yield Piece(epoch, int(order[i]), int(start), int(stop))


class Stream:
    """Stream ``rank`` of ``world`` of one dataset."""

    def __init__(self, sizes: RowGroupSizes, seed: int, rank: int, world: int) -> None:
        self.name, self.row_groups, self.draw = sizes.name, sizes.row_groups, sizes.draw
        self.sizes, self.rank = sizes, rank
        self._share = deal(sizes.name, seed, [group.num_rows for group in sizes.row_groups], rank, world)
        self._pieces: list[Piece] = []  # one small entry per piece planned so far
        self._ends: list[int] = []
        self._reported = False

    def slices(self, position: int, count: int) -> list[Slice]:
        """The slices that hold rows ``position`` .. ``position + count`` of the stream."""
        self._extend(position + count)
        number, slices = bisect_right(self._ends, position), []
        while count:
            piece, end = self._pieces[number], self._ends[number]
            taken = min(count, end - position)
            if taken:
                stop = self.sizes.bounds(piece)[1] - (end - position) + taken
                slices.append(Slice(self.name, self.row_groups[piece.row_group], piece.epoch, stop - taken, stop))
            position, count, number = position + taken, count - taken, number + 1
        return slices

    def _extend(self, position: int) -> None:
        while not self._ends or self._ends[-1] < position:
            pieces = list(islice(self._share, AHEAD if self.draw.columns else 1))
            for piece, (start, stop) in zip(pieces, self.sizes.fetch(pieces), strict=True):
                self._pieces.append(piece)
                self._ends.append((self._ends[-1] if self._ends else 0) + stop - start)
            if len(self._ends) > 2 * len(self.row_groups) and self._ends[-1] == 0:
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
    """Stream ``rank`` of ``world`` of each dataset; raises ``UsageError`` as ``require_row_groups`` does."""
    streams = {}
    for name, uris in files.items():
        row_groups = tuple(row_group for row_group in list_row_groups(uris) if row_group.num_rows)
        require_row_groups(name, row_groups, world)
        sizes = RowGroupSizes(name, row_groups, Draw(seed, resample, (balance or {}).get(name)))
        streams[name] = Stream(sizes, seed, rank, world)
    return streams


def require_row_groups(name: str, row_groups: Sequence[RowGroup], world: int) -> None:
    """Raise ``UsageError`` if a dataset has no rows, or fewer row groups than workers."""
    if not any(row_group.num_rows for row_group in row_groups):
        raise UsageError(f"dataset {name!r} has no rows; leave it out of the mix, or check its corpus and labels")
    if len(row_groups) < world:
        raise UsageError(
            f"dataset {name!r} has {len(row_groups)} row groups for {world} workers; write shards with "
            "smaller shards.rows_per_group, or use fewer workers"
        )
