"""Annotators turn records into scored terms; a recipe names an entry of the registry ``ANNOTATORS``.

``lexical`` reads every text field of a record against a vocabulary mined from the training rows, or supplied;
``precomputed`` takes the output of the user's own keyword model.
"""

import math
from abc import ABC, abstractmethod
from functools import reduce
from operator import mul

import polars as pl
import pyarrow as pa

from lookalike.data.text.languages import readable
from lookalike.data.text.phrases import longest, spans
from lookalike.data.text.settings import AnnotationConfig
from lookalike.data.text.terms import canonical
from lookalike.data.text.textfields import read_fields
from lookalike.data.text.vocabulary import Vocabulary
from lookalike.registry import Registry

FREE_TEXT = ("title", "description")
OWNERS = ("creator", "dataset")
IS_FREE = pl.col("field").is_in(FREE_TEXT)


class Annotator(ABC):
    """Turns records into terms. A task makes one annotator, which keeps no state between records.

    ``records`` has those of the ``TEXT_COLUMNS`` that the corpus has. Results are tables with the columns ``row``
    (int64, index of the record), ``term`` (string, plain or dictionary-encoded) and, for ``annotate``, ``score``
    (float64). A pair of row and term may occur more than once.
    """

    def __init__(self, config: AnnotationConfig) -> None:
        self.config = config

    @abstractmethod
    def candidates(self, records: pa.Table) -> pa.Table:
        """(row, term): the canonical terms that each record proposes for the vocabulary."""

    @abstractmethod
    def annotate(self, records: pa.Table, vocabulary: Vocabulary) -> pa.Table:
        """(row, term, score): the terms of the vocabulary that each record names."""


ANNOTATORS: Registry[type[Annotator]] = Registry("annotator")


@ANNOTATORS.register("lexical")
class Lexical(Annotator):
    """Candidates are n-grams; a term scores 1 - prod(1 - weight) over the fields that name it.

    Free text names the longest terms in it; a keyword or a part of a category names itself or, if it is no term, the
    terms in it. Terms in the name of the record's creator or data set do not count: they say who made the picture.
    """

    def candidates(self, records: pa.Table) -> pa.Table:
        """Terms of the fields that can make an annotation by themselves."""
        names: list[str] = [
            name for name, weight in self.config.field_weights.items() if weight >= self.config.min_score
        ]
        entries, owners, terms = self._read(records, names)
        proposals = entries.join(terms, on="text").filter(pl.when(IS_FREE).then("within").otherwise("whole"))
        own = owners.join(terms.filter("within"), on="text")
        return proposals.join(own, on=["row", "term"], how="anti").select("row", "term").to_arrow()

    def annotate(self, records: pa.Table, vocabulary: Vocabulary) -> pa.Table:
        """Noisy-or over the fields, in the order of the settings."""
        weights = self.config.field_weights
        entries, owners, terms = self._read(records, list(weights))
        matches = terms.join(vocabulary.spellings, on="term")
        within, whole = matches.filter("within"), matches.filter("whole").select("text", "position")
        free = longest(within).select("text", position="ends").explode("position")
        listed = pl.concat([whole, free.join(whole, on="text", how="anti")])
        hits = pl.concat(
            [entries.filter(IS_FREE).join(free, on="text"), entries.filter(~IS_FREE).join(listed, on="text")]
        )
        hits = hits.join(owners.join(within, on="text"), on=["row", "position"], how="anti")
        strength = [pl.when(field=name).then("strength").otherwise(0.0).max().alias(name) for name in weights]
        doubt = [1.0 - weight * pl.col(name) for name, weight in weights.items()]
        score = 1.0 - reduce(mul, doubt, pl.lit(1.0))
        scored = hits.group_by("row", "position").agg(strength).with_columns(score=score)
        return scored.select("row", vocabulary.terms.gather(scored["position"]).alias("term"), "score").to_arrow()

    def _read(self, records: pa.Table, names: list[str]) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
        """Entries of the named fields that may be read, names of owners, and the ``spans`` of their distinct texts.

        A category is read in any language: it comes from its source's taxonomy.
        """
        entries = read_fields(records, [*names, *OWNERS])
        entries = entries.with_columns(pl.col("text").str.head(self.config.max_characters))
        if self.config.language is not None:
            exempt = pl.col("field").is_in(["category", *OWNERS])
            read = readable(entries.filter(~exempt), self.config.language)
            entries = pl.concat([entries.filter(exempt), read])
        texts = entries["text"].to_arrow().dictionary_encode()
        entries = entries.with_columns(text=pl.Series(texts.indices, dtype=pl.Int64))
        owned = pl.col("field").is_in(OWNERS)
        return entries.filter(~owned), entries.filter(owned), spans(texts.dictionary.to_pylist())


@ANNOTATORS.register("precomputed")
class Precomputed(Annotator):
    """Terms and scores of the user's own keyword model, in canonical form."""

    def candidates(self, records: pa.Table) -> pa.Table:
        """The terms that can make an annotation."""
        scored = self._scored_terms(records)
        return scored.filter(pl.col("score") >= self.config.min_score).select("row", "term").to_arrow()

    def annotate(self, records: pa.Table, vocabulary: Vocabulary) -> pa.Table:
        """The user's score of each term."""
        scored = self._scored_terms(records).join(vocabulary.spellings, on="term")
        return scored.select("row", vocabulary.terms.gather(scored["position"]).alias("term"), "score").to_arrow()

    def _scored_terms(self, records: pa.Table) -> pl.DataFrame:
        name, cut = self.config.scores_from, self.config.max_characters
        entries = read_fields(records, [name])
        texts = entries["text"].unique().to_list()
        pairs = [(text, 1.0) if name == "annotations" else parse_scored(text[:cut]) for text in texts]
        terms = [canonical(term) for term, _ in pairs]
        scores = [score for _, score in pairs]
        schema = {"text": pl.String, "term": pl.String, "score": pl.Float64}
        parsed = pl.DataFrame({"text": texts, "term": terms, "score": scores}, schema=schema).drop_nulls("term")
        return entries.join(parsed, on="text").with_columns(score=pl.col("score") * pl.col("strength"))


def parse_scored(keyword: str) -> tuple[str, float]:
    """Term and score of ``term:0.83``; a keyword without a number has score 1."""
    text, _, tail = keyword.rpartition(":")
    try:
        score = float(tail) if text else 1.0
    except ValueError:
        return keyword, 1.0
    return text or keyword, 0.0 if math.isnan(score) else min(1.0, max(0.0, score))
