"""Annotations: canonical, non-sensitive English terms with a confidence in [0, 1] (Pinterest section 3.2.1).

An annotator (``annotators``) proposes terms and scores them; this module counts the candidates of a part of the corpus
into a vocabulary, and keeps the annotations that reach the threshold.
"""

from collections.abc import Iterator

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.text.annotators import ANNOTATORS, Annotator
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.vocabulary import Vocabulary
from lookalike.data.text.wordlists import WordLists

_WORDS = ["title", "description", "keywords", "category", "annotations", "interactions"]
TEXT_COLUMNS = ["image_id", *_WORDS, "locale", "creator", "dataset", "split", "group"]
"""Columns of the corpus that are read; a column that a corpus lacks counts as empty."""
ANNOTATIONS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("term", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("split", pa.string()),
    ]
)
"""One row per image and term."""
COUNTS = pa.schema([("term", pa.string()), ("images", pa.int64())])
BATCH_ROWS = 16_384
BATCH_BYTES = 4 << 20


def make_annotator(config: AnnotationConfig) -> Annotator:
    """Return the annotator that the settings name."""
    return ANNOTATORS.get(config.annotator)(config)


def count_candidates(records: pa.Table, annotator: Annotator, lists: WordLists) -> Iterator[pa.Table]:
    """Tables of ``COUNTS`` to add up: the number of training rows that propose each term.

    Aliases are merged, and terms outside a supplied vocabulary are left out; ``frequent_terms`` checks the rest.
    """
    for piece in _pieces(records.filter(pc.equal(records["split"], "train"))):
        proposed = pl.DataFrame(annotator.candidates(piece))
        merged = proposed.select("row", pl.col("term").cast(pl.String).replace(lists.aliases)).unique()
        counts = merged.group_by("term").agg(images=pl.len())
        if lists.vocabulary is not None:
            counts = counts.filter(pl.col("term").is_in(lists.vocabulary))
        yield counts.to_arrow().cast(COUNTS)


def frequent_terms(counts: pa.Table, config: AnnotationConfig, lists: WordLists) -> pa.Table:
    """The rows of ``counts``, added up over the corpus, whose term may enter the vocabulary."""
    frequent = counts.select(COUNTS.names).filter(pc.greater_equal(counts["images"], config.min_images))
    return frequent.filter(pa.array([lists.accepts(term) for term in frequent["term"].to_pylist()], pa.bool_()))


def most_frequent(counts: pa.Table, max_terms: int | None) -> pa.Table:
    """The ``max_terms`` rows with the most images (None: all), ties in order of the term. Sorted by term."""
    order = [("images", "descending"), ("term", "ascending")]
    return counts.sort_by(order).slice(0, max_terms).sort_by("term")


def annotate(records: pa.Table, annotator: Annotator, vocabulary: Vocabulary) -> pa.Table:
    """``ANNOTATIONS`` of a part: in the order of the records, then by falling score, then by term."""
    min_score = annotator.config.min_score
    selected = [_select(piece, annotator.annotate(piece, vocabulary), min_score) for piece in _pieces(records)]
    return pa.concat_tables([ANNOTATIONS.empty_table(), *selected])


def _select(records: pa.Table, scored: pa.Table, min_score: float) -> pa.Table:
    frame = pl.DataFrame(scored).select("row", pl.col("term").cast(pl.String), pl.col("score").cast(pl.Float64))
    best = frame.filter(pl.col("score") >= min_score).group_by("row", "term").agg(pl.col("score").max())
    best = best.sort("row", "score", "term", descending=[False, True, False])
    images = pl.DataFrame(records.select(["image_id", "split"]))[best["row"]]
    return pl.concat([best, images], how="horizontal").select(ANNOTATIONS.names).to_arrow().cast(ANNOTATIONS)


def _pieces(records: pa.Table) -> Iterator[pa.Table]:
    """Slices with a bounded amount of text, so that memory does not grow with the part."""
    if records.num_rows > BATCH_ROWS or (records.nbytes > BATCH_BYTES and records.num_rows > 1):
        half = records.num_rows // 2
        yield from _pieces(records.slice(0, half))
        yield from _pieces(records.slice(half))
    elif records.num_rows:
        yield records
