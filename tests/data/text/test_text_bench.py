"""The benchmark compares like with like: two implementations of the text side say nearly the same."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lookalike.data.parts import add_up
from lookalike.data.text.annotations import COUNTS, annotate, count_candidates, frequent_terms
from lookalike.data.text.annotations import make_annotator as make
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.vocabulary import Vocabulary
from tests.benchmarks.text_polars import label
from tests.benchmarks.text_records import Generator


def test_polars_and_the_stage_agree_on_made_up_records(tmp_path: Path) -> None:
    paths = Generator(3).write(tmp_path, 1500)
    records, config = pq.read_table(paths[0]), AnnotationConfig(language=None)
    lists, annotator = config.lists(), make(config)
    counts = frequent_terms(add_up(count_candidates(records, annotator, lists), ["term"], COUNTS), config, lists)
    mined = dict(zip(*counts.to_pydict().values(), strict=True))
    vocabulary, annotations = label(paths, languages=False)
    other = dict(vocabulary.select("term", "images").iter_rows())
    merged = set(lists.aliases or ()) | set((lists.aliases or {}).values())
    assert {t: n for t, n in mined.items() if t not in merged} == {
        t: n for t, n in other.items() if lists.accepts(t) and t not in merged
    }
    found = annotate(records, annotator, Vocabulary(mined, lists.aliases))
    ours = {(row["image_id"], row["term"]): row["score"] for row in found.to_pylist()}
    ids = records["image_id"].to_pylist()
    theirs = {(ids[row["row"]], row["term"]): row["score"] for row in annotations.to_dicts()}
    common = ours.keys() & theirs.keys()
    assert len(common) > 0.97 * len(ours)
    same = sum(ours[key] == pytest.approx(theirs[key], abs=1e-6) for key in common)
    assert same > 0.99 * len(common)
