"""The comparison of engines: its runner with ours, faiss and engines that misbehave, its ratios, its plot."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lookalike.retrieval.ranking import Floats, Rows
from tests.benchmarks import retrieval_engines as bench
from tests.benchmarks.engine_case import describe, keep_best
from tests.benchmarks.engines import Engine, Search
from tests.synthetic import make_vectors, publish_embeddings

HERE = "tests.retrieval.test_engines_bench"
FIGURES = set(
    "engine setting recall qps cpu_us p50_us p99_us batch_recall batch_qps batch_cpu_us rss_mb build_s disk_mb".split()  # noqa: SIM905
)


def build_copy(vectors: Floats, folder: str) -> None:
    np.save(f"{folder}/copy.npy", vectors)


def open_scan(folder: str, dim: int) -> Callable[..., Search]:
    """Brute force that leaves out the last ``lost`` of the k."""
    vectors = np.load(f"{folder}/copy.npy")
    assert vectors.shape[1] == dim

    def prepare(k: int, lost: int, dies: bool = False) -> Search:
        def search(queries: Floats) -> Rows:
            if dies:
                os.kill(os.getpid(), signal.SIGSEGV)
            rows = np.argsort(-queries @ vectors.T, axis=1)[:, :k].astype(np.int64)
            rows[:, k - lost :] = -1
            return rows

        return search

    return prepare


def hang(vectors: Floats, folder: str) -> None:
    time.sleep(600)


def fail(vectors: Floats, folder: str) -> None:
    raise ValueError(f"cannot take {len(vectors)} vectors")


LOSES = Engine("numpy", build_copy, open_scan, ({"lost": 0}, {"lost": 3}), batch=False)
CRASHES = Engine("numpy", build_copy, open_scan, ({"lost": 1}, {"lost": 0, "dies": True}, {"lost": 0}))
HANGS = Engine("numpy", hang, open_scan, ({"lost": 0},))
FAILS = Engine("numpy", fail, open_scan, ({"lost": 0},))
ABSENT = Engine("no_such_engine.index", build_copy, open_scan, ({"lost": 0},))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """300 vectors of 16-d, 20 queries and the exact answers, as the runner lays them out."""
    vectors, _ = make_vectors(320, 16, seed=3)
    data, queries = bench.split(vectors, 20, seed=1)
    for name, array in (("vectors", data), ("queries", queries), ("truth", bench.exact_rows(data, queries, 10))):
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def run(name: str, folder: Path, timeout_s: float = 60.0) -> list[dict[str, Any]]:
    return list(bench.run_engine(name, folder, 10, timeout_s))


def test_ours_and_faiss_give_a_row_a_setting_and_ratios(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    engines = ["ours", "ours-full", "faiss-exact", "faiss-hnsw64-refine", "faiss-rabitq128-refine", f"{HERE}:ABSENT"]
    sizes = ["--num", "2000", "--dim", "160", "--queries", "30", "--plot", str(tmp_path / "plot.png")]
    bench.main(["--engines", *engines, *sizes])
    *rows, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    measured = [row for row in rows if "missing" not in row]
    facts = {"bench", "num", "dim", "queries", "k", "seed", "vectors"}
    assert all(set(row) == FIGURES | facts for row in measured), "a row lacks a figure"
    assert all(0 < row["p50_us"] <= row["p99_us"] and row["disk_mb"] > 0 and row["batch_qps"] > 0 for row in measured)
    best = {engine: max(row["recall"] for row in measured if row["engine"] == engine) for engine in engines[:5]}
    assert best["faiss-exact"] == 1.0
    assert min(best.values()) > 0.95, best
    assert [row["engine"] for row in rows if "missing" in row] == [f"{HERE}:ABSENT"]
    single = last["qps_vs_best_other"]["single"]["0.95"]
    assert single["ratio"] > 0
    assert single["ours"].startswith("ours")
    assert single["other"].startswith("faiss-")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_recall_is_the_share_of_the_exact_rows_that_an_engine_found(folder: Path) -> None:
    data, queries, truth = (np.load(folder / f"{name}.npy") for name in ("vectors", "queries", "truth"))
    np.testing.assert_array_equal(truth, np.argsort(-queries @ data.T, axis=1)[:, :10])
    rows = run(f"{HERE}:LOSES", folder)
    assert [(row["setting"], row["recall"]) for row in rows] == [("lost=0", 1.0), ("lost=3", 0.7)]
    assert all(row["batch_qps"] is None and row["batch_recall"] is None for row in rows)
    assert rows[0]["disk_mb"] == pytest.approx((data.nbytes + 128) / 1e6, abs=0.05)


def test_a_crash_keeps_the_rows_before_it(folder: Path) -> None:
    measured, died = run(f"{HERE}:CRASHES", folder)
    assert (measured["setting"], measured["recall"]) == ("lost=1", 0.9)
    assert died["error"] == "search died of SIGSEGV"
    assert died["build_s"] >= 0


def test_an_engine_that_hangs_or_fails_gives_its_error_and_the_next_starts_afresh(folder: Path) -> None:
    assert run(f"{HERE}:HANGS", folder, 2.0) == [{"engine": f"{HERE}:HANGS", "error": "build ran out of time"}]
    (row,) = run(f"{HERE}:FAILS", folder)
    assert row["error"] == "build failed: ValueError: cannot take 300 vectors"
    (row,) = run(f"{HERE}:ABSENT", folder)
    assert row["missing"].startswith("no_such_engine is not installed: pip install -r tests/benchmarks/")
    (row,) = run("ours", folder)
    assert row["error"] == "search failed: ValueError: 16-d vectors have none of the prefixes that its settings ask for"
    assert [row["recall"] for row in run(f"{HERE}:LOSES", folder)] == [1.0, 0.7]


def measured(engine: str, setting: str, recall: float, qps: float, batch_qps: float | None = None) -> dict[str, Any]:
    return {
        "engine": engine,
        "setting": setting,
        "recall": recall,
        "qps": qps,
        "cpu_us": 1e6 / qps,
        "batch_recall": None if batch_qps is None else recall,
        "batch_qps": batch_qps,
        "batch_cpu_us": None if batch_qps is None else 5e5 / batch_qps,
    }


ROWS = [
    measured("ours", "a", 0.999, 100, 900),
    measured("ours", "b", 0.99, 300, 700),
    measured("ours", "c", 0.96, 800, 2000),
    measured("x", "a", 0.995, 150),
    measured("y", "a", 0.989, 5000, 6000),
    measured("y", "b", 0.9, 1e6, 1e6),
    {"engine": "z", "error": "search died of SIGSEGV"},
    {"engine": "w", "missing": "w is not installed"},
]


def test_ratios_compare_the_fastest_at_the_same_recall() -> None:
    summary = bench.summarise(ROWS)
    assert summary["qps_vs_best_other"] == {
        "single": {
            "0.99": {"ratio": 2.0, "ours": "ours b", "other": "x a"},
            "0.95": {"ratio": 0.16, "ours": "ours c", "other": "y a"},
        },
        "batch": {
            "0.99": {"ratio": None, "ours": "ours a", "other": None},
            "0.95": {"ratio": 0.33, "ours": "ours c", "other": "y a"},
        },
    }
    assert summary["cpu_vs_best_other"] == summary["qps_vs_best_other"], "processor time falls as the rate rises"


def test_the_frontier_leaves_out_what_another_point_beats_in_both() -> None:
    points = [(0.9, 50.0), (0.95, 40.0), (0.94, 30.0), (0.99, 10.0), (0.99, 5.0), (0.5, 49.0)]
    assert bench.frontier(points) == [(0.9, 50.0), (0.95, 40.0), (0.99, 10.0)]
    assert bench.frontier([]) == []


def test_real_vectors_come_from_an_embeddings_artifact(tmp_path: Path) -> None:
    vectors, _ = make_vectors(50, 16, seed=1)
    ids = {"image_id": [f"{row:03d}" for row in range(50)]}
    artifact = publish_embeddings(str(tmp_path), "test", vectors, ids, dims=(8, 16))
    read = bench.read_embeddings(artifact.uri)
    np.testing.assert_array_equal(read, vectors)
    data, queries = bench.split(read, 10, seed=4)
    both = np.concatenate([data, queries])
    assert (len(data), len(queries), len(np.unique(both, axis=0))) == (40, 10, 50)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)


def test_unknown_engines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--engines", "hnswlip"])
    assert "no engines ['hnswlip']; there are ours, ours-int8," in capsys.readouterr().err


def test_the_best_of_the_passes_counts() -> None:
    first = {"setting": "a", "qps": 10.0, "p99_us": 5.0, "batch_qps": None, "rss_mb": 1.0}
    second = {"setting": "a", "qps": 9.0, "p99_us": 4.0, "batch_qps": None, "rss_mb": 2.0}
    assert keep_best(first, second) == {**second, "qps": 10.0}
    assert describe({"p": 64, "steps": ((512, 25), (1024, 9))}) == "p=64 steps=((512, 25),(1024, 9))"
