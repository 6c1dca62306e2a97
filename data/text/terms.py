"""Terms: the canonical form of a phrase, the candidate terms in a text, and the vocabulary terms that it names.

A term is one to three lower-case words, the last one singular: ``Office Chairs`` and ``office-chair`` are the same.
These functions take one text; ``phrases`` takes many at once, and is tested against them.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Set
from functools import lru_cache
from importlib.resources import files
from typing import Any

from lookalike.plain_yaml import parse_yaml

MAX_WORDS = 3
MAX_LENGTH = 60
_TOKEN = re.compile(r"[\w'+&]+|\s-+\s|[^\w\s'+&-]+|[\n\r\t]")  # a word, or what ends a phrase
_WORD_START = re.compile(r"[\w'+&]")
_LETTER = re.compile(r"[^\W\d_]")

_WORDS = parse_yaml(files("lookalike.data.text").joinpath("english.yaml").read_bytes(), "english.yaml")
STOP_WORDS = frozenset(_WORDS["stop_words"])
_IRREGULAR: dict[str, str] = _WORDS["irregular"]
_UNCHANGED = frozenset(_WORDS["unchanged"])
_LEARNED = (
    ("men", "man"),
    ("theses", "thesis"),
    ("gnoses", "gnosis"),
    ("alyses", "alysis"),
    ("eaux", "eau"),
    ("ae", "a"),
    ("ii", "ius"),
)
"""Ending of a plural that does not end in s and es by the common rules -> ending of its singular."""
ALIASES: dict[str, str] = _WORDS["aliases"]
"""Other spelling of a term -> the term."""

_INVISIBLE = [
    (0xAD, 0xAD),
    (0x61C, 0x61C),
    (0x180E, 0x180E),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x206F),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
    (0xE0000, 0xE01EF),
]
_APOSTROPHES = dict.fromkeys([0x60, 0xB4, 0x2BC, 0x2018, 0x2019, 0x2032], "'")
_BEFORE = {code: None for first, last in _INVISIBLE for code in range(first, last + 1)} | _APOSTROPHES
_BEFORE |= dict.fromkeys([0xA9, 0xAE, 0x2117, 0x2120, 0x2122])  # trade marks, which NFKC would turn into letters
_PLAIN = dict(zip("\u0131\u00f8\u0142\u0111\u00e6\u0153", ("i", "o", "l", "d", "ae", "oe"), strict=True))
"""Letters that do not decompose -> how they are written without their stroke."""
_AFTER = dict.fromkeys([*range(0x300, 0x370), *range(0x20D0, 0x2100)]) | {ord("_"): " ", ord("`"): "'"}
"""Removes combining marks that no composed letter took up."""


@lru_cache(maxsize=200_000)
def singular(word: str) -> str:
    """The singular of an English noun by rule; a word that fits no rule stays, as does a singular that is no term."""
    single, shorter = word, _strip_plural(word)
    while shorter != single:
        single, shorter = shorter, _strip_plural(shorter)
    return word if single in STOP_WORDS or not has_letter(single) else single


def _strip_plural(word: str) -> str:
    word = word.removesuffix("'s").strip("'")
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _UNCHANGED or len(word) < 4:
        return word
    for ending, instead in _LEARNED:
        if word.endswith(ending) and len(word) > 4:
            return word.removesuffix(ending) + instead
    return word if word.endswith(("ss", "us", "is")) else _strip_s(word)


def _strip_s(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "zzes", "tzes")):
        return word[:-2]
    if word.endswith("uses") and len(word) > 5 and not word.endswith(("auses", "ouses")):
        return word[:-2]
    return word.removesuffix("s")


def normalise(text: str) -> str:
    """``text`` in NFKC with case folded, without accents, invisible characters and trade marks.

    Accents go from Latin letters, so that a word has one spelling; letters of other scripts keep what belongs to them.
    """
    folded = with_accents(text)
    return folded if folded.isascii() else "".join(map(_without_accent, folded))


def with_accents(text: str) -> str:
    """``normalise(text)``, but with its accents."""
    if text.isascii():
        return text.lower().translate(_AFTER) if "_" in text or "`" in text else text.lower()
    folded = unicodedata.normalize("NFKC", text.translate(_BEFORE)).casefold()
    return unicodedata.normalize("NFKC", folded).translate(_AFTER)


@lru_cache(maxsize=10_000)
def _without_accent(letter: str) -> str:
    if letter in _PLAIN:
        return _PLAIN[letter]
    base = unicodedata.normalize("NFD", letter)[0]
    return _PLAIN.get(base, base) if "a" <= base <= "z" or base in _PLAIN else letter


def tokens_of(text: str) -> list[str]:
    """The words of a text and, between them, the punctuation that ends a phrase."""
    return _TOKEN.findall(normalise(text))


def word_of(token: str) -> str | None:
    """The word of a token; an empty string if it has none (a lone apostrophe), None if it ends a phrase."""
    if not _WORD_START.match(token):
        return None
    word = token.strip("'")
    return word if word.strip("+&") else ""


def words_of(text: str, normalised: Callable[[str], str] = normalise) -> list[list[str]]:
    """Phrases of ``text`` (cut at punctuation and symbols) as lists of normalised words."""
    phrases: list[list[str]] = [[]]
    for token in _TOKEN.findall(normalised(text)):
        word = word_of(token)
        if word is None:
            phrases.append([])
        elif word:
            phrases[-1].append(word)
    return [phrase for phrase in phrases if phrase]


@lru_cache(maxsize=200_000)
def canonical(phrase: str) -> str | None:
    """The term for a whole phrase (a keyword, a category); None if the phrase is not a term."""
    words = [word for part in words_of(phrase) for word in part]
    return join_words(tuple(words))


def join_words(words: tuple[str, ...]) -> str | None:
    """The term of normalised words; None if there are over three, a stop word at an end, or a word without letters."""
    if not 1 <= len(words) <= MAX_WORDS or words[0] in STOP_WORDS or words[-1] in STOP_WORDS:
        return None
    if not all(has_letter(word) for word in words):
        return None
    term = " ".join((*words[:-1], singular(words[-1])))
    return term if 1 < len(term) <= MAX_LENGTH else None


def has_letter(word: str) -> bool:
    """Whether a word has more than digits and signs."""
    return _LETTER.search(word) is not None


@lru_cache(maxsize=200_000)
def is_latin(word: str) -> bool:
    """Whether every sign of ``word`` belongs to Latin text. A look-alike of another script, of phonetic notation or a
    digit that is not 0 to 9 shows that it is not English."""
    return word.isascii() or all(c.isascii() or "\u00c0" <= c <= "\u024f" or "\u1e00" <= c <= "\u1eff" for c in word)


def ngrams(text: str) -> set[str]:
    """All terms of one to three adjacent words within a phrase of ``text``."""
    terms = set()
    for phrase in words_of(text):
        for start in range(len(phrase)):
            for end in range(start + 1, min(start + MAX_WORDS, len(phrase)) + 1):
                term = join_words(tuple(phrase[start:end]))
                if term is not None:
                    terms.add(term)
    return terms


def match_terms(text: str, vocabulary: Set[str] | Mapping[str, Any]) -> set[str]:
    """Vocabulary terms that ``text`` names: the longest at each place, and the shorter terms that it ends in.

    "office chair" names a chair, because English puts the head last; it does not name an office.
    """
    terms: set[str] = set()
    for phrase in words_of(text):
        position = 0
        while position < len(phrase):
            position = _match_at(phrase, position, vocabulary, terms)
    return terms


def _match_at(phrase: list[str], start: int, vocabulary: Set[str] | Mapping[str, Any], terms: set[str]) -> int:
    """Add what is named at word ``start`` to ``terms``; return where to read on."""
    for end in range(min(start + MAX_WORDS, len(phrase)), start, -1):
        term = join_words(tuple(phrase[start:end]))
        if term is not None and term in vocabulary:
            terms.update(ending for ending in endings(term) if ending in vocabulary)
            return end
    return start + 1


def endings(term: str) -> Iterator[str]:
    """``term`` and the shorter terms it ends in, longest first."""
    words = term.split(" ")
    for start in range(len(words)):
        yield " ".join(words[start:])


def subterms(term: str) -> Iterator[str]:
    """Every term of adjacent words in ``term``, itself included, and every single word as it is written."""
    words = term.split(" ")
    yield from words
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield " ".join((*words[start : end - 1], singular(words[end - 1])))
