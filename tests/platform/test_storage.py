"""Storage: atomic writes, listings and digests on a disk and in memory."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lookalike import storage
from lookalike.errors import LookalikeError


def test_round_trip_on_every_store(root: str) -> None:
    storage.write_atomic(storage.join(root, "a", "b.bin"), b"12345")
    storage.write_atomic(storage.join(root, "c.bin"), b"")
    assert storage.read_bytes(f"{root}/a/b.bin") == b"12345"
    assert storage.list_files(root) == ["a/b.bin", "c.bin"]
    assert storage.list_files(f"{root}/c.bin") == [""]
    assert storage.size_bytes(f"{root}/a/b.bin") == 5
    assert storage.sha256(f"{root}/a/b.bin") == hashlib.sha256(b"12345").hexdigest()
    storage.remove_tree(f"{root}/a")
    assert not storage.exists(f"{root}/a/b.bin")
    assert storage.exists(f"{root}/c.bin")
    storage.remove_tree(f"{root}/never-there")


def test_a_streamed_file_stands_whole_or_not_at_all(root: str) -> None:
    with storage.open_atomic(f"{root}/a/b.bin") as file:
        file.write(b"12")
        assert storage.list_files(root) == []
        file.write(b"345")
    assert storage.read_bytes(f"{root}/a/b.bin") == b"12345"

    def fail() -> None:
        with storage.open_atomic(f"{root}/a/b.bin") as file:
            file.write(b"other")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.read_bytes(f"{root}/a/b.bin") == b"12345"
    storage.remove_file(f"{root}/a/b.bin")
    storage.remove_file(f"{root}/a/b.bin")
    assert storage.list_files(root) == []


def test_a_full_disk_is_told_and_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.write_atomic(f"{tmp_path}/a.bin", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LookalikeError, match=r"no space left to write .*a\.bin; free some, or choose another root"):
        storage.write_atomic(f"{tmp_path}/a.bin", b"new")
    assert os.listdir(tmp_path) == ["a.bin"]
    assert storage.read_bytes(f"{tmp_path}/a.bin") == b"old"


def test_a_sibling_with_the_same_beginning_is_not_listed(root: str) -> None:
    storage.write_atomic(f"{root}/run/x", b"1")
    storage.write_atomic(f"{root}/run-2/y", b"1")
    assert storage.list_files(f"{root}/run") == ["x"]


def test_pyarrow_reads_what_was_written(root: str) -> None:
    storage.write_atomic(f"{root}/t.bin", b"abc")
    filesystem, path = storage.arrow_filesystem(f"{root}/t.bin")
    with filesystem.open_input_file(path) as file:
        assert file.read() == b"abc"


def test_a_crash_while_writing_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.json"
    storage.write_atomic(str(target), b"old")

    def crash(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(str(target), b"new and longer")
    assert target.read_bytes() == b"old"


def test_a_huge_raw_file_is_known_by_its_ends_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "READ_WHOLE_BYTES", 100)
    monkeypatch.setattr(storage, "CHUNK_BYTES", 40)
    file = tmp_path / "huge.bin"
    digests = []
    for content in (b"a" * 200, b"a" * 201, b"b" + b"a" * 199, b"a" * 199 + b"b", b"a" * 200):
        file.write_bytes(content)
        digests.append(storage.source_digest(str(file)))
    assert len(set(digests)) == 4
    assert digests[0] == digests[-1]


def test_source_digest_follows_content_not_time(tmp_path: Path) -> None:
    file = tmp_path / "raw.csv"
    file.write_bytes(b"one")
    before = storage.source_digest(str(file))
    os.utime(file, (1, 1))
    assert storage.source_digest(str(file)) == before
    file.write_bytes(b"two")
    assert storage.source_digest(str(file)) != before


def test_a_lock_has_one_holder_until_it_is_closed_or_its_process_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = storage.try_lock(path)
    assert held is not None
    assert storage.try_lock(path) is None
    held.close()
    code = (
        "import pathlib, sys; from lookalike import storage; "
        "lock = storage.try_lock(pathlib.Path(sys.argv[1])); print(lock, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() != b"None\n"
        assert storage.try_lock(path) is None
        child.kill()
    with storage.try_lock(path) as again:
        assert again is not None


def test_a_second_process_waits_and_says_so_once(tmp_path: Path) -> None:
    path = f"{tmp_path}/locks/step"
    with storage.exclusive(path, pytest.fail):
        said = threading.Event()
        entered = threading.Event()

        def wait() -> None:
            with storage.exclusive(path, said.set):
                entered.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert said.wait(30)
        assert not entered.is_set()
    thread.join(30)
    assert entered.is_set()
    with storage.exclusive("memory://locks/step", pytest.fail):
        pass


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert storage.absolute("memory://runs/x") == "memory://runs/x"
    assert storage.is_local(f"file://{tmp_path}")
    with pytest.raises(ValueError, match=r"memory://x is not on a local disk"):
        storage.local_path("memory://x")


def test_what_a_crash_left_half_written_is_not_listed(root: str) -> None:
    storage.write_atomic(f"{root}/a/part-0.bin", b"whole")
    fs, path = storage.resolve(f"{root}/a/part-1.bin.1234abcd.tmp")
    fs.pipe_file(path, b"ha")
    assert storage.list_files(f"{root}/a") == ["part-0.bin"]
    storage.remove_temporaries(f"{root}/a")
    assert not fs.exists(path)
