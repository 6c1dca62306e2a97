"""The text side in plain Python, one record and one text at a time: an oracle of the stage and of its speed."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import pyarrow.parquet as pq

from lookalike.data.text.languages import IDENTIFY_CHARACTERS, LIKELY, MIN_WORDS, SURE, language_of
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.terms import canonical, match_terms, ngrams

Record = Mapping[str, Any]
FREE_TEXT = ("title", "description")
COLUMNS = ["image_id", "title", "description", "keywords", "category", "locale", "creator", "dataset", "split"]


@cache
def language_model() -> Any:
    """The py3langid identifier, which takes one text per call."""
    from py3langid.langid import MODEL_DIR, MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_modelpath(MODEL_DIR / MODEL_FILE, norm_probs=True)


def may_read(text: str, locale: str | None, language: str | None) -> bool:
    """Whether a text may be read as ``language``."""
    code = language_of(locale)
    if language is None or len(text.split()) < MIN_WORDS:
        return language is None or code in (None, language)
    identified, confidence = language_model().classify(text[:IDENTIFY_CHARACTERS])
    limits = {None: LIKELY, language: SURE}
    return bool(identified == language or confidence < limits.get(code, 0.0))


def texts_of(record: Record, field: str, config: AnnotationConfig) -> Iterator[tuple[str, float]]:
    """Each text of a field that may be read, and its strength."""
    value = record.get(field) or ""
    for entry in value if isinstance(value, list) else value.split("/") if field == "category" else [value]:
        text, strength = (entry["term"], entry["weight"]) if isinstance(entry, Mapping) else (entry, 1.0)
        text = (text or "")[: config.max_characters]
        if field == "category" or may_read(text, record.get("locale"), config.language):
            yield text, min(max(strength, 0.0), 1.0)


def own_terms(record: Record) -> set[str]:
    """Terms in the names of the record's creator and data set."""
    return ngrams(record.get("creator") or "") | ngrams(record.get("dataset") or "")


def candidates(record: Record, config: AnnotationConfig) -> set[str]:
    """Terms that a record proposes for the vocabulary."""
    proposed: set[str] = set()
    for field, weight in config.field_weights.items():
        if weight >= config.min_score:
            for text, _ in texts_of(record, field, config):
                proposed |= ngrams(text) if field in FREE_TEXT else {canonical(text) or ""}
    return proposed - own_terms(record) - {""}


def scores(record: Record, config: AnnotationConfig, vocabulary: Mapping[str, str]) -> dict[str, float]:
    """Score of each term that a record names; ``vocabulary`` maps terms and aliases to terms."""
    doubt: dict[str, float] = {}
    for field, weight in config.field_weights.items():
        strongest: dict[str, float] = {}
        for text, strength in texts_of(record, field, config):
            whole = None if field in FREE_TEXT else canonical(text)
            for term in {whole} if whole in vocabulary else match_terms(text, vocabulary):
                strongest[vocabulary[term]] = max(strongest.get(vocabulary[term], 0.0), strength)
        for term, strength in strongest.items():
            doubt[term] = doubt.get(term, 1.0) * (1.0 - weight * strength)
    own = {vocabulary.get(term) for term in own_terms(record)}
    return {term: 1.0 - rest for term, rest in doubt.items() if 1.0 - rest >= config.min_score and term not in own}


def count(records: Iterable[Record], config: AnnotationConfig) -> Counter[str]:
    """Number of training rows that propose each term, aliases merged."""
    lists, images = config.lists(), Counter[str]()
    for record in records:
        if record["split"] == "train":
            images.update({lists.aliases.get(term, term) for term in candidates(record, config)})
    return images


def spellings(images: Mapping[str, int], config: AnnotationConfig) -> dict[str, str]:
    """The terms that may enter the vocabulary, and their aliases, each with its term."""
    lists = config.lists()
    terms = {term: term for term, number in images.items() if number >= config.min_images and lists.accepts(term)}
    return terms | {alias: term for alias, term in lists.aliases.items() if term in terms}


def run(paths: list[str], config: AnnotationConfig) -> dict[str, int]:
    """Sizes of the vocabulary and the annotations of the parts."""

    def records() -> Iterator[Record]:
        for path in paths:
            yield from pq.read_table(path, columns=COLUMNS).to_pylist()

    vocabulary = spellings(count(records(), config), config)
    annotations = sum(len(scores(record, config, vocabulary)) for record in records())
    return {"terms": len(set(vocabulary.values())), "annotations": annotations}
