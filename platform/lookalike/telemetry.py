"""Logging in ``event key=value`` lines, and a timer."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def get_logger(name: str) -> logging.Logger:
    """A logger below ``lookalike``."""
    return logging.getLogger(name if name.startswith("lookalike") else f"lookalike.{name}")


def fields(**values: Any) -> str:
    """``key=value`` pairs; floats are shortened, values with spaces quoted."""
    return " ".join(f"{key}={_plain(value)}" for key, value in values.items())


def _plain(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if " " in text else text


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
