"""One engine of the retrieval comparison, in a separate process: build it, or open and measure it.

    python -m tests.benchmarks.engine_case build|search ENGINE FOLDER K

FOLDER holds ``vectors.npy``, ``queries.npy`` and ``truth.npy``; the engine gets ``FOLDER/engine``. Rows are written to
``FOLDER/rows.jsonl`` one by one, so that a crash or a time limit leaves the rows before it.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lookalike.retrieval.metrics import per_query_overlap
from lookalike.retrieval.ranking import Floats, Rows
from tests.benchmarks.engines import LIBRARIES, Engine, Search
from tests.benchmarks.engines_stores import STORES

ENGINES: dict[str, Engine] = {**LIBRARIES, **STORES}
PASSES, ENOUGH_S = 3, 40.0
"""Passes over all settings, so that a busy moment does not hit only one; fewer passes for slow engines."""


def find_engine(name: str) -> Engine:
    """An engine by name, or from another module as ``package.module:ATTRIBUTE``."""
    if ":" in name:
        module, _, attribute = name.partition(":")
        engine: Engine = getattr(importlib.import_module(module), attribute)
        return engine
    return ENGINES[name]


def one_core() -> None:
    """Keep this process on one core, even if the engine starts thread pools."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def resident_mb() -> float:
    """Resident memory of this process, including touched pages of memory-mapped files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def disk_mb(folder: Path) -> float:
    """Size of all files under ``folder``."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """(value, wall, processor time in s) of one run."""
    start, start_cpu = time.perf_counter(), time.process_time()
    value = run()
    return value, time.perf_counter() - start, time.process_time() - start_cpu


def one_by_one(search: Search, queries: Floats) -> tuple[Rows, Floats]:
    """(rows, seconds of each query)."""
    rows, times = [], []
    for place in range(len(queries)):
        start = time.perf_counter()
        rows.append(search(queries[place : place + 1]))
        times.append(time.perf_counter() - start)
    return np.concatenate(rows), np.array(times)


def measure(search: Search, queries: Floats, truth: Rows, *, batch: bool) -> dict[str, Any]:
    """Recall and times of one setting, queries one by one and, if the engine has a call for it, all at once."""
    one_by_one(search, queries[:20])  # opens what opens late
    (rows, times), wall, cpu = timed(lambda: one_by_one(search, queries))
    count = len(queries)
    row = {
        "recall": _recall(rows, truth),
        "qps": round(count / wall, 1),
        "cpu_us": round(cpu / count * 1e6, 1),
        "p50_us": round(float(np.percentile(times, 50)) * 1e6, 1),
        "p99_us": round(float(np.percentile(times, 99)) * 1e6, 1),
        "batch_recall": None,
        "batch_qps": None,
        "batch_cpu_us": None,
    }
    if batch:
        rows, wall, cpu = timed(lambda: search(queries))
        row |= {
            "batch_recall": _recall(rows, truth),
            "batch_qps": round(count / wall, 1),
            "batch_cpu_us": round(cpu / count * 1e6, 1),
        }
    return row


def _recall(rows: Rows, truth: Rows) -> float:
    return round(float(per_query_overlap(np.asarray(rows, np.int64), truth).mean()), 4)


def build(engine: Engine, folder: Path) -> None:
    """Build in ``folder/engine``; write seconds and size to ``folder/built.json``."""
    vectors = np.load(folder / "vectors.npy")
    importlib.import_module(engine.module)
    start = time.perf_counter()
    engine.build(vectors, str(folder / "engine"))
    facts = {"build_s": round(time.perf_counter() - start, 2), "disk_mb": round(disk_mb(folder / "engine"), 1)}
    (folder / "built.json").write_text(json.dumps(facts))


def search(engine: Engine, folder: Path, k: int) -> None:
    """Open ``folder/engine`` and measure each of its settings; the best of a few passes counts."""
    queries, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    settings = [setting for setting in engine.settings if setting.get("p", 0) < queries.shape[1]]
    if not settings:
        raise ValueError(f"{queries.shape[1]}-d vectors have none of the prefixes that its settings ask for")
    importlib.import_module(engine.module)
    before, start, rows = resident_mb(), time.perf_counter(), dict[str, dict[str, Any]]()
    prepare = engine.open(str(folder / "engine"), queries.shape[1])
    for _ in range(PASSES):
        for setting in settings:
            row, name = measure(prepare(k, **setting), queries, truth, batch=engine.batch), describe(setting)
            row |= {"setting": name, "rss_mb": round(resident_mb() - before, 1)}
            rows[name] = keep_best(rows[name], row) if name in rows else row
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
        if time.perf_counter() - start > ENOUGH_S:
            break


def keep_best(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher rates and lower times of two measurements of a setting; everything else from the later."""
    best = dict(other)
    for name, value in one.items():
        if value is not None and name.endswith(("qps", "_us")):
            best[name] = max(value, other[name]) if name.endswith("qps") else min(value, other[name])
    return best


def describe(setting: Any) -> str:
    """A setting in a few words."""
    return " ".join(f"{name}={value}" for name, value in setting.items()).replace("), (", "),(") or "all"


def main() -> None:
    """Run the command line, and exit without waiting for the engine's threads."""
    verb, name, folder, k = sys.argv[1:]
    one_core()
    if verb == "build":
        build(find_engine(name), Path(folder))
    else:
        search(find_engine(name), Path(folder), int(k))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
