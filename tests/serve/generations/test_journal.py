"""The log of writes: what was acknowledged is there after any crash, and damage is told."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from lookalike.errors import ArtifactError, UsageError
from lookalike.serve.generations import journal as module
from lookalike.serve.generations.journal import DELETE, MAGIC, UPSERT, Journal, read_frame
from lookalike.serve.generations.write_log import WriteLog


def contents(journal: Journal, after: int = 0) -> list[tuple[int, int, bytes]]:
    return [(record.number, record.kind, record.content) for record in journal.read(after)]


def log_of(folder: Path) -> Path:
    (path,) = folder.glob("writes-*.log")
    return path


def test_writes_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    assert (journal.last, contents(journal)) == (0, [])
    assert journal.append([(UPSERT, b"a"), (DELETE, b"")]) == 2
    assert journal.append([(UPSERT, b"b" * 1000)]) == 3
    wanted = [(1, UPSERT, b"a"), (2, DELETE, b""), (3, UPSERT, b"b" * 1000)]
    assert contents(journal) == wanted
    assert contents(journal, after=2) == wanted[2:]
    journal.close()
    again = Journal(str(tmp_path))
    assert (again.last, contents(again)) == (3, wanted)
    assert again.append([(DELETE, b"c")]) == 4


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_write_cut_by_a_crash_is_dropped_and_kept_aside(tmp_path: Path, cut: int) -> None:
    journal = Journal(str(tmp_path))
    journal.append([(UPSERT, b"first")])
    size = log_of(tmp_path).stat().st_size
    journal.append([(UPSERT, b"second" * 10)])
    journal.close()
    os.truncate(log_of(tmp_path), size + cut)
    again = Journal(str(tmp_path))
    assert (again.last, contents(again)) == (1, [(1, UPSERT, b"first")])
    assert sum(path.stat().st_size for path in tmp_path.glob("*.torn")) == cut
    assert again.append([(UPSERT, b"third")]) == 2
    again.close()
    assert contents(Journal(str(tmp_path))) == [(1, UPSERT, b"first"), (2, UPSERT, b"third")]


def test_a_flipped_bit_before_the_last_write_is_an_error(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.append([(UPSERT, b"one" * 30), (UPSERT, b"two" * 30), (UPSERT, b"three" * 30)])
    journal.close()
    path = log_of(tmp_path)
    whole = path.read_bytes()
    for place in (len(MAGIC) + 3, len(MAGIC) + 20, len(MAGIC) + 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match="damaged after write"):
            Journal(str(tmp_path))
    path.write_bytes(b"something else altogether")
    with pytest.raises(ArtifactError, match="no log of writes"):
        Journal(str(tmp_path))


def test_files_are_begun_anew_forgotten_and_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 100)
    journal = Journal(str(tmp_path))
    for number in range(1, 10):
        journal.append([(UPSERT, b"x" * 60)])
        assert journal.last == number
    assert len(list(tmp_path.glob("writes-*.log"))) == 9
    assert [number for number, _, _ in contents(journal, after=4)] == [5, 6, 7, 8, 9]
    journal.forget(4)
    assert (journal.first, [number for number, _, _ in contents(journal)]) == (5, [5, 6, 7, 8, 9])
    journal.close()
    again = Journal(str(tmp_path))
    assert (again.first, again.last) == (5, 9)
    again.forget(100)  # never the file that is written to
    assert again.last == 9
    again.close()
    journal = Journal(str(tmp_path))
    journal.append([(UPSERT, b"y" * 60)])
    journal.append([(UPSERT, b"y" * 60)])
    journal.close()
    sorted(tmp_path.glob("writes-*.log"))[1].unlink()
    with pytest.raises(ArtifactError, match="a file is missing"):
        Journal(str(tmp_path))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(str(tmp_path))
    journal.append([(UPSERT, b"kept")])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.append([(UPSERT, b"lost")])
    assert contents(journal) == [(1, UPSERT, b"kept")]
    assert journal.append([(UPSERT, b"next")]) == 2
    journal.close()
    assert contents(Journal(str(tmp_path))) == [(1, UPSERT, b"kept"), (2, UPSERT, b"next")]


def test_a_disk_too_full_for_a_new_file_leaves_no_part_of_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(Journal(str(tmp_path))) == [(1, UPSERT, b"kept")]


FULL = """
import resource, signal, sys
from lookalike.serve.generations.journal import UPSERT, Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(sys.argv[1])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for room in (0, 10):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        journal.append([(UPSERT, b"lost")])
    except Exception as error:
        print(repr(error))
    else:
        sys.exit("it was stored")
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert journal.append([(UPSERT, b"kept")]) == 1
"""


def test_a_log_that_was_removed_takes_no_writes(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.append([(UPSERT, b"one")])
    log_of(tmp_path).unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"was removed.*compact"):
            journal.append([(UPSERT, b"two")])
    assert journal.last == 1


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    with pytest.raises(UsageError, match="another service writes"):
        Journal(str(tmp_path), wait_s=0)
    journal.close()
    Journal(str(tmp_path), wait_s=0).close()


KILLED = """
import os, sys
from lookalike.serve.generations.journal import UPSERT, Journal
journal = Journal(sys.argv[1])
for number in range(1, 51):
    journal.append([(UPSERT, b"%d" % number)])
    print(number, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    acknowledged = [int(line) for line in done.stdout.split()]
    journal = Journal(str(tmp_path), wait_s=5)
    assert [int(content) for _, _, content in contents(journal)] == acknowledged == list(range(1, 51))


def test_frames_are_whole_or_nothing() -> None:
    frame = module.Record(7, UPSERT, b"content").to_bytes()
    found = read_frame(frame)
    assert found is not None
    assert (found[0].number, found[0].content, found[1]) == (7, b"content", len(frame))
    for place in range(len(frame)):
        assert read_frame(frame[:place]) is None
        assert read_frame(frame[:place] + bytes([frame[place] ^ 64]) + frame[place + 1 :]) is None


def test_a_file_that_could_not_be_begun_costs_no_later_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full just when a file is begun: the first one, and one after others."""
    monkeypatch.setattr(module, "FILE_BYTES", 100)
    journal = Journal(str(tmp_path))

    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    for number in range(1, 4):
        with monkeypatch.context() as broken:
            broken.setattr(module, "_sync", full)
            with pytest.raises(OSError, match="No space"):
                journal.append([(UPSERT, b"lost")])
        assert journal.append([(UPSERT, b"x" * 60)]) == number
    journal.close()
    again = Journal(str(tmp_path))
    assert [(number, content) for number, _, content in contents(again)] == [(n, b"x" * 60) for n in (1, 2, 3)]


@pytest.mark.parametrize("size", [0, 1, len(MAGIC) - 1])
def test_a_first_line_cut_by_a_crash_is_written_anew(tmp_path: Path, size: int) -> None:
    (tmp_path / f"writes-{1:020d}.log").write_bytes(MAGIC[:size])
    journal = Journal(str(tmp_path))
    assert journal.append([(UPSERT, b"a")]) == 1
    journal.close()
    assert contents(Journal(str(tmp_path))) == [(1, UPSERT, b"a")]


def test_the_last_write_is_one_that_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever compacts up to it takes all writes up to it: the journal itself is ahead while its thread ends."""
    log = WriteLog(Journal(str(tmp_path)), 0, lambda: None)
    append, stored, go = log.journal.append, threading.Event(), threading.Event()

    def slow(writes: Sequence[tuple[int, bytes]]) -> int:
        number = append(writes)
        stored.set()
        go.wait(10)
        return number

    monkeypatch.setattr(log.journal, "append", slow)

    async def run() -> None:
        storing = asyncio.ensure_future(log.store(DELETE, b""))
        await asyncio.to_thread(stored.wait, 10)
        assert (log.last, log.after(0)) == (0, [])
        go.set()
        assert await storing == log.last == 1
        assert [record.number for record in log.after(0, log.last)] == [1]

    asyncio.run(run())
