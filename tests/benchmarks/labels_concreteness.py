"""Concreteness of many terms at once against scikit-learn's MLPClassifier term by term, on the same samples and folds.

    python -m tests.benchmarks.labels_concreteness [--quick] [--sketch FOLDER]

Synthetic features have the falling spectrum of real embeddings; terms are graded from invisible to plain, half of them
with two senses. Both sides use one thread and are timed by turns, in processor time. scikit-learn runs twice: by its
defaults, and with our number of steps and learning rate (its cheapest setting of like accuracy). ``--sketch`` adds the
terms of a folder ``sketch-B`` from the work folder of a ``labels`` run, real features. One JSON object a line.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lookalike import storage
from lookalike.data.dictionary.concreteness import score_terms, stack_samples
from lookalike.data.dictionary.scores import ProbeConfig, digest
from lookalike.data.dictionary.sketch import Pools, Sample, assign_folds, choose_samples
from lookalike.data.parts import read_table
from lookalike.retrieval.machine import machine_facts

TERMS = 218_879  # of the paper's dictionary
CONFIG = ProbeConfig()
SEED = 17


class Size(NamedTuple):
    """Features and positives of a term; there are as many negatives."""

    dim: int
    positives: int


SIZES = (Size(128, 96), Size(512, 256))


def make_samples(count: int, size: Size, seed: int) -> list[Sample]:
    """Terms of rising visibility: positives are shifted along directions within the strongest third of the spectrum."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, size.dim + 1) ** -0.5
    folds = assign_folds(np.arange(2 * size.positives, dtype=np.uint64), CONFIG.folds)
    mix = np.linalg.qr(rng.normal(size=(size.dim, size.dim)))[0]
    samples = []
    for number in range(count):
        sides = rng.normal(size=(2, size.positives, size.dim))
        directions = rng.normal(size=(1 + number % 2, size.dim)) * (np.arange(size.dim) < size.dim // 3)
        directions *= 6 * number / max(count - 1, 1) / np.linalg.norm(directions, axis=1, keepdims=True)
        sides[0] += directions[rng.integers(0, len(directions), size.positives)]
        positives, negatives = (sides * spectrum @ mix).astype(np.float16)
        samples.append(Sample(positives, negatives, folds))
    return samples


def read_samples(folder: str, count: int) -> list[Sample]:
    """``count`` terms with the most samples of a sketch folder; its last part holds the pools."""
    *parts, pools = [read_table(storage.join(folder, name)) for name in storage.list_files(folder)]
    found = [chosen.sample for chosen in choose_samples(pa.concat_tables(parts), Pools(pools), CONFIG.folds, SEED)]
    return sorted(found, key=lambda sample: -len(sample.positives))[:count]


def ours(samples: list[Sample], device: str = "cpu") -> NDArray[np.int64]:
    """Hits of all terms, with the digests that a run stores."""
    for sample in samples:
        digest(sample, CONFIG, SEED)
    return score_terms(samples, CONFIG, SEED, device)


def theirs(samples: list[Sample], **settings: Any) -> NDArray[np.int64]:
    """Hits by scikit-learn on the same standardised features and folds."""
    from sklearn.neural_network import MLPClassifier

    hits = []
    for sample in samples:
        x, target, fold = (tensor[0].numpy() for tensor in stack_samples([sample], "cpu"))
        right = 0
        for number in range(CONFIG.folds):
            train, held = (fold >= 0) & (fold != number), fold == number
            if len(set(target[train].tolist())) < 2:  # ours then calls everything what the training samples are
                right += int((target[held] == target[train][0]).sum())
                continue
            counts = np.bincount(target[train].astype(int))
            weight = (len(target[train]) / 2 / counts)[target[train].astype(int)]  # both sides weigh half, as with us
            model = MLPClassifier((CONFIG.hidden,), random_state=SEED, **settings)
            model.fit(x[train], target[train], sample_weight=weight)
            right += int((model.predict(x[held]) == target[held]).sum())
        hits.append(right)
    return np.array(hits, np.int64)


def measure(run: Callable[[], NDArray[np.int64]]) -> tuple[float, NDArray[np.int64]]:
    """Seconds of processor time, and the hits."""
    start = time.process_time()
    hits = run()
    return time.process_time() - start, hits


def compare(name: str, samples: list[Sample], repeats: int, compared: int) -> dict[str, Any]:
    """One row: terms/s and accuracy of both sides; scikit-learn gets every n-th of our terms, ``compared`` in all."""
    trials = np.array([2 * len(sample.positives) for sample in samples])
    rows = np.linspace(0, len(samples) - 1, compared).astype(int)
    few = [samples[row] for row in rows]
    same = {"max_iter": CONFIG.steps, "learning_rate_init": CONFIG.learning_rate, "batch_size": int(trials.max())}
    cases: dict[str, Callable[[], NDArray[np.int64]]] = {
        "ours": lambda: ours(samples),
        "defaults": lambda: theirs(few),
        "same": lambda: theirs(few, **same),
    }
    times: dict[str, list[float]] = {case: [] for case in cases}
    hits = {}
    for _ in range(repeats):
        for case, run in cases.items():
            seconds, hits[case] = measure(run)
            times[case].append(seconds / len(hits[case]))
    accuracy = hits.pop("ours")[rows] / trials[rows]
    accuracies = {case: found / trials[rows] for case, found in hits.items()}
    cost = {case: median(values) for case, values in times.items()}
    return {
        "case": name,
        "terms": len(samples),
        "dim": samples[0].positives.shape[1],
        "samples_per_term": int(trials.max()),
        "terms_per_s": round(1 / cost["ours"], 1),
        **{f"sklearn_{case}_terms_per_s": round(1 / cost[case], 2) for case in accuracies},
        "accuracy": round(float(accuracy.mean()), 4),
        **{f"sklearn_{case}_accuracy": round(float(found.mean()), 4) for case, found in accuracies.items()},
        "accuracy_gap_points": round(100 * float(accuracy.mean() - accuracies["defaults"].mean()), 2),
        "correlation": round(float(np.corrcoef(accuracy, accuracies["defaults"])[0, 1]), 3),
        "concreteness_speedup": round(cost["defaults"] / cost["ours"], 1),
        "speedup_at_same_steps": round(cost["same"] / cost["ours"], 1),
        f"hours_for_{TERMS}_terms_per_core": round(TERMS * cost["ours"] / 3600, 2),
    }


def on_device(terms: int, distinct: int) -> dict[str, Any]:
    """Seconds for ``terms`` terms, ``distinct`` ones again and again, on the GPU; digests and transfers included."""
    size = SIZES[1]
    row = {"case": "device", "terms": terms, "dim": size.dim, "samples_per_term": 2 * size.positives}
    if not torch.cuda.is_available():
        return {**row, "skipped": "no GPU on this machine"}
    samples = make_samples(distinct, size, SEED)
    on_cpu, on_gpu = ours(samples[:32]), ours(samples[:32], "cuda")
    start = time.perf_counter()
    for _ in range(-(-terms // distinct)):
        ours(samples, "cuda")
    return {
        **row,
        "device": torch.cuda.get_device_name(),
        "seconds": round(time.perf_counter() - start, 1),
        "accuracy_gap_to_cpu_points": round(100 * float((on_gpu - on_cpu).mean()) / row["samples_per_term"], 3),
    }


def rows(quick: bool, sketch: str | None = None) -> Iterator[dict[str, Any]]:
    """A row for each size, real features where a sketch is given, and the device."""
    repeats = 1 if quick else 3
    for size in SIZES:
        count = (4096 if size.dim == 128 else 512) // (8 if quick else 1)
        name = f"{size.dim}-d, {size.positives}+{size.positives}"
        yield compare(name, make_samples(count, size, SEED), repeats, 12 if quick else 32)
    if sketch is not None:
        yield compare("sample corpus", read_samples(sketch, 60 if quick else 400), repeats, 12 if quick else 60)
    yield on_device(TERMS // 64 if quick else TERMS, 64 if quick else 1024)


def main() -> int:
    """Print the rows and the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the terms, once")
    parser.add_argument("--sketch", help="folder sketch-B of a labels run, for real features")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="sklearn")
    threadpool_limits(1)
    facts = {
        "bench": "labels_concreteness",
        "seed": SEED,
        "threads": 1,
        "probe": CONFIG.identity(),
        "machine": machine_facts(),
    }
    found = []
    for row in rows(options.quick, options.sketch):
        found.append(row)
        print(json.dumps(facts | row), flush=True)
    ratios = {
        f"{name} ({row['case']})": row[name]
        for row in found
        if "accuracy_gap_points" in row
        for name in ("concreteness_speedup", "speedup_at_same_steps", "accuracy_gap_points")
    }
    print(json.dumps(facts | {"summary": True, "ratios": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
