"""Stored whole or not at all, and said so: what stands in the place of the files, and what is left of a full disk."""

import asyncio
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from lookalike.errors import ArtifactError, LookalikeError
from lookalike.serve.generations import acknowledged, reserve
from lookalike.serve.generations.acknowledged import Acknowledged
from lookalike.serve.generations.database import Database, UncertainError
from lookalike.serve.generations.database_files import FILE
from lookalike.serve.generations.reserve import Reserve
from lookalike.serve.generations.staging import Staging
from lookalike.serve.generations.state import State
from lookalike.serve.generations.write_log import WriteLog
from lookalike.serve.generations.write_record import WriteKind
from lookalike.serve.wire.errors import RetrievalError, StagedLostError
from tests.serve.generations.test_database import copy_of, state_of

UPSERT, DELETE = WriteKind
WAL = FILE + "-wal"
NAMES = (FILE, WAL, acknowledged.FILE)


def start(folder: Path) -> tuple[list[bytes], State | None]:
    """What a service that starts in ``folder`` finds, if it does."""
    database = Database(str(folder), wait_s=0)
    try:
        database.check_complete()
        state = database.load_state()
        return [record.content for record in database.read(database.first - 1)], state
    finally:
        database.close()


@pytest.fixture
def live(tmp_path: Path) -> Any:
    """A database with six writes and a state, two of the writes and the state in its log."""
    database = Database(str(tmp_path / "live"))
    database.append([(UPSERT, b"%d" % number * 50) for number in range(4)])
    database.save_state(state_of(1))
    database.append([(DELETE, b"x" * 50)])
    database.append([(UPSERT, b"y" * 50)])
    yield database
    database.close()


def test_a_flipped_bit_anywhere_loses_nothing_unsaid(live: Database, tmp_path: Path) -> None:
    """In the database, its log or what was acknowledged, as a killed service leaves them."""
    killed = copy_of(live.path.parent, tmp_path / "killed", *NAMES)
    whole = start(copy_of(killed, tmp_path / "whole", *NAMES))
    rng, found = random.Random(0), {"refused": 0, "all there": 0}
    for number in range(240):
        name = NAMES[number % 3]
        folder = copy_of(killed, tmp_path / f"{number}", *NAMES)
        data = bytearray((folder / name).read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)
        try:
            assert start(folder) == whole
            found["all there"] += 1
        except ArtifactError as error:
            found["refused"] += str(folder) in str(error) and "restore" in str(error)
        shutil.rmtree(folder)
    assert found["refused"] > 20
    assert sum(found.values()) == 240


@pytest.mark.parametrize(("name", "cuts"), [(FILE, [None, 0, 32]), (WAL, [None, 0, 32, 0.5, -4120, -1])])
def test_a_log_that_is_cut_or_missing_is_refused(live: Database, tmp_path: Path, name: str, cuts: list[Any]) -> None:
    """But for the end of a database whose pages are all in its log."""
    killed = copy_of(live.path.parent, tmp_path / "killed", *NAMES)
    size = (killed / name).stat().st_size
    for cut in cuts:
        folder = copy_of(killed, tmp_path / f"cut-{cut}", *NAMES)
        if cut is None:
            (folder / name).unlink()
        else:
            os.truncate(folder / name, size + cut if cut < 0 else int(size * cut) if 0 < cut < 1 else cut)
        with pytest.raises(ArtifactError, match=r"restore"):
            start(folder)
    assert len(start(killed)[0]) == 6


def test_an_older_copy_is_refused_until_it_is_accepted(live: Database, tmp_path: Path) -> None:
    older = copy_of(live.path.parent, tmp_path / "older", FILE, WAL)
    live.append([(UPSERT, b"newest")])
    live.close()
    shutil.copy(live.path.parent / acknowledged.FILE, older)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"has the writes up to 6, those up to 7 were acknow.*remove .*acknow"):
            start(older)
    (older / acknowledged.FILE).unlink()
    assert len(start(older)[0]) == 6
    assert len(start(live.path.parent)[0]) == 7


def test_an_older_state_is_refused(live: Database, tmp_path: Path) -> None:
    older = copy_of(live.path.parent, tmp_path / "older", FILE, WAL)
    live.save_state(state_of(2))
    live.close()
    shutil.copy(live.path.parent / acknowledged.FILE, older)
    with pytest.raises(ArtifactError, match=r"another state than the one that acknowledged says.*restore the newest"):
        start(older)


def test_a_log_of_another_service_is_refused(live: Database, tmp_path: Path) -> None:
    live.close()
    other = Database(str(tmp_path / "other"))
    other.append([(UPSERT, b"other")] * 6)
    other.save_state(state_of(1))
    other.close()
    shutil.copy(live.path.parent / acknowledged.FILE, tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"another write 6 than the one that acknowledged says"):
        start(tmp_path / "other")


def test_a_torn_half_of_the_acknowledgement_leaves_the_other(tmp_path: Path) -> None:
    path = tmp_path / acknowledged.FILE
    file = acknowledged.AcknowledgedFile(tmp_path, Acknowledged())
    for number in range(1, 5):
        file.write(Acknowledged(number))
    file.close()
    good = path.read_bytes()
    for place, number in zip(acknowledged.PLACES, (3, 4), strict=True):
        path.write_bytes(good[:place] + bytes(80) + good[place + 80 :])
        found = acknowledged.read(path)
        assert found is not None
        assert found.number == number
    path.write_bytes(bytes(len(good)))
    with pytest.raises(ArtifactError, match=r"acknowledged is damaged.*remove it if"):
        acknowledged.read(path)


def test_an_older_copy_in_the_same_file_takes_no_writes(live: Database, tmp_path: Path) -> None:
    older = copy_of(live.path.parent, tmp_path / "older", FILE, WAL)
    live.append([(UPSERT, b"newest" * 2000)])
    for name in (FILE, WAL):
        shutil.copyfile(older / name, live.path.parent / name)
        os.utime(live.path.parent / name, (1, 1))
    for _ in range(2):
        with pytest.raises((LookalikeError, OSError), match=r"was removed or replaced.*compact"):
            live.append([(UPSERT, b"lost")])
    assert live.last == 7


def test_a_touched_file_is_compared_and_goes_on(live: Database) -> None:
    os.utime(live.path, (1, 1))
    assert live.append([(UPSERT, b"next")]) == 7
    live.close()
    assert start(live.path.parent)[0][-1] == b"next"


def test_a_folder_replaced_by_a_copy_takes_no_writes_and_stays_as_it_is(live: Database, tmp_path: Path) -> None:
    folder = live.path.parent
    shutil.copytree(folder, tmp_path / "copy")
    folder.rename(tmp_path / "aside")
    (tmp_path / "copy").rename(folder)
    before = {name: (folder / name).read_bytes() for name in NAMES}
    with pytest.raises(FileNotFoundError, match=r"removed or replaced.*compact"):
        live.append([(UPSERT, b"lost")])
    live.close()
    assert {name: (folder / name).read_bytes() for name in NAMES} == before
    assert len(start(folder)[0]) == 6


def test_a_start_takes_no_write_if_nothing_has_changed(live: Database, tmp_path: Path) -> None:
    killed = copy_of(live.path.parent, tmp_path / "killed", *NAMES)
    database = Database(str(killed), wait_s=0)
    database.check_complete()
    copy_of(killed, tmp_path / "again", *NAMES)
    database.close()
    marks = {name: (tmp_path / "again" / name).stat().st_mtime_ns for name in (FILE, acknowledged.FILE)}
    again = Database(str(tmp_path / "again"), wait_s=0)  # whose log is empty
    again.check_complete()
    state = again.load_state()
    assert state is not None
    again.save_state(state)
    assert {name: (tmp_path / "again" / name).stat().st_mtime_ns for name in marks} == marks
    assert not (tmp_path / "again" / WAL).stat().st_size
    again.close()


def test_a_refusal_says_what_may_have_been_kept(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    log = WriteLog(live, live.last, lambda: None)
    monkeypatch.setattr(Database, "append", lambda self, writes: raise_it(UncertainError("disk I/O error")))
    with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*disk I/O error.*some of it may be kept.*write again"):
        asyncio.run(log.store(UPSERT, b"a"))
    monkeypatch.setattr(Database, "append", lambda self, writes: raise_it(LookalikeError("full")))
    with pytest.raises(RetrievalError, match=r"UNAVAILABLE.*full.*nothing of it was kept"):
        asyncio.run(log.store(UPSERT, b"a"))


def raise_it(error: Exception) -> None:
    raise error


def test_deletes_are_stored_beside_upserts_that_find_no_space(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    log, append = WriteLog(live, live.last, lambda: None), Database.append

    def full(self: Database, writes: Any) -> int:
        if any(kind == UPSERT for kind, _ in writes):
            raise LookalikeError("the disk is full")
        return append(self, writes)

    monkeypatch.setattr(Database, "append", full)

    async def run() -> list[Any]:
        calls = [log.store(UPSERT, b""), log.store(DELETE, b""), log.store(UPSERT, b"", b""), log.store(DELETE, b"")]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcome = asyncio.run(run())
    assert [outcome[1], outcome[3]] == [7, 8]
    assert all("disk is full" in str(outcome[place]) for place in (0, 2))


def test_writes_of_one_call_have_numbers_in_a_row(live: Database) -> None:
    log = WriteLog(live, live.last, lambda: None)

    async def run() -> list[int]:
        return await asyncio.gather(log.store(UPSERT, b"", b"", b""), log.store(DELETE, b""))

    assert asyncio.run(run()) == [9, 10]


def test_the_reserve_is_given_back_and_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Reserve(tmp_path)
    assert space.is_full
    assert os.stat(tmp_path / reserve.FILE).st_blocks * 512 >= reserve.RESERVE_BYTES
    assert space.release()
    assert not space.release()
    assert not (tmp_path / reserve.FILE).exists()
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", lambda *_: raise_it(OSError(28, "No space left on device")))
        assert not space.fill()
        assert not (tmp_path / reserve.FILE).exists()
    assert space.fill()


def test_upserts_wait_for_the_reserve(live: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    live._reserve.release()  # noqa: SLF001
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", lambda *_: raise_it(OSError(28, "No space left on device")))
        with pytest.raises(LookalikeError, match=r"is full, what is left is for deletes and switches; free some space"):
            live.append([(UPSERT, b"a")])
        assert live.append([(DELETE, b"")]) == 7
    assert live.append([(UPSERT, b"a")]) == 8


def test_portions_are_all_there_or_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging()
    staging.add("u", 1, b"b")
    staging.add("u", 0, b"a")
    staging.add("other", 0, b"x")
    assert staging.take("u", 2) == [b"a", b"b"]
    for upsert, num in (("u", 2), ("other", 2)):
        with pytest.raises(StagedLostError, match="write again"):
            staging.take(upsert, num)
    monkeypatch.setattr("lookalike.serve.generations.staging.STAGED_BYTES", 5)
    staging.add("v", 0, b"1234")
    with pytest.raises(RetrievalError, match=r"RESOURCE_EXHAUSTED.*4 bytes of other upserts.*limit is 5; retry after"):
        staging.add("w", 0, b"12")
    monkeypatch.setattr("lookalike.serve.generations.staging.STAGED_S", -1.0)
    staging.add("w", 0, b"12")  # the others are forgotten
    assert staging.take("w", 1) == [b"12"]
