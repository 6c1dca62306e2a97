"""Faults of the disk at each system call of the write path: what was acknowledged stays, what was refused does not.

    python -m tests.trials.storage [--points 0] [--seed 1] [--fault NAME]

The same history of a service (writes, large ones, deletes, changes of its state, a backup, restarts) runs again and
again; each time one call fails: with an error, once, twice or from then on; on a full disk; in halves; with SIGKILL;
with a power cut that takes back what was not synced; with a sync that fails and loses its pages. Then the service
starts again and is compared with a model of what it acknowledged. ``--points`` takes a sample of the points; 0 all.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lookalike.errors import LookalikeError
from lookalike.serve.generations import database as module
from lookalike.serve.generations import reserve
from lookalike.serve.generations.database import Database, UncertainError
from lookalike.serve.generations.state import GenerationRef, State
from lookalike.serve.generations.write_record import WriteKind
from tests.trials import Row, print_rows
from tests.trials.disk import Disk, Fault, find_compiler, is_preloaded, memory_folder, preload

UPSERT, DELETE = WriteKind
Write = tuple[int, bytes]


def state_of(includes_writes: int) -> State:
    """A state whose generation includes the writes so far."""
    name = f"g{includes_writes}"
    ref = GenerationRef(
        name=name,
        index=f"/{name}",
        plan=None,
        encoder=None,
        model_fingerprint="m",
        num_rows=1,
        includes_writes=includes_writes,
    )
    return State(configured=("/i", None, "none"), held=(ref,), current=name)


@dataclass
class Model:
    """What the service said."""

    writes: list[Write] = field(default_factory=list)
    """Acknowledged, in order."""
    maybe: list[Write] = field(default_factory=list)
    """The last call, if it is not known whether it was stored: then all of it, or nothing."""
    states: list[State | None] = field(default_factory=lambda: [None])
    """The state; two if it is not known which."""

    def append(self, database: Database, writes: list[Write]) -> None:
        """Store writes, and take the outcome down."""
        before, self.maybe = self.maybe, writes  # which of them, if the process is killed, is told by `exec_line`
        try:
            database.append(writes)
        except UncertainError:
            raise
        except (LookalikeError, OSError):
            self.maybe = before
            raise
        self.writes += writes
        self.maybe = []

    def save(self, database: Database, state: State) -> None:
        """Store a state, and take the outcome down."""
        self.states.append(state)
        try:
            database.save_state(state)
        except UncertainError:
            raise
        except (LookalikeError, OSError):
            self.states.pop()
            raise
        self.states = [state]

    def check(self, database: Database) -> None:
        """Fail unless the database holds what was acknowledged, and nothing else."""
        database.check_complete()
        stored = [(record.kind, record.content) for record in database.read(database.first - 1)]
        possible = [self.writes, self.writes + self.maybe]
        assert database.last in [len(writes) for writes in possible], (
            f"{database.last}: {len(self.writes)} acknowledged"
        )
        assert stored in [writes[database.first - 1 :] for writes in possible], "other writes than acknowledged"
        state = database.load_state()
        assert state in self.states, f"state {state}, not one of {self.states}"
        self.writes, self.maybe, self.states = self.writes[: database.first - 1] + stored, [], [state]


def attempt(call: Callable[[], object]) -> None:
    """Do it, or be told why not in our own words."""
    with suppress(LookalikeError, OSError):
        call()


def serve(folder: Path, model: Model, disk: Disk) -> None:
    """One life of a service, whatever fails in it."""
    try:
        database = Database(str(folder), wait_s=0)
    except (LookalikeError, OSError):
        return
    try:
        attempt(lambda: work(database, model))
        for number in range(3):
            attempt(lambda: model.append(database, [(UPSERT, b"again %d" % number)]))  # noqa: B023
            if disk.is_dead:
                return
            attempt(lambda: model.append(database, [(DELETE, b"deleted %d" % number)]))  # noqa: B023
    finally:
        database.close()


def work(database: Database, model: Model) -> None:
    """The history."""
    database.check_complete()
    model.save(database, state_of(0))
    model.append(database, [(UPSERT, b"one")])
    model.append(database, [(UPSERT, b"portion %d" % number + bytes(3000)) for number in range(4)])
    model.append(database, [(DELETE, b"one")])
    model.save(database, state_of(len(model.writes)))
    model.append(database, [(UPSERT, b"large" + bytes(30_000))])
    target = database.path.with_name("backup")
    target.unlink(missing_ok=True)
    database.backup(str(target))
    model.append(database, [(UPSERT, b"two"), (UPSERT, b"three")])
    model.save(database, state_of(len(model.writes) - 1))


class Point(NamedTuple):
    """Which calls fail, and how; ``is_power_cut``: what was not synced may be lost then."""

    fault: Fault
    first: int
    count: int
    is_power_cut: bool = False

    @property
    def name(self) -> str:
        """The kind of fault."""
        times = {0: "from then on", 1: "once", 2: "twice"}[self.count]
        return f"{self.fault.name.lower()} {times}{', then a power cut' if self.is_power_cut else ''}"


def points_of(calls: int) -> Iterator[Point]:
    """Every fault at every call."""
    for first in range(1, calls + 1):
        for count in (1, 2, 0):
            yield Point(Fault.ERROR, first, count)
        for count in (1, 0):
            yield Point(Fault.FULL, first, count)
            yield Point(Fault.SYNC_LOSES, first, count, is_power_cut=count == 1)
        yield Point(Fault.SHORT, first, 1)
        yield Point(Fault.DONE_BUT_ERROR, first, 1)
        yield Point(Fault.DONE_BUT_ERROR, first, 2, is_power_cut=True)
        yield Point(Fault.KILLED, first, 1)
        yield Point(Fault.DEAD, first, 1)
        for _ in range(2):
            yield Point(Fault.DEAD, first, 1, is_power_cut=True)


def play(point: Point, seed: int) -> str:
    """Run the history with one fault, start again and compare; return the call that failed."""
    folder = Path(tempfile.mkdtemp(dir=memory_folder()))
    disk, model = Disk(folder), Model()
    try:
        first_life(folder, model)
        disk.count_as_synced()
        disk.arm(point.first, point.count, point.fault)
        if point.fault == Fault.KILLED:
            model = _killed(folder, model, disk)
        else:
            serve(folder, model, disk)
        call = disk.last_call
        if point.fault == Fault.FULL and not point.count:
            check_start(folder, model)  # also while the disk is full
        if point.is_power_cut:
            disk.die()
        disk.disarm()
        if point.is_power_cut:
            disk.lose_unsynced(random.Random(seed))
        check_start(folder, model)
        check_start(folder, model)
        return call
    finally:
        disk.disarm()
        disk.stop()
        shutil.rmtree(folder)


def first_life(folder: Path, model: Model) -> None:
    """A service that was there before, and was closed."""
    database = Database(str(folder), wait_s=0)
    model.save(database, state_of(0))
    model.append(database, [(UPSERT, b"old"), (DELETE, b"older")])
    database.close()


def _killed(folder: Path, model: Model, disk: Disk) -> Model:
    """The same in a process that is killed; it tells what it is about to do, and what was done."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        _tell(model, writing)
        serve(folder, model, disk)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    for line in told.split(b"\n")[:-1]:
        exec_line(model, line)
    return model


def _tell(model: Model, pipe: int) -> None:
    append, save = model.append, model.save

    def told_append(database: Database, writes: list[Write]) -> None:
        text = b",".join(b"%d:%s" % (kind, content.hex().encode()) for kind, content in writes)
        os.write(pipe, b"begin %s\n" % text)
        try:
            append(database, writes)
        except UncertainError:
            raise
        except (LookalikeError, OSError):
            os.write(pipe, b"refused\n")
            raise
        os.write(pipe, b"done\n")

    def told_save(database: Database, state: State) -> None:
        os.write(pipe, b"save %d\n" % state.includes_writes)
        try:
            save(database, state)
        except UncertainError:
            raise
        except (LookalikeError, OSError):
            os.write(pipe, b"unsaved\n")
            raise
        os.write(pipe, b"saved\n")

    model.append, model.save = told_append, told_save  # type: ignore[method-assign]


def exec_line(model: Model, line: bytes) -> None:
    """Take down what the killed process told."""
    word, _, rest = line.partition(b" ")
    if word == b"begin":
        pairs = (part.split(b":") for part in rest.split(b","))
        model.maybe = [(int(kind), bytes.fromhex(content.decode())) for kind, content in pairs]
    elif word in (b"done", b"refused"):
        model.writes += model.maybe if word == b"done" else []
        model.maybe = []
    elif word == b"save":
        model.states.append(state_of(int(rest)))
    elif word == b"unsaved":
        model.states.pop()
    elif word == b"saved":
        model.states = model.states[-1:]


def check_start(folder: Path, model: Model) -> None:
    """A service that starts finds all that was acknowledged, and goes on, unless the disk is full."""
    database = Database(str(folder), wait_s=0)
    try:
        model.check(database)
        attempt(lambda: model.append(database, [(UPSERT, b"next")]))
        attempt(lambda: model.append(database, [(DELETE, b"next")]))
        model.check(database)
    finally:
        database.close()


def num_calls() -> int:
    """Calls of the history when nothing fails; fails if they do not succeed."""
    folder = Path(tempfile.mkdtemp(dir=memory_folder()))
    disk, model = Disk(folder), Model()
    first_life(folder, model)
    before = disk.calls
    serve(folder, model, disk)
    calls = disk.calls - before
    disk.stop()
    assert len(model.writes) == 17, len(model.writes)
    check_start(folder, model)
    shutil.rmtree(folder)
    return calls


def run(points: int, seed: int, fault: str = "") -> Iterator[Row]:
    """A row for each kind of fault, or for one."""
    module.KEPT_WRITES, reserve.RESERVE_BYTES = 2, 1 << 16
    calls = num_calls()
    all_points = [point for point in points_of(calls) if not fault or point.fault.name.lower() == fault]
    if points and points < len(all_points):
        all_points = random.Random(seed).sample(all_points, points)
    failures: dict[str, list[str]] = {}
    kinds: Counter[str] = Counter(point.name for point in all_points)
    met: Counter[str] = Counter()
    for number, point in enumerate(all_points):
        try:
            met[play(point, seed + number)] += 1
        except Exception as error:  # noqa: BLE001  # the row says it
            where = traceback.extract_tb(error.__traceback__)[-1]
            failures.setdefault(point.name, []).append(f"{point}: {error!r} at {where.name}:{where.lineno}")
    for kind, num in sorted(kinds.items()):
        wrong = failures.get(kind, [])
        seen = f"{num - len(wrong)} of {num} points" + (f"; {wrong[0][:700]}" if wrong else "")
        yield Row(kind, "acknowledged writes are there after a start, refused ones are not", seen, not wrong)
    yield Row(
        "points", "every call that changes files is met", f"{len(all_points)} of {calls} calls: {dict(met)}", True
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault", default="", help="only this one, such as full")
    options = parser.parse_args()
    if not is_preloaded():
        if find_compiler() is None:
            print("there is no C compiler to build the disk that fails")
            return 2
        return preload("tests.trials.storage", sys.argv[1:]).returncode
    return 0 if print_rows("storage", run(options.points, options.seed, options.fault)) else 1


if __name__ == "__main__":
    sys.exit(main())
