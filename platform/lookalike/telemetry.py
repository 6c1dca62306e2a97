"""What goes to logs and terminals: text without control characters, ``event key=value`` lines, a timer."""

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
"""Controls, line and paragraph separators, bidirectional and invisible format characters, lone surrogates. The joiners
U+200C and U+200D stay: words and emoji need them, and they move nothing."""


def printable(text: str) -> str:
    """``text`` on one line that can neither move a terminal's cursor nor forge a line of a log: ``\\x1b``, ``\\n``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_lines(lines: Iterable[str]) -> str:
    """The ``lines``, each made :func:`printable`, as one text."""
    return "\n".join(map(printable, lines))


class _PlainRecords(logging.Filter):
    """Makes messages and tracebacks printable before any handler, Ray's too, sees them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            traceback = logging.Formatter().formatException(record.exc_info)
            record.exc_text = printable_lines(f"  {line}" for line in traceback.split("\n"))
        return True


_plain_records = _PlainRecords()


def get_logger(name: str) -> logging.Logger:
    """A logger below ``lookalike``, which logs printable text."""
    logger = logging.getLogger(name if name.startswith("lookalike") else f"lookalike.{name}")
    logger.addFilter(_plain_records)
    return logger


def fields(**values: Any) -> str:
    """``key=value`` pairs; floats are shortened, values with spaces or quotes quoted."""
    return " ".join(f"{key}={_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    text = printable(f"{value:.4g}" if isinstance(value, float) else str(value))
    if " " in text or '"' in text:
        return '"' + text.replace('"', '\\"') + '"'
    return text


def setup_logging(level: str = "INFO") -> None:
    """Send our log lines to stderr, other libraries' from warning up. ``LOOKALIKE_LOG_LEVEL`` overrides ``level``."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("lookalike").setLevel(os.environ.get("LOOKALIKE_LOG_LEVEL", level).upper())


@contextmanager
def timed(log: logging.Logger, event: str, **values: Any) -> Iterator[dict[str, Any]]:
    """Log ``event`` with its duration when the block ends; fields added to the yielded dict are logged too."""
    more: dict[str, Any] = {}
    start = time.monotonic()
    yield more
    log.info("%s %s", event, fields(**values, **more, seconds=round(time.monotonic() - start, 2)))
