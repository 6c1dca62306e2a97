"""Terms: the canonical form of a phrase, the candidates a text yields, and which vocabulary terms it names.

A term is one to three lower-case words, the last one singular: ``Office Chairs`` and ``office-chair`` are the same.
"""

import re
import unicodedata
from collections.abc import Container, Iterator, Mapping
from functools import lru_cache
from importlib.resources import files

import yaml

MAX_WORDS = 3
MAX_LENGTH = 60
_BREAK = re.compile(r"[,;:.!?()\[\]{}|/\"\n\r\t]+|\s-+\s")
_NOT_WORD = re.compile(r"[^\w'+&]+|_")
_HAS_LETTER = re.compile(r"[^\W\d_]")

_WORDS = yaml.safe_load(files("lookalike.data").joinpath("english.yaml").read_text(encoding="ascii"))
STOP_WORDS = frozenset(_WORDS["stop_words"])
_IRREGULAR: dict[str, str] = _WORDS["irregular"]
_UNCHANGED = frozenset(_WORDS["unchanged"])


@lru_cache(maxsize=200_000)
def singular(word: str) -> str:
    """The singular of an English noun by rule; a word no rule fits stays."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word in _UNCHANGED or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is", "'s")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "zzes")):
        return word[:-2]
    return word[:-1]


def words_of(text: str) -> list[list[str]]:
    """Phrases of ``text`` (cut at punctuation) as lists of normalised words: NFKC, case folded."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    phrases = (_NOT_WORD.sub(" ", phrase).split() for phrase in _BREAK.split(plain))
    return [[word.strip("'") for word in phrase if word.strip("'+&")] for phrase in phrases if phrase]


@lru_cache(maxsize=200_000)
def canonical(phrase: str) -> str | None:
    """The term for a phrase that is one already (a keyword, a category), or None when it is no acceptable term."""
    words = [word for part in words_of(phrase) for word in part]
    return join_words(tuple(words))


def join_words(words: tuple[str, ...]) -> str | None:
    """The term of these normalised words; None for more than three, a stop word at an end, or a word of digits."""
    if not 1 <= len(words) <= MAX_WORDS or words[0] in STOP_WORDS or words[-1] in STOP_WORDS:
        return None
    if not all(_HAS_LETTER.search(word) for word in words):
        return None
    term = " ".join((*words[:-1], singular(words[-1])))
    return term if 1 < len(term) <= MAX_LENGTH else None


def ngrams(text: str) -> set[str]:
    """All candidate terms of one to three adjacent words within a phrase."""
    found = set()
    for phrase in words_of(text):
        for start in range(len(phrase)):
            for end in range(start + 1, min(start + MAX_WORDS, len(phrase)) + 1):
                term = join_words(tuple(phrase[start:end]))
                if term is not None:
                    found.add(term)
    return found


def match_terms(text: str, vocabulary: Container[str]) -> set[str]:
    """Vocabulary terms that ``text`` names: the longest at each place, and the shorter terms such a match ends in.

    "office chair" names a chair, for English puts the head last; it does not name an office.
    """
    found: set[str] = set()
    for phrase in words_of(text):
        position = 0
        while position < len(phrase):
            position = _match_at(phrase, position, vocabulary, found)
    return found


def _match_at(phrase: list[str], start: int, vocabulary: Container[str], found: set[str]) -> int:
    for end in range(min(start + MAX_WORDS, len(phrase)), start, -1):
        term = join_words(tuple(phrase[start:end]))
        if term is not None and term in vocabulary:
            found.update(heads(term, vocabulary))
            return end
    return start + 1


def heads(term: str, vocabulary: Container[str]) -> Iterator[str]:
    """``term`` and its endings, those that are in the vocabulary."""
    words = term.split(" ")
    for start in range(len(words)):
        ending = " ".join(words[start:])
        if ending in vocabulary:
            yield ending


def apply_alias(term: str, aliases: Mapping[str, str]) -> str:
    """The term an alias stands for, or the term itself."""
    return aliases.get(term, term)
