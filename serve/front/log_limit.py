"""Bounds the lines that Serve logs for failed requests: it writes a traceback of about 10 kB for each."""

import logging
import time
from collections import defaultdict

SERVE_LOGGER = "ray.serve"
LINES_PER_S = 1.0
"""Lines per second from one place of the source, with ``BURST`` at once after a pause; the others are counted."""
BURST = 5


class LogLimit(logging.Filter):
    """Lets through a few warnings and errors of each place; the next one says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple[str, int], _Place] = defaultdict(_Place)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        place = self._places[record.pathname, record.lineno]
        if not place.take(time.monotonic()):
            return False
        if place.left_out:
            record.msg, record.args = f"{record.getMessage()} ({place.left_out} more like this were left out)", None
            place.left_out = 0
        return True


class _Place:
    """A token bucket of lines."""

    def __init__(self) -> None:
        self._lines, self._time, self.left_out = float(BURST), time.monotonic(), 0

    def take(self, now: float) -> bool:
        self._lines = min(BURST, self._lines + (now - self._time) * LINES_PER_S)
        self._time = now
        if self._lines < 1:
            self.left_out += 1
            return False
        self._lines -= 1
        return True


def limit_serve_log() -> None:
    """Bound the lines of this process's Serve logger; a second call changes nothing."""
    logger = logging.getLogger(SERVE_LOGGER)
    if not any(isinstance(each, LogLimit) for each in logger.filters):
        logger.addFilter(LogLimit())
