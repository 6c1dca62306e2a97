"""The access log: one JSON line per request, in files that turn over. For counting and for experiments, not for replay.

A line holds what was asked for and how it went, never a payload: no vectors, images, query ids, tokens or messages.
Sessions and hits appear for requests of an experiment only, as hashes (``hash_text``): sessions because they are the
units of its comparison, hits of interleaved answers because feedback on a hit is credited to the arm that brought it.
Feedback is a line too.

Lines wait in memory for a thread that writes them: a slow or full disk costs lines, which are counted, and delays no
request. Lines that wait when a process is killed are lost.
"""

import atexit
import json
import logging
import os
import queue
import socket
import time
from contextlib import suppress
from hashlib import blake2b
from logging.handlers import QueueListener, RotatingFileHandler
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.watching import INTERLEAVED, AccessLogSettings, ExperimentSettings
from lookalike.serve.watch.trace import Trace
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
MAX_SHOWN = 1000
"""Most hits that a line lists."""
COMPLAIN_S = 60.0
"""Seconds between two messages about a disk that fails."""


def hash_text(text: str) -> str:
    """64 bits of BLAKE2 that stand for a session or an id, the same on every replica."""
    return blake2b(text.encode(), digest_size=8).hexdigest()


def to_line(trace: Trace, now: float) -> dict[str, Any]:
    """The line of a request that ended at ``now`` (seconds since 1970), without what is not known of it."""
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
        feedback = trace.feedback
        image_id = hash_text(feedback.id) if feedback.id else None
        line |= {"request_id": feedback.request_id, "kind": feedback.kind, "id": image_id}
    if trace.experiment:
        line |= {"experiment": trace.experiment, "arm": trace.arm, "forced": trace.forced}
        line["failed_arms"] = [timing.arm for timing in trace.arms if timing.code != "OK"]
        line["session"] = hash_text(trace.session) if trace.session else None
    if trace.info is not None:
        line |= _describe_answer(trace, trace.info)
    return {name: value for name, value in line.items() if value not in (None, "", [])}


def _describe_answer(trace: Trace, info: pb.SearchInfo) -> dict[str, Any]:
    num_shards = info.coverage.shards_asked
    line: dict[str, Any] = {
        "generation": info.index_generation,
        "degraded": info.degraded,
        "plan": " | ".join(search.options.plan.describe() for search in sorted(trace.searches, key=attrgetter("arm"))),
        "coverage": round(info.coverage.shards_answered / num_shards, 4) if num_shards else None,
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

    NN is the first number that no other live process of this machine uses, so replicas that come and go add no files.
    Raises ``UsageError`` if the folder cannot be written.
    """

    def __init__(self, settings: AccessLogSettings) -> None:
        assert settings.folder is not None
        folder, self._max_waiting, self._overflown = Path(settings.folder), settings.max_waiting, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path, self._lock = _claim(folder)
            self._file = _LineFile(
                self.path, maxBytes=int(settings.max_mb * 1e6), encoding="utf-8", backupCount=settings.max_files - 1
            )
        except OSError as error:
            raise UsageError(
                f"access_log.folder {settings.folder} cannot be written ({error.strerror or error}); give "
                "a folder on a disk of this machine, or leave it out"
            ) from None
        self._waiting: queue.Queue[logging.LogRecord] = queue.Queue()  # bounded in add: the listener's end must fit
        self._listener = QueueListener(self._waiting, self._file)
        self._listener.start()
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return self._overflown + self._file.dropped

    def add(self, line: Trace | dict[str, Any]) -> None:
        """Leave a line, or the request it is made of, to the thread; drop it if too many wait."""
        if self._waiting.qsize() >= self._max_waiting:
            self._overflown += 1
            return
        now = time.time()
        made = to_line(line, now) if isinstance(line, Trace) else {"time": round(now, 3), **line}
        self._waiting.put_nowait(logging.makeLogRecord({"msg": made}))

    def flush(self) -> None:
        """Return when all lines added so far are written, or dropped."""
        self._waiting.join()

    def close(self) -> None:
        """Write the lines that wait, and end."""
        atexit.unregister(self.close)
        if not self._lock.closed:
            self._listener.stop()
            self._file.close()
            self._lock.close()


class _LineFile(RotatingFileHandler):
    """Writes each record's dict as a line of JSON, and counts the lines that it cannot write."""

    dropped = 0
    _complained = -COMPLAIN_S
    _broken_line = False
    """Whether the file may end within a line."""

    def emit(self, record: logging.LogRecord) -> None:
        record.msg = "\n" * self._broken_line + json.dumps(record.msg)
        self._broken_line = False
        if not os.path.exists(self.baseFilename):  # moved or removed by someone else: begin a new file
            self.close()
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1
        self._broken_line = True
        if time.monotonic() - self._complained >= COMPLAIN_S:
            self._complained = time.monotonic()
            log.exception("access log %s", fields(path=self.baseFilename, dropped=self.dropped))
        with suppress(OSError):
            self.close()  # its buffer is counted as lost; the next line opens the file again


def _claim(folder: Path) -> tuple[Path, IO[bytes]]:
    """The first path that no live process holds, and the open lock that holds it."""
    number = 0
    while True:
        path = folder / f"access-{socket.gethostname()}-{number:02d}.jsonl"
        if (lock := storage.try_lock(path.with_suffix(".lock"))) is not None:
            return path, lock
        number += 1


def publish_experiment(folder: str, settings: ExperimentSettings) -> None:
    """Leave the experiment's settings beside the log, for ``lookalike experiment``: they hold the weights."""
    text = settings.model_dump_json(indent=1)
    path = storage.join(folder, f"experiment-{settings.name}-{hash_text(text)}.json")
    if not storage.exists(path):
        storage.write_atomic(path, text.encode())
