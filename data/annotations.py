"""Step 1, annotations: canonical, non-sensitive English terms with a confidence in [0, 1] (Pinterest section 3.2.1).

Two annotators stand behind one registry. ``lexical`` reads every text field of a record against a vocabulary mined
from the training rows; ``precomputed`` takes the ``keywords`` column as the output of the user's own keyword model.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from lookalike.config import Config
from lookalike.data.terms import apply_alias, canonical, match_terms, ngrams
from lookalike.registry import Registry

TEXT_COLUMNS = ["image_id", "title", "description", "keywords", "category", "locale", "creator", "dataset", "split",
                "group"]  # fmt: skip
ANNOTATIONS = pa.schema([
    pa.field("image_id", pa.string(), nullable=False), pa.field("term", pa.string(), nullable=False),
    pa.field("score", pa.float32(), nullable=False), pa.field("split", pa.string()),
])  # fmt: skip
"""One row a term of an image."""
COUNTS = pa.schema([("term", pa.string()), ("images", pa.int64())])
FREE_TEXT = ("title", "description")
MIN_WORDS_TO_IDENTIFY = 4
NOT_ENGLISH_CONFIDENCE = 0.9

Row = Mapping[str, Any]
Annotator = Callable[[Row, frozenset[str], "AnnotationConfig"], dict[str, float]]
ANNOTATORS: Registry[Annotator] = Registry("annotator")


class AnnotationConfig(Config):
    """How text becomes scored terms."""

    annotator: str = "lexical"
    """Name in the registry ``lookalike.annotator``."""
    field_weights: dict[Literal["title", "description", "keywords", "category"], float] = Field(
        default={"keywords": 0.7, "title": 0.6, "category": 0.6, "description": 0.35}
    )
    """Probability that a term a field names is true of the picture; fields combine as noisy-or. The fields left out
    are not read."""
    min_score: float = Field(0.5, ge=0, le=1)
    """Annotations below are discarded."""
    high_confidence: float = Field(0.6, ge=0, le=1)
    """Images at or above are positives of the visual dictionary."""
    min_images: int = Field(8, ge=1)
    """Training images a term must be named by to enter the vocabulary."""
    language: str | None = Field("en", min_length=2, max_length=2)
    """Free text in another language is not read; None reads all."""
    aliases: dict[str, str] = Field(default={})
    """Canonical term -> the canonical term it is merged into."""
    stop_terms: tuple[str, ...] = ()
    """Terms of this corpus that say nothing about pictures, beside the packaged boilerplate list."""


def is_acceptable(term: str, stop_terms: tuple[str, ...] = ()) -> bool:
    """Whether a term is neither sensitive nor boilerplate nor one of ``stop_terms``."""
    sensitive, boilerplate = _listed("sensitive.txt"), _listed("boilerplate.txt")
    if term in stop_terms or term in sensitive or term in boilerplate:
        return False
    return not any(word in sensitive or f"* {word}" in boilerplate for word in term.split(" "))


@cache
def _listed(name: str) -> frozenset[str]:
    lines = files("lookalike.data").joinpath(name).read_text(encoding="ascii").splitlines()
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_DIR, MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_modelpath(MODEL_DIR / MODEL_FILE, norm_probs=True)


def in_language(text: str, locale: str | None, language: str | None) -> bool:
    """Whether ``text`` may be read as ``language``: identified when it has enough words, else its locale decides."""
    if language is None:
        return True
    hint = (locale or language).strip().lower()
    foreign_hint = not hint.startswith((language, "all", "n/a", "any"))
    if len(text.split()) < MIN_WORDS_TO_IDENTIFY:
        return not foreign_hint
    found, confidence = _identifier().classify(text)
    if found == language:
        return True
    return not foreign_hint and float(confidence) < NOT_ENGLISH_CONFIDENCE


def readable_fields(row: Row, config: AnnotationConfig) -> Iterator[tuple[str, float, list[str]]]:
    """(field, weight, texts) of each field to read; a category path gives its parts, deepest last."""
    for field, weight in config.field_weights.items():
        value = row.get(field)
        if not value:
            continue
        if field in FREE_TEXT:
            if in_language(value, row.get("locale"), config.language):
                yield field, weight, [value]
        else:
            yield field, weight, value.split("/") if field == "category" else [text for text in value if text]


def own_names(row: Row) -> set[str]:
    """Terms that name the record's creator or data set: they say who made the picture."""
    return {term for field in ("creator", "dataset") for term in ngrams(row.get(field) or "")}


def candidate_terms(row: Row, config: AnnotationConfig) -> set[str]:
    """Terms the record proposes for the vocabulary, from the fields that can make an annotation by themselves."""
    found: set[str] = set()
    for field, weight, texts in readable_fields(row, config):
        for text in texts if weight >= config.min_score else ():
            if field in FREE_TEXT:
                found |= ngrams(text)
            elif (term := canonical(text)) is not None:
                found.add(term)
    merged = {apply_alias(term, config.aliases) for term in found - own_names(row)}
    return {term for term in merged if is_acceptable(term, config.stop_terms)}


def count_candidates(table: pa.Table, config: AnnotationConfig) -> pa.Table:
    """``COUNTS`` of a part: in how many of its training rows each candidate occurs. Parts add up."""
    counts: Counter[str] = Counter()
    for row in table.to_pylist():
        if row["split"] == "train":
            counts.update(candidate_terms(row, config))
    terms = sorted(counts)
    return pa.table([pa.array(terms, pa.string()), pa.array([counts[t] for t in terms], pa.int64())], schema=COUNTS)


@ANNOTATORS.register("lexical")
def annotate_lexically(row: Row, vocabulary: frozenset[str], config: AnnotationConfig) -> dict[str, float]:
    """Term -> 1 - prod(1 - weight) over the fields that name it."""
    doubt: dict[str, float] = {}
    own = own_names(row)
    for field, weight, texts in readable_fields(row, config):
        for term in _named(field, texts, vocabulary, config) - own:
            doubt[term] = doubt.get(term, 1.0) * (1.0 - weight)
    return {term: 1.0 - rest for term, rest in doubt.items()}


def _named(field: str, texts: list[str], vocabulary: frozenset[str], config: AnnotationConfig) -> set[str]:
    found: set[str] = set()
    for text in texts:
        if field in FREE_TEXT:
            found |= match_terms(text, vocabulary)
        elif (term := canonical(text)) is not None:
            merged = apply_alias(term, config.aliases)  # a phrase chosen as such means itself: a living room is no room
            found |= {merged} if merged in vocabulary else match_terms(text, vocabulary)
    merged_terms = {apply_alias(term, config.aliases) for term in found}
    return {term for term in merged_terms if term in vocabulary}


@ANNOTATORS.register("precomputed")
def take_precomputed(row: Row, vocabulary: frozenset[str], config: AnnotationConfig) -> dict[str, float]:
    """Term -> confidence from keywords of the form ``term`` (confidence 1) or ``term:0.83``."""
    scores: dict[str, float] = {}
    for keyword in row.get("keywords") or []:
        text, _, tail = keyword.rpartition(":")
        try:
            score = min(1.0, max(0.0, float(tail))) if text else 1.0
        except ValueError:
            text, score = keyword, 1.0
        term = canonical(text or keyword)
        if term is not None and (term := apply_alias(term, config.aliases)) in vocabulary:
            scores[term] = max(score, scores.get(term, 0.0))
    return scores


def annotate(table: pa.Table, vocabulary: frozenset[str], config: AnnotationConfig) -> pa.Table:
    """``ANNOTATIONS`` of a part, in row order and by falling score, then term."""
    annotator = ANNOTATORS.get(config.annotator)
    found: list[tuple[str, str, float, str]] = []
    for row in table.to_pylist():
        scores = annotator(row, vocabulary, config)
        for term, score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
            if score >= config.min_score:
                found.append((row["image_id"], term, score, row["split"]))
    columns = list(zip(*found, strict=True)) or [()] * len(ANNOTATIONS)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, ANNOTATIONS, strict=True)], schema=ANNOTATIONS)
