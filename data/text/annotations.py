"""Step 1, annotations: canonical, non-sensitive English terms with a confidence in [0, 1] (Pinterest section 3.2.1).

An annotator (``annotators``) proposes terms and scores them; here they are counted into a vocabulary and cut at the
threshold. Both are functions on a part of the corpus.
"""

from collections.abc import Iterator

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.text.annotators import ANNOTATORS, Annotator
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.vocabulary import Vocabulary
from lookalike.data.text.wordlists import WordLists

TEXT_COLUMNS = [
    "image_id",
    "title",
    "description",
    "keywords",
    "category",
    "locale",
    "creator",
    "dataset",
    "split",
    "group",
    "annotations",
    "interactions",
]
"""Columns of the corpus that are read; those a corpus lacks count as empty."""
ANNOTATIONS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("term", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("split", pa.string()),
    ]
)
"""One row a term of an image."""
COUNTS = pa.schema([("term", pa.string()), ("images", pa.int64())])
BATCH_ROWS = 16_384
BATCH_BYTES = 4 << 20


def make_annotator(config: AnnotationConfig) -> Annotator:
    """The annotator that the settings name."""
    return ANNOTATORS.get(config.annotator)(config)


def count_candidates(records: pa.Table, annotator: Annotator, lists: WordLists) -> Iterator[pa.Table]:
    """``COUNTS``, in pieces that add up: how many of the training rows propose each term.

    Aliases are merged, terms outside a supplied vocabulary left out; ``frequent_terms`` refuses the unfit.
    """
    for piece in _pieces(records.filter(pc.equal(records["split"], "train"))):
        proposed = pl.DataFrame(annotator.candidates(piece))
        merged = proposed.select("row", pl.col("term").cast(pl.String).replace(dict(lists.aliases or {}))).unique()
        counts = merged.group_by("term").agg(images=pl.len())
        if lists.vocabulary is not None:
            counts = counts.filter(pl.col("term").is_in(lists.vocabulary))
        yield counts.to_arrow().cast(COUNTS)


def frequent_terms(counts: pa.Table, config: AnnotationConfig, lists: WordLists) -> pa.Table:
    """The rows of complete ``COUNTS`` whose term may enter the vocabulary."""
    frequent = counts.select(COUNTS.names).filter(pc.greater_equal(counts["images"], config.min_images))
    return frequent.filter(pa.array([lists.accepts(term) for term in frequent["term"].to_pylist()], pa.bool_()))


def most_frequent(counts: pa.Table, max_terms: int | None) -> pa.Table:
    """The ``max_terms`` rows with the most images, equal ones by term; all when None. Sorted by term."""
    order = [("images", "descending"), ("term", "ascending")]
    return counts.sort_by(order).slice(0, max_terms).sort_by("term")


def annotate(records: pa.Table, annotator: Annotator, vocabulary: Vocabulary) -> pa.Table:
    """``ANNOTATIONS`` of a part, in row order and by falling score, then term."""
    found = [
        _select(piece, annotator.annotate(piece, vocabulary), annotator.config.min_score) for piece in _pieces(records)
    ]
    return pa.concat_tables([ANNOTATIONS.empty_table(), *found])


def _select(records: pa.Table, named: pa.Table, min_score: float) -> pa.Table:
    frame = pl.DataFrame(
        pl.from_arrow(named.cast(pa.schema([("row", pa.int64()), ("term", pa.string()), ("score", pa.float64())])))
    )
    best = frame.filter(pl.col("score") >= min_score).group_by("row", "term").agg(pl.col("score").max())
    best = best.sort("row", "score", "term", descending=[False, True, False])
    of = records.select(["image_id", "split"]).take(best["row"].to_arrow())
    return pa.table(
        [
            of["image_id"],
            best["term"].to_arrow().cast(pa.string()),
            best["score"].cast(pl.Float32).to_arrow(),
            of["split"],
        ],
        schema=ANNOTATIONS,
    )


def _pieces(records: pa.Table) -> Iterator[pa.Table]:
    """Slices of bounded text, so that memory does not grow with the part."""
    if records.num_rows > BATCH_ROWS or (records.nbytes > BATCH_BYTES and records.num_rows > 1):
        half = records.num_rows // 2
        yield from _pieces(records.slice(0, half))
        yield from _pieces(records.slice(half))
    elif records.num_rows:
        yield records
