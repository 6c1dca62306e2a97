"""Attacks on a running service and on what it reads; each script prints a JSON row per promise.

    python -m tests.trials.NAME [--quick]

A script has ``run(...)``, which yields ``Row``s, and a soak test ``test_NAME.py`` that fails unless each is kept.
Attackers are bounded and stop by themselves; they reach only what the script has started.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple


class Row(NamedTuple):
    """One promise, and what happened."""

    case: str
    promised: str
    seen: str
    kept: bool


def print_rows(trial: str, rows: Iterable[Row]) -> bool:
    """Print each row as a JSON line as it comes; return whether every promise was kept, of at least one."""
    kept = []
    for row in rows:
        print(json.dumps({"trial": trial, **row._asdict()}), flush=True)
        kept.append(row.kept)
    return bool(kept) and all(kept)
