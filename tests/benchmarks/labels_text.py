"""Benchmark (b) of the label pipeline: the whole text side, vocabulary and annotations, in records per CPU second.

    python -m tests.benchmarks.labels_text [--quick]

Each case runs in a process of its own on one thread, so that its peak memory is its own; records are made before and
not timed. ``lookalike`` runs the functions of the ``labels`` stage part by part; candidate counts are cut by a hash of
the term into files, as the stage's shuffle does, so that memory does not grow with the records. ``plain`` follows the
same rules one text at a time in Python, ``daft`` runs them as row functions and is skipped where it is not installed.
``lookalike_no_language`` identifies no language. CPU seconds are those of all threads.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from lookalike.data.parts import add_up, read_table, write_table
from lookalike.data.steps.text import read_text
from lookalike.data.text.annotations import (
    COUNTS,
    annotate,
    count_candidates,
    frequent_terms,
    make_annotator,
    most_frequent,
)
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.vocabulary import Vocabulary
from tests.benchmarks import text_daft, text_plain
from tests.benchmarks.text_records import Generator

SIZES, QUICK = (10_000, 100_000, 1_000_000), (10_000, 50_000)
COMPARED = 100_000  # records of the largest comparison
LARGEST = {"lookalike": SIZES[-1], "plain": COMPARED, "daft": COMPARED if find_spec("daft") else 0}
PARTS_PER_TASK, RECORDS_PER_PARTITION = 16, 50_000
SEED = 11
LIMITS = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DAFT_PROGRESS_BAR": "0"}


def run_stage(paths: list[str], config: AnnotationConfig) -> dict[str, Any]:
    """The stage's own functions over the parts: sizes of the vocabulary and the annotations, and the time of these."""
    annotator, lists = make_annotator(config), config.lists()
    partitions = max(1, len(paths) * 10_000 // RECORDS_PER_PARTITION)
    with tempfile.TemporaryDirectory(dir=Path(paths[0]).parents[1]) as folder:
        work = Path(folder)
        for group in range(0, len(paths), PARTS_PER_TASK):
            records = chain.from_iterable(read_text(path) for path in paths[group : group + PARTS_PER_TASK])
            candidates = chain.from_iterable(count_candidates(batch, annotator, lists) for batch in records)
            for number, share in enumerate(_shuffle(add_up(candidates, ["term"], COUNTS), partitions)):
                write_table(str(work / f"counts-{number}" / f"{group}.parquet"), share)
        frequent = []
        for number in range(partitions):
            files = sorted((work / f"counts-{number}").iterdir())
            share = add_up((read_table(str(file)) for file in files), ["term"], COUNTS)
            frequent.append(frequent_terms(share, config, lists))
        mined_s = time.process_time()
        terms = most_frequent(pa.concat_tables(frequent), None)["term"].to_pylist()
        vocabulary, rows = Vocabulary(terms, lists.aliases), 0
        for number, path in enumerate(paths):
            annotations = pa.concat_tables([annotate(batch, annotator, vocabulary) for batch in read_text(path)])
            write_table(str(work / "annotations" / f"{number}.parquet"), annotations)
            rows += annotations.num_rows
        return {"terms": len(vocabulary), "annotations": rows, "annotate_s": time.process_time() - mined_s}


def _shuffle(counts: pa.Table, partitions: int) -> Iterator[pa.Table]:
    share = (pl.Series(counts["term"].combine_chunks()).hash(SEED) % partitions).to_numpy()
    for number in range(partitions):
        yield counts.take(np.flatnonzero(share == number))


RUNNERS = {"lookalike": run_stage, "plain": text_plain.run, "daft": text_daft.run}
CASES = (("lookalike", True), ("plain", True), ("daft", True), ("lookalike", False))


def run_case(engine: str, languages: bool, folder: Path) -> dict[str, Any]:
    """One case in this process; imports and the language model are loaded before the clock starts."""
    config = AnnotationConfig() if languages else AnnotationConfig(language=None)
    pa.set_cpu_count(1)
    warm = pa.table({"image_id": ["a"], "title": ["A red sofa in the living room"], "split": ["train"]})
    annotate(warm, make_annotator(AnnotationConfig()), Vocabulary(["sofa"]))
    if engine != "lookalike":
        text_plain.language_model()
    paths = [str(path) for path in sorted(folder.glob("part-*.parquet"))]
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    figures = RUNNERS[engine](paths, config)
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
    records = sum(pq.read_metadata(path).num_rows for path in paths)
    return {
        "engine": engine,
        "records": records,
        "records_per_cpu_s": round(records / cpu_s),
        "us_per_record": round(cpu_s / records * 1e6, 1),
        "cpu_s": round(cpu_s, 2),
        "wall_s": round(wall_s, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "rss_before_mb": round(before_mb),
        **{name: round(value, 2) for name, value in figures.items()},
    }


def _spawn(engine: str, languages: bool, folder: Path) -> dict[str, Any]:
    name = engine if languages else f"{engine}_no_language"
    command = [sys.executable, "-m", "tests.benchmarks.labels_text", "--case", engine, "--folder", str(folder)]
    done = subprocess.run(
        command + ([] if languages else ["--no-language"]),
        env={**os.environ, **LIMITS},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"bench": "labels_text", "case": name, "failed": done.stderr.strip().splitlines()[-1:]}
    return {"bench": "labels_text", "case": name, **json.loads(done.stdout.splitlines()[-1])}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """One row per case, then the ratios."""
    sizes = QUICK if quick else SIZES
    generator = Generator(SEED)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            parts = Path(folder) / str(size)
            generator.write(parts, size)
            for engine, languages in CASES:
                if size <= LARGEST[engine] and (languages or size <= COMPARED):
                    row = _spawn(engine, languages, parts)
                    results[row["case"], size] = row
                    yield row
    if not LARGEST["daft"]:
        yield {"bench": "labels_text", "case": "daft", "skipped": "not installed; see labels-requirements.txt"}
    yield {"bench": "labels_text", "summary": True, "ratios": _ratios(results, sizes), "cpus": os.cpu_count()}


def _ratios(results: dict[tuple[str, int], dict[str, Any]], sizes: tuple[int, ...]) -> dict[str, float]:
    compared = max(size for size in sizes if size <= COMPARED)
    cost = {key: row["us_per_record"] for key, row in results.items() if "us_per_record" in row}
    pairs = {
        "text_vs_plain": (("plain", compared), ("lookalike", compared)),
        "text_vs_daft": (("daft", compared), ("lookalike", compared)),
        "growth_1m_over_10k": (("lookalike", 1_000_000), ("lookalike", 10_000)),
        "growth_largest_over_smallest": (("lookalike", sizes[-1]), ("lookalike", sizes[0])),
    }
    return {
        name: round(cost[over] / cost[under], 2)
        for name, (over, under) in pairs.items()
        if over in cost and under in cost
    }


def main() -> None:
    """Print the rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", choices=list(RUNNERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--no-language", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, not options.no_language, options.folder)))
        return
    for row in rows(options.quick):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
