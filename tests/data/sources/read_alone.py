"""Read a source in this process and print what came of it, with the memory that reading took.

    python -m tests.data.sources.read_alone URI FORMAT SETTINGS-AS-JSON

Prints a JSON object: records, reasons with a detail of each, the error if one ended the source, and growth_mb, the peak
of resident memory above that before.
"""

import json
import sys
from collections import Counter
from importlib import import_module
from typing import Any

from lookalike.data.sources import SOURCE_FORMATS, RecordSource
from lookalike.data.sources.ingest import take_records
from lookalike.data.sources.reader import DETAIL, UNREADABLE
from lookalike.errors import CorpusError


def read_all(uri: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Read every record in batches, as a task does, and forget it."""
    source = RecordSource.model_validate({"uri": uri, "format": kind, "dataset": "d", **settings})
    reader = SOURCE_FORMATS.get(kind)(source, 20_000_000)
    reasons: Counter[str] = Counter()
    details: dict[str, str] = {}
    ids: list[str] = []
    records, error = 0, None
    if kind == "lance":
        import_module("lance")
    before = peak_mb()
    try:
        for file in reader.files():
            for unit in reader.units(file, 2048):
                unread = reader.records(json.loads(json.dumps(unit)))
                while batch := list(take_records(unread)):
                    records += len(batch)
                    ids += [_text(record["image_id"]) for record in batch if UNREADABLE not in record][-1:]
                    for record in batch:
                        if UNREADABLE in record:
                            reasons[record[UNREADABLE]] += 1
                            details[record[UNREADABLE]] = record[DETAIL][:300]
    except CorpusError as problem:
        error = str(problem)[:300]
    found = {"records": records, "reasons": dict(reasons), "details": details, "error": error, "last": ids[-1:]}
    return {**found, "growth_mb": peak_mb() - before}


def peak_mb() -> int:
    """Most resident memory so far, MB; unlike ``ru_maxrss`` not that of the process before ``exec``."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) >> 10 for line in file if line.startswith("VmHWM"))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    print(json.dumps(read_all(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
