"""Whether a text may be read as a language: a long text is identified, a short one goes by its locale.

The model is py3langid's (multinomial naive Bayes over byte n-grams, which an automaton finds). Its own ``classify``
takes one text; here all texts of a batch walk the automaton in step, and one sparse product scores them, with the same
results.
"""

from functools import cache
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import polars as pl
from numpy.typing import NDArray

MIN_WORDS = 4
"""Texts with fewer words are not identified: their locale decides."""
SURE, LIKELY = 0.9, 0.5
"""A text is not read if it is in another language with this confidence: against its locale, and without a locale."""
IDENTIFY_CHARACTERS = 400
"""Characters of a text that are read to identify it."""
_CODES = (
    "ara:ar ces:cs chi:zh cze:cs dan:da deu:de dut:nl ell:el eng:en est:et fin:fi fra:fr fre:fr ger:de gre:el "
    "heb:he hin:hi hun:hu ind:id ita:it jpn:ja kor:ko nld:nl nor:no pol:pl por:pt ron:ro rum:ro rus:ru spa:es "
    "swe:sv tha:th tur:tr ukr:uk vie:vi zho:zh"
)
_THREE_LETTERS = dict(pair.split(":") for pair in _CODES.split())


class _Model(NamedTuple):
    """py3langid's arrays, in the types that batches need."""

    languages: list[str]
    aliases: list[tuple[int, int]]
    """Pairs of columns with the same language: the second is added to the first."""
    step: NDArray[Any]
    row: NDArray[np.int64]
    feature: NDArray[np.int32]
    weight: NDArray[Any]
    prior: NDArray[np.float32]


@cache
def _model() -> _Model:
    from py3langid.langid import MODEL_DIR, MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_modelpath(MODEL_DIR / MODEL_FILE, norm_probs=True)
    languages = list(identifier.nb_classes)
    aliases = [(languages.index(code), at) for at, code in enumerate(languages) if languages.index(code) < at]
    return _Model(
        languages,
        aliases,
        np.asarray(identifier.tk_nextmove),
        np.asarray(identifier.tk_row, np.int64) << 8,
        np.asarray(identifier.tk_output, np.int32),
        identifier.nb_ptc,
        np.asarray(identifier.nb_pc, np.float32),
    )


def language_of(locale: str | None) -> str | None:
    """The two-letter code of a locale's language (``en-GB``, ``en_US``, ``eng``); None if it names no language."""
    tag = (locale or "").strip().lower().replace("_", "-").partition("-")[0]
    tag = _THREE_LETTERS.get(tag, tag)
    return tag if tag in _model().languages else None


def identify(texts: list[str]) -> tuple[NDArray[np.str_], NDArray[np.float32]]:
    """Language and confidence of each text [n], as py3langid gives them for its first ``IDENTIFY_CHARACTERS``."""
    model = _model()
    encoded = [_encode(text[:IDENTIFY_CHARACTERS]) for text in texts]
    size = np.array([len(text) for text in encoded], np.int64)
    text, feature = _walk(b"".join(encoded), size, model)
    scores = _score(text, feature, len(encoded), model) / np.sqrt(np.maximum(size, 1)).astype(np.float32)[:, None]
    chance = np.exp(scores - scores.max(axis=1, keepdims=True))
    chance /= chance.sum(axis=1, keepdims=True)
    for first, second in model.aliases:
        chance[:, first] += chance[:, second]
        chance[:, second] = 0.0
    best = chance.argmax(axis=1)
    return np.array(model.languages)[best], chance[np.arange(len(best)), best]


def _encode(text: str) -> bytes:
    text = text.lower() if text.isupper() else text
    return (text if text.isascii() else normalize("NFC", text)).encode()


def _walk(data: bytes, size: NDArray[np.int64], model: _Model) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(text, feature) of every feature that the automaton reports. Texts advance in step, the longest first."""
    letters = np.frombuffer(data, np.uint8)
    order = np.argsort(-size, kind="stable")
    start, longest = (np.cumsum(size) - size)[order], size[order]
    active = np.searchsorted(-longest, -np.arange(int(longest.max(initial=0))), side="left")
    state = np.zeros(len(order), np.int64)
    texts, features = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for place, count in enumerate(active.tolist()):
        state = model.step[model.row[state[:count]] + letters[start[:count] + place]]
        feature = model.feature[state]
        hits = np.nonzero(feature >= 0)[0]
        texts.append(order[hits])
        features.append(feature[hits])
    return np.concatenate(texts), np.concatenate(features).astype(np.int64)


def _score(text: NDArray[np.int64], feature: NDArray[np.int64], count: int, model: _Model) -> NDArray[np.float32]:
    """Log-posteriors [count, languages]; 0 throughout for a text without features."""
    from scipy.sparse import csr_array

    used = np.flatnonzero(np.bincount(feature, minlength=1))
    slot = np.zeros(used[-1] + 1 if len(used) else 1, np.int64)
    slot[used] = np.arange(len(used))
    pair, times = np.unique(text * max(len(used), 1) + slot[feature], return_counts=True)
    rows, columns = pair // max(len(used), 1), pair % max(len(used), 1)
    visits = csr_array((np.log1p(times.astype(np.float32)), (rows, columns)), shape=(count, len(used)))
    scores = visits @ model.weight[used].astype(np.float32) + model.prior
    scores[np.bincount(rows, minlength=count) == 0] = 0.0
    return np.asarray(scores, dtype=np.float32)


def readable(entries: pl.DataFrame, language: str) -> pl.DataFrame:
    """The rows of ``entries`` (columns ``text`` and ``locale``) that may be read as ``language``.

    A text of at least four words is read if it is identified as the language, whatever its locale; if its locale is the
    language and the text is not surely in another; and if it has no locale and is not likely in another. A shorter text
    is read unless its locale is another language.
    """
    texts = [text for text in entries["text"].unique().to_list() if len(text.split(None, MIN_WORDS)) >= MIN_WORDS]
    codes, confidence = identify(texts)
    wanted = codes == language
    identified = pl.DataFrame(
        {"text": texts, "doubt": np.where(wanted, -1, confidence)}, schema={"text": pl.String, "doubt": pl.Float32}
    )
    limits = {None: LIKELY, language: SURE}
    locales = entries["locale"].unique()
    limit = pl.DataFrame(
        {"locale": locales, "limit": [limits.get(language_of(code), 0.0) for code in locales]},
        schema={"locale": pl.String, "limit": pl.Float32},
    )
    doubt = entries.join(identified, on="text", how="left").join(limit, on="locale", how="left", nulls_equal=True)
    return doubt.filter(pl.col("doubt").fill_null(0.0) < pl.col("limit")).select(entries.columns)
