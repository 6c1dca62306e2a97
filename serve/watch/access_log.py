"""The access log: one JSON line a request, in files that turn over. For counting and for experiments, not for replay.

A line holds what was asked for and how it went, never a payload: no vectors, images, query ids, tokens or messages.
Sessions and hits appear for an experiment's requests only, as hashes (``hash_text``): sessions, because they are the
units of its comparison, and the hits of interleaved answers, because feedback on a hit is credited to the arm that
brought it. Feedback is a line too.

Lines wait in memory for a thread that writes them: a slow or full disk costs lines, which are counted, and no request.
What waited when a process is killed is lost, half a second's worth.
"""

import atexit
import fcntl
import json
import logging
import os
import queue
import socket
import threading
import time
from contextlib import suppress
from hashlib import blake2b
from logging.handlers import RotatingFileHandler
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

from lookalike.errors import UsageError
from lookalike.serve.settings.watching import INTERLEAVED, AccessLogSettings, ExperimentSettings
from lookalike.serve.watch.trace import Trace
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
FLUSH_S = 0.5
LINES_AT_ONCE = 200
MAX_SHOWN = 1000
"""Hits that a line lists at most."""
COMPLAIN_S = 60.0
"""A disk that fails is logged so often."""


def hash_text(text: str) -> str:
    """What stands for a session or an id: 64 bits of BLAKE2, the same on every replica."""
    return blake2b(text.encode(), digest_size=8).hexdigest()


def to_line(trace: Trace, now: float) -> dict[str, Any]:
    """The line of one request that ended at ``now`` (seconds since 1970); what is not known of it is left out."""
    line: dict[str, Any] = {
        "time": round(now, 3),
        "request_id": trace.request_id,
        "method": trace.method,
        "code": trace.code,
        "tenant": trace.tenant,
        "k": trace.k,
        "queries": trace.num_queries,
        "ms": round(trace.total_ms, 3),
    }
    if trace.feedback is not None:
        given = trace.feedback
        line |= {"request_id": given.request_id, "kind": given.kind, "id": hash_text(given.id) if given.id else None}
    if trace.experiment:
        failed = [timing.arm for timing in trace.arms if timing.code != "OK"]
        session = hash_text(trace.session) if trace.session else None
        line |= {
            "experiment": trace.experiment,
            "arm": trace.arm,
            "forced": trace.forced,
            "failed_arms": failed,
            "session": session,
        }
    if trace.info is not None:
        line |= _answered(trace)
    return {name: value for name, value in line.items() if value not in (None, "", [])}


def _answered(trace: Trace) -> dict[str, Any]:
    info = trace.info
    assert info is not None
    asked = info.coverage.shards_asked
    line: dict[str, Any] = {
        "generation": info.index_generation,
        "degraded": info.degraded,
        "plan": " | ".join(search.options.plan.describe() for search in sorted(trace.searches, key=attrgetter("arm"))),
        "coverage": round(info.coverage.shards_answered / asked, 4) if asked else None,
        "stages": {part.stage: round(part.duration_ms, 3) for part in info.stage_times},
    }
    if trace.arm == INTERLEAVED:
        shown: dict[str, list[str]] = {}
        hits = [hit for result in trace.results for hit in result.hits if hit.arm]
        for hit in hits[:MAX_SHOWN]:
            shown.setdefault(hit.arm, []).append(hash_text(hit.id))
        line["shown"] = shown
    return line


class AccessLog:
    """A replica's log in ``settings.folder``: ``access-HOST-NN.jsonl``, older files with a further number.

    NN is the first that no other live process of this machine writes, so replicas that come and go add no files.
    Raises ``UsageError`` when the folder cannot be written.
    """

    def __init__(self, settings: AccessLogSettings) -> None:
        assert settings.folder is not None
        self.dropped = 0
        """Lines that were not written."""
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(settings.max_waiting)
        self._complained, self._broken_line = -COMPLAIN_S, False
        self._closing = threading.Event()
        folder = Path(settings.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path, self._lock = _claim(folder)
            self._file = RotatingFileHandler(
                path, maxBytes=int(settings.max_mb * 1e6), encoding="utf-8", backupCount=settings.max_files - 1
            )
        except OSError as error:
            raise UsageError(
                f"access_log.folder {settings.folder} cannot be written ({error.strerror or error}); give "
                "a folder on a disk of this machine, or leave it out"
            ) from None
        self._file.handleError = self._failed  # type: ignore[method-assign]
        self.path = path
        self._thread = threading.Thread(target=self._write_until_closed, name="access-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def add(self, line: Trace | dict[str, Any]) -> None:
        """Leave a line, or the request it is made of, to the thread; drops it when too many wait."""
        now = time.time()
        made = to_line(line, now) if isinstance(line, Trace) else {"time": round(now, 3), **line}
        try:
            self._waiting.put_nowait(made)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, and end."""
        self._closing.set()
        self._thread.join(timeout=5.0)
        self._file.close()
        self._lock.close()
        atexit.unregister(self.close)

    def _write_until_closed(self) -> None:
        while not self._closing.is_set():
            self._closing.wait(FLUSH_S)
            while not self._waiting.empty():
                self._write([self._waiting.get() for _ in range(min(LINES_AT_ONCE, self._waiting.qsize()))])

    def _write(self, batch: list[dict[str, Any]]) -> None:
        text = "\n" * self._broken_line + "\n".join(map(json.dumps, batch))
        self._broken_line = False
        if not os.path.exists(self.path):  # moved or removed by someone else: the next lines begin a new file
            self._file.close()
        self._file.emit(logging.LogRecord("access", logging.INFO, "", len(batch), text, None, None))

    def _failed(self, record: logging.LogRecord) -> None:
        self.dropped += record.lineno  # the number of lines, see _write
        self._broken_line = True
        if time.monotonic() - self._complained >= COMPLAIN_S:
            self._complained = time.monotonic()
            log.exception("access log %s", fields(path=self.path, dropped=self.dropped))
        with suppress(OSError):
            self._file.close()  # what it still holds is counted as lost; the next lines open it again


def _claim(folder: Path) -> tuple[Path, IO[str]]:
    """The first path that no live process holds, and the open lock that holds it."""
    number = 0
    while True:
        path = folder / f"access-{socket.gethostname()}-{number:02d}.jsonl"
        lock = path.with_suffix(".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            number += 1
        else:
            return path, lock


def publish_experiment(folder: str, settings: ExperimentSettings) -> None:
    """Leave the experiment's settings beside the log, for ``lookalike experiment``: they hold the weights."""
    text = settings.model_dump_json(indent=1)
    path = Path(folder) / f"experiment-{settings.name}-{hash_text(text)}.json"
    if not path.exists():
        draft = path.with_suffix(f".{socket.gethostname()}-{threading.get_native_id()}.tmp")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
