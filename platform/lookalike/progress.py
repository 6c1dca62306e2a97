"""Progress of long work: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress_bar(description: str, total: int | None, unit: str = "it") -> "tqdm[None]":
    """A bar to update by hand; use it as a context manager."""
    interactive = sys.stderr.isatty()
    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, mininterval=0.2 if interactive else 10.0,
                maxinterval=10.0, ascii=not interactive, dynamic_ncols=interactive, leave=True)


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield ``items`` while showing how many have passed."""
    with progress_bar(description, total, unit) as bar:
        for item in items:
            yield item
            bar.update()
