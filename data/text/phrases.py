"""Terms of many texts at once, as tables. The rules are those of ``terms``, which takes one text at a time.

What polars cannot do alike, Python does: it cuts a text into tokens, and describes each distinct token once.
"""

from functools import lru_cache
from itertools import chain

import numpy as np
import polars as pl

from lookalike.data.text.terms import MAX_LENGTH, MAX_WORDS, STOP_WORDS, has_letter, singular, tokens_of, word_of

_TOKEN = {"token": pl.String, "word": pl.String, "single": pl.String, "inner": pl.Boolean, "edge": pl.Boolean}


@lru_cache(maxsize=300_000)
def _describe(token: str) -> tuple[str, str | None, str, bool, bool]:
    """A row of ``_TOKEN``: the word, its singular, whether it may stand inside a term, and at an end of one."""
    word = word_of(token)
    inner = has_letter(word or "")
    return token, word, singular(word or ""), inner, inner and word not in STOP_WORDS


def _words(texts: list[str]) -> pl.DataFrame:
    """One row per word of ``texts``, in order: ``text`` (index), ``phrase`` (number), and the columns of ``_TOKEN``."""
    tokens = [[*tokens_of(text), "\n"] for text in texts]
    text = np.repeat(np.arange(len(texts)), np.fromiter(map(len, tokens), np.int64, len(tokens)))
    frame = pl.DataFrame({"text": text, "token": pl.Series(list(chain.from_iterable(tokens)), dtype=pl.String)})
    known = pl.DataFrame(map(_describe, frame["token"].unique().to_list()), schema=_TOKEN, orient="row")
    frame = frame.join(known, on="token", how="left", maintain_order="left")
    return frame.with_columns(phrase=pl.col("word").is_null().cum_sum()).filter(pl.col("word") != "")


def spans(texts: list[str]) -> pl.DataFrame:
    """One row per term of adjacent words in ``texts``.

    ``text`` is the index of the text, ``term`` the canonical term, ``at`` the number of its first word, ``length`` its
    number of words; ``within`` says that they stand in one phrase, ``whole`` that the text has no other words.
    """
    text = pl.col("text")
    words = _words(texts).with_row_index("at")
    words = words.with_columns(first=text.ne_missing(text.shift(1)), last=text.ne_missing(text.shift(-1)))
    return pl.concat([_spans(words, length) for length in range(1, MAX_WORDS + 1)])


def _spans(words: pl.DataFrame, length: int) -> pl.DataFrame:
    """The ``spans`` of ``length`` words."""

    def later(name: str, places: int = length - 1) -> pl.Expr:
        return pl.col(name).shift(-places)

    fine = pl.all_horizontal("edge", later("edge"), *(later("inner", place) for place in range(1, length - 1)))
    within = pl.col("phrase") == later("phrase")
    whole = pl.col("first") & later("last") & (pl.col("text") == later("text"))
    table = words.select("text", "at", within=within, whole=whole, fine=fine).filter(
        pl.col("fine") & (pl.col("within") | pl.col("whole"))
    )
    parts = [words["word"].gather(table["at"] + place) for place in range(length - 1)]
    term = pl.concat_str(*parts, words["single"].gather(table["at"] + length - 1), separator=" ")
    table = table.select("text", "at", "within", "whole", length=length, term=term)
    return table.filter(pl.col("term").str.len_chars().is_between(2, MAX_LENGTH))


def longest(matches: pl.DataFrame) -> pl.DataFrame:
    """The spans that remain when a text is read from left to right: the longest at each place, then on from its end."""
    matches = matches.sort("at", "length", descending=[False, True])
    end, remains = 0, []
    for at, length in matches.select("at", "length").iter_rows():
        remains.append(at >= end)
        end = at + length if at >= end else end
    return matches.filter(pl.Series(remains, dtype=pl.Boolean))
