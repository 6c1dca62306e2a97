"""How the terms whose accents were folded are written: the most frequent spelling, for people to read.

A term is one word whatever accents its texts have (``terms``). Only texts with letters beyond ASCII are looked at, so
corpora without accents cost nothing. A training image counts for one spelling of a term: of several accented ones for
the alphabetically last, and for the plain one if it has none of these.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from lookalike.data.text.languages import readable
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.terms import MAX_WORDS, join_words, normalise, singular, with_accents, words_of
from lookalike.data.text.textfields import read_fields
from lookalike.data.text.vocabulary import Vocabulary

SPELLINGS = pa.schema([("term", pa.string()), ("spelling", pa.string()), ("images", pa.int64())])
"""Training images that write a term with an accent, by spelling."""


def count_spellings(records: pa.Table, vocabulary: Vocabulary, config: AnnotationConfig) -> pa.Table:
    """``SPELLINGS`` of a part of the corpus, sorted; parts add up."""
    names: list[str] = [name for name, weight in config.field_weights.items() if weight >= config.min_score]
    if config.annotator == "precomputed":
        names = [config.scores_from]
    entries = read_fields(records.filter(pc.equal(records["split"], "train")), names)
    entries = entries.filter(pl.col("text").str.len_bytes() != pl.col("text").str.len_chars())
    if config.language is not None and len(entries):
        exempt = pl.col("field") == "category"
        entries = pl.concat([entries.filter(exempt), readable(entries.filter(~exempt), config.language)])
    written: dict[tuple[int, str], str] = {}
    for row, text in entries.select("row", "text").iter_rows():
        for term, spelling in spelled_terms(text[: config.max_characters]):
            if spelling != term and term in vocabulary:
                written[row, term] = max(spelling, written.get((row, term), ""))
    counts = Counter((term, spelling) for (_, term), spelling in written.items())
    rows = [(*key, counts[key]) for key in sorted(counts)]
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[], [], []], schema=SPELLINGS)


def spelled_terms(text: str) -> Iterator[tuple[str, str]]:
    """Each term of adjacent words within a phrase of ``text``, and how it is spelled there, its last word singular."""
    for phrase in words_of(text, with_accents):
        plain = [normalise(word) for word in phrase]
        for start in range(len(phrase)):
            for end in range(start + 1, min(start + MAX_WORDS, len(phrase)) + 1):
                term = join_words(tuple(plain[start:end]))
                if term is not None:
                    yield term, " ".join([*phrase[start : end - 1], _spell_singular(plain[end - 1], phrase[end - 1])])


def _spell_singular(plain: str, spelled: str) -> str:
    """The singular with the accents of ``spelled``, if it only lacks the word's ending; else without them."""
    single = singular(plain)
    return spelled[: len(single)] if plain.startswith(single) and len(plain) == len(spelled) else single


def common_spellings(spellings: Iterable[Mapping[str, object]], images: Mapping[str, int]) -> dict[str, str]:
    """Term -> its most frequent spelling where that is not the term; of equally frequent ones the alphabetically first.

    ``spellings``: rows of added-up ``SPELLINGS``; ``images``: term -> training images that name it, however spelled.
    """
    written: dict[str, dict[str, int]] = {}
    for row in spellings:
        written.setdefault(str(row["term"]), {})[str(row["spelling"])] = int(str(row["images"]))
    common = {}
    for term, counts in sorted(written.items()):
        counts[term] = images.get(term, 0) - sum(counts.values())
        common[term] = min(counts, key=lambda spelling: (-counts[spelling], spelling))
    return {term: spelling for term, spelling in common.items() if spelling != term}
