"""A writer and its followers in a simulated world: a clock that jumps, indexes that are dicts, no threads, no Ray.

The writer, its log and database, and the followers are the real ones; indexes, compaction and searches are not.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from lookalike.serve.generations import adoption, compaction, database, follower, followers, reserve, staging, writer
from lookalike.serve.generations.generation import Generation
from lookalike.serve.generations.write_record import WriteRecord
from lookalike.serve.proto import retrieval_pb2 as pb

Rows = dict[str, bytes]
MODEL = "m"
THREAD_S = 0.001
"""Time that work in a thread takes."""


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer when nothing else is to be done; threads are calls."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            assert self._scheduled, "nothing is to be done, and somebody waits"  # type: ignore[attr-defined]
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> Any:
        future = self.create_future()
        try:
            result = func(*args)
        except Exception as error:  # noqa: BLE001  # as a future does
            self.call_later(THREAD_S, lambda error=error: future.cancelled() or future.set_exception(error))
        else:
            self.call_later(THREAD_S, lambda: future.cancelled() or future.set_result(result))
        return future


def apply(rows: Rows, kind: int, content: bytes) -> None:
    """Take a write into ``rows``."""
    message = WriteRecord(0, kind, content).message
    if isinstance(message, pb.UpsertRequest):
        rows |= {row.id: row.vector for row in message.rows}
    else:
        for image_id in message.ids:
            rows.pop(image_id, None)


@dataclass
class Opened:
    """An index in a follower."""

    rows: Rows
    last: int


class Member:
    """What a replica answers with."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.held: dict[str, Opened] = {}
        self.current = ""

    def open(self, generation: Generation) -> Opened:
        index = self._world.indexes[generation.index]
        return Opened(dict(index.rows), index.includes)

    def apply(self, opened: Opened, records: Sequence[WriteRecord]) -> None:
        for record in records:
            if record.number > opened.last:
                assert record.number == opened.last + 1, "a write was passed over"
                apply(opened.rows, record.kind, record.content)
                opened.last = record.number

    def add(self, generation: Generation, opened: Opened) -> None:
        self.held[generation.name] = opened

    def drop(self, name: str) -> None:
        self.held.pop(name, None)

    def switch(self, name: str) -> None:
        self.current = name


@dataclass
class Index:
    """Rows, and the last write among them."""

    rows: Rows
    includes: int = 0


@dataclass
class World:
    """Indexes by URI."""

    indexes: dict[str, Index] = field(default_factory=dict)

    def read_generation(
        self, index: str, plan: Any, encoder: str = "none", *, includes_writes: int = 0, check: bool = True
    ) -> Any:
        """In the place of the function of that name."""
        meta = SimpleNamespace(generation=index.strip("/"), model_fingerprint=MODEL, num_live=1)
        return Generation(index, None, None, meta, None, self.indexes[index].includes)  # type: ignore[arg-type]

    def held_writes(self, index: str, folder: str) -> int:
        """In the place of the function of that name."""
        return self.indexes[index].includes

    async def compact(self, index: str, records: Sequence[WriteRecord], folder: str) -> str:
        """In the place of a compaction as a Ray task."""
        rows = dict(self.indexes[index].rows)
        for record in records:
            apply(rows, record.kind, record.content)
        uri = f"/compacted-{records[-1].number}-{len(self.indexes)}"
        self.indexes[uri] = Index(rows, records[-1].number)
        await asyncio.sleep(1)
        return uri


def simulate(loop: SimulatedLoop, world: World) -> ExitStack:
    """Put the world in the place of clock, indexes and compaction, until the stack is closed."""
    clock = SimpleNamespace(monotonic=loop.time, time_ns=lambda: int(loop.time() * 1e9), time=loop.time)
    clock.sleep = lambda seconds: None
    replaced: Iterable[tuple[Any, str, Any]] = (
        (writer, "time", clock),
        (followers, "time", clock),
        (staging, "time", clock),
        (writer, "read_generation", world.read_generation),
        (follower, "read_generation", world.read_generation),
        (writer, "held_writes", world.held_writes),
        (adoption, "held_writes", world.held_writes),
        (adoption, "find_damage", lambda index: ""),
        (writer, "compact_in_task", world.compact),
        (writer, "read_where", lambda index: {}),
        (compaction, "read_where", lambda index: {}),
        (writer, "Gauge", lambda *_: SimpleNamespace(set=lambda *_: None)),
        (writer, "Counter", lambda *_: SimpleNamespace(inc=lambda *_: None)),
        (database, "KEPT_WRITES", 2),
        (reserve, "RESERVE_BYTES", 1 << 14),
    )
    stack = ExitStack()
    for module, name, value in replaced:
        stack.enter_context(patch.object(module, name, value))
    return stack
