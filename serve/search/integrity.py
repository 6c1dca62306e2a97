"""Whether the files that a worker answers from are those of the index's manifest: before it answers, and while it does.

Before a worker answers for an index, its files are compared by size and, up to ``FULL_CHECK_BYTES``, by SHA-256. Then a
thread reads them all again every ``PERIOD_S`` seconds, at most ``RATE`` bytes a second; larger ones first at once. An
index with a damaged file is not answered from until the file is whole again, or another index is served.
"""

import hashlib
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import grpc
from ray.util.metrics import Gauge

from lookalike.artifacts import FULL_CHECK_BYTES, Artifact
from lookalike.errors import ArtifactError
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.serve.generations.generation import Generation
from lookalike.serve.wire.errors import RetrievalError
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
RATE = 16 << 20
PERIOD_S = 3600.0
CHUNK_BYTES = 1 << 20
PROGRESS_S = 10.0
"""Seconds between lines that tell how far a check has come."""
REMEDY = "restore the file from a copy, or serve another index"
_TURN = threading.Lock()
"""One worker of a process reads at a time."""


class StoredFile(NamedTuple):
    """A file as it is opened, and what the manifest says of it."""

    path: str
    name: str
    size_bytes: int
    sha256: str

    def find_problem(self, *, content: bool = True, pause: "Pause | None" = None) -> str:
        """Why it is not the file of the manifest; empty if it is, or if it was removed while it is in use."""
        try:
            size = Path(self.path).stat().st_size
            if size != self.size_bytes:
                return f"{self.name} has {size} bytes, expected {self.size_bytes}"
            if content and self._digest(pause) != self.sha256:
                return f"{self.name} does not match its SHA-256"
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{self.name} cannot be read ({error})"
        return ""

    def _digest(self, pause: "Pause | None") -> str:
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                if pause is not None:
                    pause.after(len(chunk))
        return digest.hexdigest()


class Pause:
    """Keeps a reader at ``RATE`` bytes a second; ``stop`` lets it run on."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._free_at = stop, time.monotonic()

    def after(self, size_bytes: int) -> None:
        """Wait as long as reading that much may take."""
        self._free_at = max(self._free_at, time.monotonic() - 1) + size_bytes / RATE
        self._stop.wait(max(0.0, self._free_at - time.monotonic()))


def list_files(generation: Generation, shards: Sequence[ShardSearcher], folders: Sequence[str]) -> list[StoredFile]:
    """The files of ``shards``, which were opened from ``folders`` of the index."""
    manifest = Artifact.open(generation.index, "index", check=False).manifest
    files: list[StoredFile] = []
    for shard, folder in zip(shards, folders, strict=True):
        name = folder.rstrip("/").rpartition("/")[2] + "/"
        files += [
            StoredFile(f"{shard.store.folder}/{entry.path[len(name) :]}", entry.path, entry.size_bytes, entry.sha256)
            for entry in manifest.files
            if entry.path.startswith(name)
        ]
    return files


class Integrity:
    """Damage of the indexes that one worker holds."""

    def __init__(self) -> None:
        self._files: dict[str, list[StoredFile]] = {}
        self.damage: dict[str, str] = {}
        """Generation -> what is damaged."""
        self._stop, self._now = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def check(self, generation: Generation, files: Sequence[StoredFile]) -> None:
        """Raise ``ArtifactError`` unless the files are whole, as far as this can be told before it answers."""
        size, done, told = sum(file.size_bytes for file in files), 0, time.monotonic()
        content = size <= FULL_CHECK_BYTES
        for file in files:
            problem = file.find_problem(content=content)
            if not problem and not Path(file.path).exists():
                problem = f"{file.name} is missing"
            if problem:
                raise ArtifactError(f"index {generation.index} is damaged: {problem}; {REMEDY}")
            done += file.size_bytes
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                log.info("checked %s", fields(index=generation.index, mb=done >> 20, of_mb=size >> 20))
        if not content:
            log.info("checked by size %s", fields(index=generation.index, mb=size >> 20, contents="while it serves"))

    def watch(self, name: str, files: list[StoredFile]) -> None:
        """Read the files of generation ``name`` again and again from now on."""
        self._files[name] = files
        if self._thread is None:
            weakref.finalize(self, _end, self._stop, self._now)
            self._thread = threading.Thread(
                target=_run, args=(weakref.ref(self), self._stop, self._now), name="integrity", daemon=True
            )
            self._thread.start()
        if sum(file.size_bytes for file in files) > FULL_CHECK_BYTES:
            self._now.set()

    def forget(self, name: str) -> None:
        """Stop with a generation that is no longer held."""
        self._files.pop(name, None)
        if self.damage.pop(name, None):
            _damaged().set(0, {"index": name})

    def require_sound(self, name: str) -> None:
        """Raise ``RetrievalError`` if a file of that generation is damaged."""
        if problem := self.damage.get(name):
            raise RetrievalError(grpc.StatusCode.UNAVAILABLE, f"index {name} is damaged: {problem}; {REMEDY}")

    def read_all(self, pause: Pause | None = None) -> None:
        """Read every file once, and note what is damaged and what is whole again."""
        for name, files in list(self._files.items()):
            problem = ""
            for file in files:
                if name not in self._files or problem:
                    break
                if file.find_problem(pause=pause):  # once more: a copy may just be put in its place
                    problem = file.find_problem(pause=pause)
            if name in self._files and problem != self.damage.get(name, ""):
                self._note(name, problem)

    def _note(self, name: str, problem: str) -> None:
        if problem:
            self.damage[name] = problem
            log.error("damaged %s", fields(index=name, problem=problem, effect="not answered from", remedy=REMEDY))
        else:
            del self.damage[name]
            log.info("whole again %s", fields(index=name))
        _damaged().set(int(bool(problem)), {"index": name})


def _run(integrity: "weakref.ref[Integrity]", stop: threading.Event, now: threading.Event) -> None:
    while not stop.is_set():
        now.wait(PERIOD_S)
        now.clear()
        if (alive := integrity()) is not None and not stop.is_set():
            with _TURN, suppress(RuntimeError):  # of a list that changes meanwhile
                alive.read_all(Pause(stop))
        del alive


def _end(stop: threading.Event, now: threading.Event) -> None:
    stop.set()
    now.set()


@lru_cache(1)
def _damaged() -> Gauge:
    return Gauge("lookalike_damaged", "1 for an index of which a file is damaged; it is not answered from.", ("index",))
