"""The database of writes: what was acknowledged is there after any crash, and damage is told."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lookalike.errors import ArtifactError, LookalikeError, UsageError
from lookalike.serve.generations import database as module
from lookalike.serve.generations.database import Database
from lookalike.serve.generations.database_files import FILE
from lookalike.serve.generations.state import GenerationRef, State
from lookalike.serve.generations.write_log import WriteLog
from lookalike.serve.generations.write_record import WriteKind
from lookalike.serve.proto import retrieval_pb2 as pb

UPSERT, DELETE = WriteKind
WAL = FILE + "-wal"


def contents(database: Database, after: int = 0) -> list[tuple[int, int, bytes]]:
    return [tuple(record) for record in database.read(after)]


def numbers(database: Database, after: int = 0) -> list[int]:
    return [record.number for record in database.read(after)]


def reopened(folder: Path) -> list[tuple[int, int, bytes]]:
    """What the next service finds in ``folder``."""
    database = Database(str(folder), wait_s=0)
    try:
        return contents(database)
    finally:
        database.close()


def state_of(includes_writes: int) -> State:
    ref = GenerationRef(
        name="g",
        index="/i",
        plan=None,
        encoder=None,
        model_fingerprint="m",
        num_rows=1,
        includes_writes=includes_writes,
    )
    return State(configured=("/i", None, "none"), held=(ref,), current="g")


def copy_of(folder: Path, target: Path, *names: str) -> Path:
    """A copy of the files ``names``, as a restored folder."""
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(folder / name, target / name)
    return target


def test_writes_come_back_in_order(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    assert (database.last, contents(database)) == (0, [])
    assert database.append([(UPSERT, b"a"), (DELETE, b"")]) == 2
    assert database.append([(UPSERT, b"b" * 1000)]) == 3
    wanted = [(1, UPSERT, b"a"), (2, DELETE, b""), (3, UPSERT, b"b" * 1000)]
    assert contents(database) == wanted
    assert contents(database, after=2) == wanted[2:]
    database.close()
    assert sorted(os.listdir(tmp_path)) == ["acknowledged", "lock", "reserve", FILE]
    again = Database(str(tmp_path))
    assert (again.last, contents(again)) == (3, wanted)
    assert again.append([(DELETE, b"c")]) == 4


def test_the_state_comes_back_with_the_writes_that_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_WRITES", 2)
    database = Database(str(tmp_path))
    assert database.load_state() is None
    database.append([(UPSERT, b"x")] * 9)
    database.save_state(state_of(4))
    assert (database.first, numbers(database, after=4)) == (5, [5, 6, 7, 8, 9])
    database.save_state(state_of(9))
    assert (database.first, database.last) == (8, 9)  # the newest stay
    database.close()
    again = Database(str(tmp_path))
    assert (again.first, again.last, again.load_state()) == (8, 9, state_of(9))
    with pytest.raises(ArtifactError, match=r"write 1 is missing.*restore it from a backup"):
        again.read()


def after_a_crash(folder: Path, *batches: Sequence[tuple[int, bytes]]) -> Path:
    """A folder as ``kill -9`` leaves it after ``batches`` were acknowledged; its write-ahead log holds them."""
    database = Database(str(folder / "live"))
    for batch in batches:
        database.append(batch)
    copy_of(folder / "live", folder / "killed", FILE, WAL)
    database.close()
    return folder / "killed"


@pytest.mark.parametrize("cut", [1, 25, 4000, 4119, 4121, 8240])
def test_a_write_cut_by_a_crash_is_dropped(tmp_path: Path, cut: int) -> None:
    short = (after_a_crash(tmp_path / "a", [(UPSERT, b"first")]) / WAL).stat().st_size
    folder = after_a_crash(tmp_path / "b", [(UPSERT, b"first")], [(UPSERT, b"second" * 1000)])
    assert short + cut < (folder / WAL).stat().st_size
    os.truncate(folder / WAL, short + cut)
    database = Database(str(folder))
    assert contents(database) == [(1, UPSERT, b"first")]
    assert database.append([(UPSERT, b"third")]) == 2
    database.close()
    assert reopened(folder) == [(1, UPSERT, b"first"), (2, UPSERT, b"third")]


def flip(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 9, 18, 30, 32 + 9, 32 + 20, 32 + 24 + 5, 32 + 4120 + 4119])
def test_a_flipped_bit_in_the_log_before_the_last_write_is_an_error(tmp_path: Path, place: int) -> None:
    """SQLite itself takes the log to end there, and would silently drop the writes after it."""
    folder = after_a_crash(tmp_path, *([(UPSERT, b"x" * 30)] for _ in range(9)))
    flip(folder / WAL, place)
    before = (folder / WAL).read_bytes(), (folder / FILE).read_bytes()
    with pytest.raises(ArtifactError, match=r"-wal is damaged at byte \d+.*restore the folder from a backup"):
        Database(str(folder))
    assert ((folder / WAL).read_bytes(), (folder / FILE).read_bytes()) == before


def test_a_log_that_a_checkpoint_began_anew_is_sound(tmp_path: Path) -> None:
    """Its new frames stand before the old ones."""
    live = Database(str(tmp_path / "live"))
    for number in range(1, 201):
        live.append([(UPSERT, b"y" * 50_000)])
        if number % 20 == 0:
            killed = copy_of(tmp_path / "live", tmp_path / f"killed-{number}", FILE, WAL)
            assert [row[0] for row in reopened(killed)] == list(range(1, number + 1))
    assert (tmp_path / "live" / WAL).stat().st_size < 8 << 20
    live.close()


def test_a_damaged_write_is_named(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    database.append([(UPSERT, b"one" * 30), (UPSERT, b"two" * 30), (UPSERT, b"three" * 30)])
    database.save_state(state_of(0))
    database.close()
    path = tmp_path / FILE
    whole = path.read_bytes()
    for text, words in (
        (b"twotwo", "write 2 does not match its digest"),
        (b'"current":"g"', "the state: it does not match its digest"),
    ):
        path.write_bytes(whole)
        flip(path, whole.index(text) + 1)
        damaged = Database(str(tmp_path))
        with pytest.raises(ArtifactError, match=rf"{words}.*restore it from a backup"):
            damaged.load_state() and damaged.read()
        damaged.close()
    no_text = whole.index(b'"current":"g"') + 2
    for place, bit in ((18, 1), (100 + 3, 1), (4096 + 1, 1), (2 * 4096 + 5, 1), (no_text, 128)):
        path.write_bytes(whole)
        flip(path, place, bit)
        with pytest.raises(ArtifactError, match=f"{FILE} is damaged.*restore it from a backup"):
            read_all(tmp_path)
    path.write_bytes(b"something else altogether")
    with pytest.raises(ArtifactError, match="not a database of writes of this version"):
        Database(str(tmp_path))


def read_all(folder: Path) -> None:
    database = Database(str(folder))
    try:
        database.load_state()
        database.read()
    finally:
        database.close()


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("CREATE TABLE writes (number)")
        other.execute("PRAGMA application_id=7")
    other.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(ArtifactError, match="not a database of writes of this version"):
        Database(str(tmp_path))
    assert (tmp_path / FILE).read_bytes() == before


class Failing(sqlite3.Connection):
    """A connection whose disk fails at commits while ``is_full``."""

    is_full = False

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        if Failing.is_full and sql == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *args)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect: Callable[..., sqlite3.Connection] = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Failing, **kwargs))
    database = Database(str(tmp_path))
    database.append([(UPSERT, b"kept")])
    monkeypatch.setattr(Failing, "is_full", True)
    for _ in range(2):
        with pytest.raises(LookalikeError, match=r"disk I/O error.*has space"):
            database.append([(UPSERT, b"lost")])
    monkeypatch.setattr(Failing, "is_full", False)
    assert contents(database) == [(1, UPSERT, b"kept")]
    assert database.append([(UPSERT, b"next")]) == 2
    database.close()
    assert reopened(tmp_path) == [(1, UPSERT, b"kept"), (2, UPSERT, b"next")]


FULL = """
import os, resource, signal, sys
from lookalike.serve.generations.database import Database
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
def refused(work):
    try:
        work()
    except Exception as error:
        print(repr(error))
    else:
        sys.exit("it was stored")
for room in (0, 10, 4096):
    limit(room)
    refused(lambda: Database(sys.argv[1]))
limit(most)
database = Database(sys.argv[1])
stored = refusals = 0
limit(1 << 20)
for _ in range(150):
    try:
        stored = database.append([(1, b"x" * 9000)])
    except Exception as error:
        print(repr(error))
        refusals += 1
refused(lambda: database.backup(sys.argv[1] + "/backup"))
assert not [name for name in os.listdir(sys.argv[1]) if name.startswith("backup")]
limit(most)
assert refusals and database.append([(1, b"x" * 9000)]) == stored + 1
print(stored + 1)
"""


def test_a_full_disk_costs_no_acknowledged_write_and_no_later_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = int(done.stdout.split()[-1])
    assert stored > 50
    assert [row[0] for row in reopened(tmp_path)] == list(range(1, stored + 1))


@pytest.mark.parametrize("name", [FILE, WAL])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_files_that_were_removed_take_no_writes(tmp_path: Path, name: str, is_replaced: bool) -> None:
    database = Database(str(tmp_path))
    database.append([(UPSERT, b"one")])
    (tmp_path / name).rename(tmp_path / "aside")
    if is_replaced:
        shutil.copy(tmp_path / "aside", tmp_path / name)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=rf"{FILE}.*was removed or replaced.*compact"):
            database.append([(UPSERT, b"two")])
    assert database.last == 1


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    database = Database(str(tmp_path))
    with pytest.raises(UsageError, match="another service writes"):
        Database(str(tmp_path), wait_s=0)
    database.close()
    Database(str(tmp_path), wait_s=0).close()


def test_a_database_that_another_program_holds_is_refused(tmp_path: Path) -> None:
    Database(str(tmp_path)).close()
    program = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
    program += "c.execute('BEGIN IMMEDIATE'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / FILE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(LookalikeError, match=r"locked; another program has it open"):
            Database(str(tmp_path))
        other.communicate(b"\n")
    Database(str(tmp_path)).close()


KILLED = """
import os, sys
from lookalike.serve.generations.database import Database
database = Database(sys.argv[1])
for number in range(1, 51):
    database.append([(1, b"%d" % number)])
    print(number, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    acknowledged = [int(line) for line in done.stdout.split()]
    database = Database(str(tmp_path), wait_s=5)
    assert [int(content) for _, _, content in contents(database)] == acknowledged == list(range(1, 51))


def test_a_process_that_ends_without_closing_leaves_one_file(tmp_path: Path) -> None:
    program = KILLED.replace("os.kill(os.getpid(), 9)", "")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=True)
    assert not (tmp_path / WAL).exists()
    assert len(reopened(copy_of(tmp_path, tmp_path / "restored", FILE))) == 50


def test_torn_copies_are_refused_by_name(tmp_path: Path) -> None:
    """Files of different moments, or only one of them."""
    live = Database(str(tmp_path / "live"))
    live.append([(UPSERT, b"a")])
    killed = copy_of(tmp_path / "live", tmp_path / "both", FILE, WAL)
    alone = copy_of(tmp_path / "live", tmp_path / "alone", FILE)
    with pytest.raises(ArtifactError, match=rf"was not closed, and {WAL}.* is missing; restore both.*user_version"):
        Database(str(alone))
    log_only = copy_of(tmp_path / "live", tmp_path / "log", WAL)
    with pytest.raises(ArtifactError, match=rf"{FILE} is gone, but {WAL} is there"):
        Database(str(log_only))
    live.backup(str(log_only / FILE))
    with pytest.raises(ArtifactError, match=rf"{WAL} does not belong to {FILE}, which is a backup"):
        Database(str(log_only))
    live.close()
    assert reopened(killed) == [(1, UPSERT, b"a")]


def test_an_old_file_with_a_newer_log_is_refused(tmp_path: Path) -> None:
    live = Database(str(tmp_path / "live"))
    live.append([(UPSERT, b"a" * 3000)])
    torn = copy_of(tmp_path / "live", tmp_path / "torn", FILE)
    for _ in range(200):  # beyond a checkpoint, after which the log begins anew
        live.append([(UPSERT, b"b" * 50_000)])
    copy_of(tmp_path / "live", torn, WAL)
    live.close()
    with pytest.raises(ArtifactError, match="damaged"):
        read_all(torn)


def test_a_folder_of_the_old_form_is_refused_and_not_touched(tmp_path: Path) -> None:
    for name in ("lock", "state.json", f"writes-{1:020d}.log"):
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, (1, 1))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    times = tmp_path.stat().st_mtime_ns
    with pytest.raises(UsageError, match=r"older version; compact with the version that wrote it.*new folder"):
        Database(str(tmp_path))
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert tmp_path.stat().st_mtime_ns == times


def test_a_backup_under_writes_is_a_folder_to_start_from(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "live"))
    database.save_state(state_of(0))
    log = WriteLog(database, 0, lambda: None)
    target = tmp_path / "restored" / FILE
    target.parent.mkdir()

    async def run() -> tuple[int, int]:
        for number in range(20):
            await log.store(DELETE, pb.DeleteRequest(ids=[str(number)]).SerializeToString())
        many = pb.DeleteRequest(ids=["x" * 5000]).SerializeToString()
        writes = [asyncio.ensure_future(log.store(DELETE, many)) for _ in range(200)]
        last = await log.backup(str(target))
        return last, max(await asyncio.gather(*writes))

    last, stored = asyncio.run(asyncio.wait_for(run(), 60))
    assert stored == 220
    with pytest.raises(UsageError, match=r"exists; name a new file"):
        database.backup(str(target))
    with pytest.raises(LookalikeError, match=r"unable to open.*allow writing"):
        database.backup(str(tmp_path / "nowhere" / FILE))
    log.close()
    assert os.listdir(target.parent) == [FILE]
    restored = Database(str(target.parent))
    assert restored.load_state() == state_of(0)
    assert numbers(restored) == list(range(1, last + 1))
    assert 20 <= last < 220
    restored.close()


def test_the_last_write_is_one_that_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever compacts up to it takes all writes up to it: the database itself is ahead while its thread ends."""
    database = Database(str(tmp_path))
    log = WriteLog(database, 0, lambda: None)
    append, stored, go = database.append, threading.Event(), threading.Event()

    def slow(writes: Sequence[tuple[int, bytes]]) -> int:
        number = append(writes)
        stored.set()
        go.wait(10)
        return number

    monkeypatch.setattr(database, "append", slow)

    async def run() -> None:
        storing = asyncio.ensure_future(log.store(DELETE, b""))
        await asyncio.to_thread(stored.wait, 10)
        assert (log.last, log.after(0)) == (0, [])
        go.set()
        assert await storing == log.last == 1
        assert [record.number for record in log.after(0, log.last)] == [1]

    asyncio.run(asyncio.wait_for(run(), 60))
