"""Progress of long work: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from tqdm import tqdm

from lookalike.telemetry import printable

T = TypeVar("T")


def progress_bar(description: str, total: int | None, unit: str = "it") -> "tqdm[None]":
    """A bar that the caller updates; use it as a context manager."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=printable(description),
        unit=unit,
        file=sys.stderr,
        mininterval=0.2 if interactive else 10.0,
        maxinterval=10.0,
        ascii=not interactive,
        dynamic_ncols=interactive,
        leave=True,
    )


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield ``items`` and show how many have passed."""
    with progress_bar(description, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


POLL_S = 2.0


class _Position:
    """Progress of remote work: a Ray actor that workers update and the driver reads."""

    def __init__(self) -> None:
        self._position: tuple[int, str] = (0, "")

    def update(self, done: int, text: str = "") -> None:
        self._position = (done, text)

    def add(self, count: int) -> None:
        self._position = (self._position[0] + count, self._position[1])

    def read(self) -> tuple[int, str]:
        return self._position


@contextmanager
def follow_remote(description: str, total: int, unit: str = "it") -> Iterator[Any]:
    """Show the progress of work that runs on a cluster.

    Yields an actor handle; one worker calls ``handle.update.remote(done, text)``, or all call
    ``handle.add.remote(count)``. The driver draws the bar. If the actor's node is lost the bar stops, but the work does
    not fail.
    """
    import ray

    actor: Any = ray.remote(num_cpus=0)(_Position).remote()
    stop = threading.Event()

    def show(bar: "tqdm[None]") -> None:
        with suppress(ray.exceptions.RayError):
            done, text = ray.get(actor.read.remote(), timeout=POLL_S)
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)

    def follow(bar: "tqdm[None]") -> None:
        while not stop.wait(POLL_S):
            show(bar)

    with progress_bar(description, total, unit) as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        thread.start()
        try:
            yield actor
        finally:
            stop.set()
            thread.join()
            show(bar)
            ray.kill(actor)
