"""Who reads which row group when: epochs dealt to workers, and dealt again when the number of workers changes.

Nothing here reads a file: a schedule is arithmetic over numbers of row groups, the same on every machine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice, takewhile, zip_longest
from typing import NamedTuple

import numpy as np

from lookalike.seeds import derive_seed


class Piece(NamedTuple):
    """The rows of a unit in an epoch, from ``offset`` of their order on."""

    epoch: int
    unit: int
    offset: int


class Mark(NamedTuple):
    """How far a worker has read its share: ``piece`` pieces, and the next one up to ``offset`` of its unit's order."""

    piece: int
    offset: int


START = Mark(0, 0)
Sizes = Callable[[Piece], int]
"""Rows of a piece's whole unit in its epoch (from offset 0)."""


@dataclass(frozen=True)
class Schedule:
    """The order of a dataset's units for ``world`` workers, epoch after epoch.

    Every epoch permutes all units anew and deals them out in turn; workers do not wait for each other at its end.
    """

    name: str
    seed: int
    num_units: int
    world: int
    rests: tuple[tuple[Piece, ...], ...] = ()
    """What earlier workers left unread of the epochs they were in: dealt before anything else, an epoch at a time."""
    epoch: int = 0
    """First epoch that is dealt as a whole."""

    def share(self, rank: int, start: Mark = START) -> Iterator[Piece]:
        """The endless list of pieces of worker ``rank``, from ``start`` on."""
        rest = islice(self._share(rank), start.piece, None)
        first = next(rest)
        return chain([first._replace(offset=max(first.offset, start.offset))], rest)

    def _share(self, rank: int) -> Iterator[Piece]:
        for pieces in self.rests:
            yield from pieces[rank :: self.world]
        for epoch in count(self.epoch):
            order = np.random.default_rng(derive_seed(self.seed, self.name, epoch)).permutation(self.num_units)
            yield from (Piece(epoch, int(unit), 0) for unit in order[rank :: self.world])

    def advance(self, rank: int, start: Mark, rows: int, sizes: Sizes) -> Mark:
        """The mark of worker ``rank`` after ``rows`` rows beyond ``start``."""
        for number, piece in enumerate(self.share(rank, start), start.piece):
            left = sizes(piece) - piece.offset
            if rows < left:
                return Mark(number, piece.offset + rows)
            rows -= max(left, 0)
        raise AssertionError("a share is endless")

    def resize(self, marks: Sequence[Mark], world: int) -> "Schedule":
        """The schedule of ``world`` workers that go on where ``self.world`` workers stand.

        What is unread of every epoch that somebody had begun is dealt out first, so the workers together read each
        epoch's rows exactly as often as one undisturbed worker would.
        """
        assert len(marks) == self.world
        last = max(self.epoch - 1, *(next(self.share(rank, mark)).epoch for rank, mark in enumerate(marks)))
        unread = [list(takewhile(lambda piece: piece.epoch <= last, self.share(rank, mark)))
                  for rank, mark in enumerate(marks)]  # fmt: skip
        turns = [piece for turn in zip_longest(*unread) for piece in turn if piece is not None]
        epochs = sorted({piece.epoch for piece in turns})
        rests = tuple(tuple(piece for piece in turns if piece.epoch == epoch) for epoch in epochs)
        return replace(self, world=world, rests=rests, epoch=last + 1)
