"""The write path as a machine: random histories of a writer, followers and a disk that fails, against a model.

    python -m tests.trials.machine [--num 1000] [--seed 1] [--plant NAME]

Rules write, delete, compact, switch and roll back; end and start writer and followers; let calls fail, the disk be
full, the process be killed and the power be cut; put older copies, flipped bits and cut files in the place of the real
ones. The model is what was acknowledged. ``--plant`` breaks the service in one of the ways of ``plants.py``, or one
after the other in ``all``: then the machine must find it, and the exit code is 0 if it does.
"""

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from lookalike.errors import ArtifactError, LookalikeError
from lookalike.serve.generations import acknowledged
from lookalike.serve.generations.database_files import FILE
from lookalike.serve.generations.follower import Follower
from lookalike.serve.generations.state import GenerationRef
from lookalike.serve.generations.write_record import WriteKind
from lookalike.serve.generations.writer import Writer
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.telemetry import get_logger
from tests.serve.generations.following import Handle
from tests.trials.disk import Disk, Fault, find_compiler, is_preloaded, memory_folder, preload
from tests.trials.plants import PLANTS
from tests.trials.simulation import MODEL, Index, Member, Rows, SimulatedLoop, World, apply, simulate

T = TypeVar("T")
UPSERT, DELETE = WriteKind
IDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3, unique=True)
CALLS = st.integers(1, 12)
SEEDS = st.integers(0, 1 << 16)
CHUNK = 1000
"""Histories of one run of hypothesis, which remembers what it has tried."""
FAULTS = (Fault.ERROR, Fault.SHORT, Fault.DONE_BUT_ERROR, Fault.SYNC_LOSES)


class Model:
    """What the service said: the writes, and which index answers."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []
        self.maybe: list[tuple[int, bytes]] = []
        """Of the last call, of which it is not known whether it was stored."""
        self.current = {"i0"}
        """More than one if it is not known."""

    def rows(self, index: Index, writes: list[tuple[int, bytes]]) -> Rows:
        """What is to be found when ``index`` answers."""
        rows = dict(index.rows)
        for kind, content in writes[index.includes :]:
            apply(rows, kind, content)
        return rows

    def check(self, current: str, index: Index, found: Rows) -> None:
        """Fail unless all that was acknowledged is found, and nothing else."""
        assert current in self.current, f"{current} answers, not one of {self.current}"
        possible = [self.rows(index, self.writes), self.rows(index, self.writes + self.maybe)]
        assert found in possible, f"{found}, not {possible[0]}"

    def settle(self, last: int) -> None:
        """Learn how many writes there are."""
        assert last in (len(self.writes), len(self.writes + self.maybe)), f"{last} writes, not {len(self.writes)}"
        self.writes, self.maybe = (self.writes + self.maybe)[:last], []


class WritePath(RuleBasedStateMachine):
    """The rules."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=memory_folder()))
        self.disk, self.model, self.loop = Disk(self.folder), Model(), SimulatedLoop()
        self.world = World({"i0": Index({"a": b"0000"}), "i1": Index({"b": b"1111"})})
        self.simulation = simulate(self.loop, self.world)
        self.config = ServeConfig(
            index="i0", encoder="none", writes=Writes(state=str(self.folder), compact_rows=None, keep_hours=None)
        )
        self.handle = Handle(None)
        self.members: list[Member] = []
        self.tasks: list[Follower] = []
        self.copy: tuple[dict[str, bytes], int] | None = None
        """Files as they once were, and the number of writes then."""
        self.value = 0
        self.is_armed = False

    @initialize()
    def begin(self) -> None:
        self._start()

    def teardown(self) -> None:
        try:
            self.disk.disarm()
            self._end_followers()
            if self.handle.target is not None:
                self.handle.target.close()
        finally:
            self.simulation.close()
            self.loop.close()
            self.disk.stop()
            shutil.rmtree(self.folder)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 4000))

    @property
    def writer(self) -> Writer:
        writer: Writer = self.handle.target
        return writer

    def _start(self) -> None:
        writer = Writer(self.config, self.world.read_generation("i0", None))
        self.handle.target = writer
        status = pb.StatusResponse.FromString(self._do(writer.status()))
        self.model.settle(status.last_write)
        assert status.current in self.model.current, f"{status.current} answers, not one of {self.model.current}"
        self.model.current = {status.current}
        self._check()

    def _check(self) -> None:
        """Compare what every follower finds, after the time that news may take."""

        async def wait() -> None:
            await asyncio.sleep(5)

        self._do(wait())
        if self.handle.target is None or self.is_armed:
            return
        for member in [*self.members, self._fresh()]:
            index = self.world.indexes[self._uri(member.current)]
            self.model.check(member.current, index, member.held[member.current].rows)

    def _uri(self, name: str) -> str:
        return name if name in self.world.indexes else f"/{name}"

    def _fresh(self) -> Member:
        """A member that follows now, once."""
        member = Member(self.world)
        follower = Follower(member, self.handle, role="fresh", drain_s=1)  # type: ignore[arg-type]
        self._do(follower.start())
        assert follower._task is not None  # noqa: SLF001
        self._end_follower(follower)
        return member

    def _write(self, kind: int, contents: list[bytes], *, is_staged: bool) -> None:
        writes, was_dead = [(kind, content) for content in contents], self.disk.is_dead
        try:
            if kind == DELETE:
                self._do(self.writer.delete(contents[0]))
            elif is_staged:
                for place, content in enumerate(contents[:-1]):
                    self._do(self.writer.stage("u", place, content))
                self._do(self.writer.upsert(contents[-1], "u", len(contents) - 1))
            else:
                self._do(self.writer.upsert(contents[0]))
        except (LookalikeError, OSError) as error:
            if "may be kept" in str(error) or (self.disk.is_dead and not was_dead):
                self.model.maybe = writes
            if not self.is_armed:
                raise AssertionError("refused without a fault") from error
            return
        self.model.writes += writes
        self.model.maybe = []

    def _upsert(self, ids: list[str], size: int) -> bytes:
        self.value += 1
        rows = [pb.Row(id=each, vector=self.value.to_bytes(4, "big") * size) for each in ids]
        return bytes(pb.UpsertRequest(rows=rows, model_fingerprint=MODEL).SerializeToString())

    running = precondition(lambda self: self.handle.target is not None)
    healthy = precondition(lambda self: not self.is_armed)

    @running
    @rule(ids=IDS, size=st.sampled_from([1, 1, 500, 3000]))
    def upsert(self, ids: list[str], size: int) -> None:
        self._write(UPSERT, [self._upsert(ids, size)], is_staged=False)

    @running
    @rule(ids=IDS, num=st.integers(2, 4))
    def upsert_in_portions(self, ids: list[str], num: int) -> None:
        self._write(UPSERT, [self._upsert(ids, 300) for _ in range(num)], is_staged=True)

    @running
    @rule(ids=IDS)
    def delete(self, ids: list[str]) -> None:
        self._write(DELETE, [pb.DeleteRequest(ids=ids).SerializeToString()], is_staged=False)

    @running
    @rule(what=st.sampled_from(["compact", "rollback", "i0", "i1"]))
    def move(self, what: str) -> None:
        request = pb.SwitchRequest(index=what, encoder="none").SerializeToString()
        moves = {"compact": lambda: self.writer.compact(0), "rollback": self.writer.rollback}
        known = set(self.world.indexes)
        try:
            answer = self._do(moves.get(what, lambda: self.writer.switch(request))())
        except (LookalikeError, OSError):
            made = {uri.strip("/") for uri in set(self.world.indexes) - known}
            state = self.writer._state  # noqa: SLF001
            if self.is_armed:  # it may have been stored, and answer after the next start
                held = {ref.name for ref in state.held}
                self.model.current |= made | held | ({what} if what in known else set())
            else:
                assert state.current in self.model.current, "refused, and yet another index answers"
            return
        self.model.current = {GenerationRef(**_fields(answer)).name}

    @running
    @healthy
    @rule()
    def follow(self) -> None:
        if len(self.members) < 2:
            member = Member(self.world)
            follower = Follower(member, self.handle, role="shard", drain_s=1)  # type: ignore[arg-type]
            self._do(follower.start())
            self.members.append(member)
            self.tasks.append(follower)

    @rule()
    def end_followers(self) -> None:
        self._end_followers()

    def _end_followers(self) -> None:
        for follower in self.tasks:
            self._end_follower(follower)
        self.members, self.tasks = [], []

    def _end_follower(self, follower: Follower) -> None:
        """Its replica is gone, and the writer has noticed."""
        task = follower._task  # noqa: SLF001
        assert task is not None
        task.cancel()
        self.loop.run_until_complete(asyncio.wait([task]))
        if self.handle.target is not None:
            self.writer._followers._status.pop(follower._id, None)  # noqa: SLF001

    @rule(first=CALLS, count=st.integers(0, 2), fault=st.sampled_from(FAULTS))
    def fail(self, first: int, count: int, fault: Fault) -> None:
        self.disk.arm(first, count, fault)
        self.is_armed = True

    @rule(first=CALLS)
    def fill(self, first: int) -> None:
        self.disk.arm(first, 0, Fault.FULL)
        self.is_armed = True

    @rule(first=CALLS)
    def will_die(self, first: int) -> None:
        self.disk.arm(first, 1, Fault.DEAD)
        self.is_armed = True

    @rule()
    def heal(self) -> None:
        if self.disk.is_dead:
            self._end()
        self.disk.disarm()
        self.is_armed = False
        self._restart()

    def _restart(self) -> None:
        if self.handle.target is None:
            self._start()
        else:
            self._check()

    def _end(self) -> None:
        if self.handle.target is not None:
            self.handle.target.close()
            self.handle.target = None

    @rule()
    def close(self) -> None:
        self._end()

    @precondition(lambda self: self.handle.target is None)
    @rule()
    def start(self) -> None:
        try:
            self._start()
        except (LookalikeError, OSError) as error:
            if not self.is_armed:
                raise AssertionError("a start that fails without a fault") from error

    @rule(luck=SEEDS, is_power_cut=st.booleans())
    def crash(self, luck: int, is_power_cut: bool) -> None:
        self.disk.die()
        self._end()
        self.disk.disarm()
        self.is_armed = False
        if is_power_cut:
            self.disk.lose_unsynced(random.Random(luck))
        self._start()

    @running
    @healthy
    @rule(is_closed=st.booleans())
    def take_copy(self, is_closed: bool) -> None:
        if is_closed:
            self._end()
        self.copy = self._files(), len(self.model.writes)
        if is_closed:
            self._start()

    def _files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.name not in ("lock", "reserve")}

    def _put(self, files: dict[str, bytes]) -> None:
        for path in self.folder.iterdir():
            if path.name not in ("lock", "reserve"):
                path.unlink()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
        self.disk.count_as_synced()

    def _expect_refusal_or_all(self, files: dict[str, bytes]) -> None:
        """Start from files that are not as they were: it is refused, or nothing is missing. Then put them back."""
        good = self._files()
        self._put(files)
        self._end_followers()
        before = self.model.writes, self.model.maybe, self.model.current
        with suppress(ArtifactError):
            self._start()
        self.model.writes, self.model.maybe, self.model.current = before
        self._end()
        self._put(good)
        self._start()

    @healthy
    @rule(luck=SEEDS, is_killed=st.booleans(), what=st.sampled_from(["flip", "cut", "old", "gone"]))
    def damage(self, luck: int, is_killed: bool, what: str) -> None:
        self.disk.die() if is_killed else None
        self._end()
        self.disk.disarm()
        rng, files = random.Random(luck), self._files()
        name = rng.choice(sorted(name for name in files if files[name]))
        content = bytearray(files[name])
        place = rng.randrange(len(content))
        if what == "flip":
            content[place] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del content[place:]
        elif what == "old" and self.copy is not None and name in self.copy[0]:
            start = place // 512 * 512
            content[start : start + 512] = self.copy[0][name][start : start + 512].ljust(
                len(content[start : start + 512]), b"\0"
            )
        damaged = files | {name: bytes(content)}
        if what == "gone" and name != acknowledged.FILE:
            del damaged[name]
        self._expect_refusal_or_all(damaged)

    @healthy
    @precondition(lambda self: self.copy is not None)
    @rule()
    def start_from_an_old_copy(self) -> None:
        assert self.copy is not None
        self._end()
        self._expect_refusal_or_all(
            self._files() | {name: self.copy[0][name] for name in self.copy[0] if "acknowl" not in name}
        )

    @running
    @healthy
    @precondition(lambda self: self.copy is not None)
    @rule(in_place=st.booleans(), ids=IDS)
    def replace_under_the_service(self, in_place: bool, ids: list[str]) -> None:
        """What was put in the place of the files takes no write, unless it is all the same."""
        assert self.copy is not None
        if in_place and self.copy[1] == len(self.model.writes):
            return
        aside = {name: (self.folder / name).read_bytes() for name in (FILE, f"{FILE}-wal")}
        for name in aside:
            path = self.folder / name
            if not in_place:
                path.rename(self.folder / f"{name}.aside")
            path.write_bytes(self.copy[0].get(name, b""))
            os.utime(path, (1, 1))
        with suppress(LookalikeError, OSError):
            self._do(self.writer.upsert(self._upsert(ids, 1)))
            raise AssertionError("a write into files that no start will find was acknowledged")
        for name in aside:
            if not in_place:
                (self.folder / f"{name}.aside").rename(self.folder / name)
        self._end_followers()
        self.disk.die()
        self._end()
        self.disk.disarm()
        for name, content in aside.items():
            (self.folder / name).write_bytes(content)
        self._start()

    @running
    @healthy
    @rule(ids=IDS)
    def go_back_while_followers_run(self, ids: list[str]) -> None:
        """An operator restores an older copy, and has it accepted: followers that know more are not passed over."""
        self.follow()
        old = self._files()
        self.upsert(ids, 1)
        self._check()
        self._end()
        good = self._files()
        self._put({name: content for name, content in old.items() if name != acknowledged.FILE})
        self.handle.target = Writer(self.config, self.world.read_generation("i0", None))

        async def late() -> None:
            await asyncio.sleep(5)
            await self.writer.upsert(self._upsert(ids, 1))

        with suppress(LookalikeError):
            self._do(late())
            raise AssertionError("a write that followers pass over was acknowledged")
        self._end_followers()
        self._end()
        self._put(good)
        self._start()

    @running
    @healthy
    @rule(ids=IDS, first=st.integers(1, 6), fault=st.sampled_from(FAULTS), luck=SEEDS, is_power_cut=st.booleans())
    def fail_once_and_crash(self, ids: list[str], first: int, fault: Fault, luck: int, is_power_cut: bool) -> None:
        self.fail(first, 1, fault)
        self.upsert(ids, 1)
        self.crash(luck, is_power_cut)


def _fields(message: bytes) -> dict[str, Any]:
    generation = pb.Generation.FromString(message)
    return {
        "name": generation.name,
        "index": generation.index,
        "plan": None,
        "encoder": None,
        "model_fingerprint": generation.model_fingerprint,
        "num_rows": generation.num_rows,
        "includes_writes": generation.includes_writes,
    }


def play(num: int, start: int, *, plant: str = "") -> None:
    """Run ``num`` histories; raises for one that contradicts the model, in its shortest form."""
    phases = [Phase.generate] if plant else [Phase.generate, Phase.shrink]
    wanted = settings(
        max_examples=num,
        stateful_step_count=12,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(seed(start)(WritePath), settings=wanted)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1000, help="histories")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plant", default="", choices=["", "all", *PLANTS], help="break the service, to see it found")
    options = parser.parse_args()
    if not is_preloaded():
        if find_compiler() is None:
            print("there is no C compiler to build the disk that fails")
            return 2
        return preload("tests.trials.machine", sys.argv[1:]).returncode
    get_logger("lookalike").setLevel("CRITICAL")
    if not options.plant:
        for done in range(0, options.num, CHUNK):
            play(min(CHUNK, options.num - done), options.seed + done)
            print(f"{min(done + CHUNK, options.num)} histories", flush=True)
        return 0
    names = list(PLANTS) if options.plant == "all" else [options.plant]
    return 0 if all([find(name, options.num, options.seed) for name in names]) else 1


def find(plant: str, num: int, start: int) -> bool:
    """Whether the machine finds a planted fault in ``num`` histories."""
    with PLANTS[plant]():
        try:
            play(num, start, plant=plant)
        except Exception as error:  # noqa: BLE001  # whatever shows it
            print(f"{plant}: found: {type(error).__name__} {str(error)[:150]!r}", flush=True)
            return True
    print(f"{plant}: not found in {num} histories", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
