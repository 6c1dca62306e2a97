"""Lists of terms as data: the sensitive, those that say nothing of a picture, aliases, and a supplied vocabulary.

A list is a text file, one term a line, ``#`` for comments; aliases are YAML (``alias: term``) or CSV (``alias,term``).
Terms of the users' lists are brought into canonical form, so that a list may be written as people write.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from lookalike import storage
from lookalike.data.text.terms import ALIASES, canonical, is_latin, subterms
from lookalike.errors import UsageError


@dataclass(frozen=True)
class WordLists:
    """What decides, beside the text itself, which terms an image may have."""

    sensitive: frozenset[str] = frozenset()
    """Refused, and every term they are a part of."""
    boilerplate: frozenset[str] = frozenset()
    """Refused as a whole term."""
    spoilers: frozenset[str] = frozenset()
    """Words that make any term they are in boilerplate."""
    aliases: Mapping[str, str] | None = None
    """Term -> the term it is merged into; no term stands on both sides."""
    vocabulary: frozenset[str] | None = None
    """The only terms allowed; None: all that are acceptable."""
    latin: bool = True
    """Refuse words with letters that are not Latin."""

    def accepts(self, term: str) -> bool:
        """Whether a canonical term may enter the vocabulary."""
        if term in self.boilerplate or (self.vocabulary is not None and term not in self.vocabulary):
            return False
        if self.latin and not is_latin(term):
            return False
        return not any(part in self.sensitive or part in self.spoilers for part in subterms(term))

    def merge(self, term: str) -> str:
        """The term an alias stands for, or the term itself."""
        return term if self.aliases is None else self.aliases.get(term, term)


def load_lists(
    *,
    sensitive: str | None,
    packaged_sensitive: bool,
    stop_terms: Iterable[str],
    aliases: Mapping[str, str] | str,
    vocabulary: str | None,
    latin: bool,
) -> WordLists:
    """The packaged lists with those at the given URIs. Raises ``UsageError`` for a file that cannot be used."""
    refused = _packaged("sensitive.txt") if packaged_sensitive else frozenset()
    refused |= frozenset() if sensitive is None else _terms_at(sensitive, "annotations.sensitive")
    boilerplate = _packaged("boilerplate.txt")
    own = _read_aliases(aliases) if isinstance(aliases, str) else aliases
    merged = resolve_aliases({**ALIASES, **_canonical_aliases(own)})
    supplied = None
    if vocabulary is not None:
        supplied = frozenset(merged.get(term, term) for term in _terms_at(vocabulary, "annotations.vocabulary"))
    stopped = {canonical(term) or term for term in stop_terms}
    spoilers = frozenset(line[2:] for line in boilerplate if line.startswith("* "))
    return WordLists(refused, frozenset(boilerplate | stopped), spoilers, merged, supplied, latin)


def resolve_aliases(aliases: Mapping[str, str]) -> dict[str, str]:
    """Aliases that lead to their last term at once; a circle raises ``UsageError``."""
    resolved = {}
    for alias in aliases:
        seen, term = [alias], aliases[alias]
        while term in aliases:
            if term in seen:
                raise UsageError(f"aliases {' -> '.join([*seen, term])} go in a circle; remove one")
            seen.append(term)
            term = aliases[term]
        resolved[alias] = term
    return resolved


def _canonical_aliases(aliases: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for alias, term in aliases.items():
        source, target = canonical(alias), canonical(term)
        if source is None or target is None:
            raise UsageError(
                f"alias {alias!r}: {term!r} is no pair of terms; a term is one to three words, does not "
                "begin or end with a word like 'the', and has a letter in every word"
            )
        if source != target:
            found[source] = target
    return found


@cache
def _packaged(name: str) -> frozenset[str]:
    return frozenset(_lines(files("lookalike.data.text").joinpath(name).read_text(encoding="ascii")))


def _lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def _terms_at(uri: str, setting: str) -> frozenset[str]:
    terms = frozenset(term for line in _lines(_read(uri, setting)) if (term := canonical(line)) is not None)
    if not terms:
        raise UsageError(f"{setting} {uri} holds no term; write one term of one to three words a line")
    return terms


def _read(uri: str, setting: str) -> str:
    if not storage.exists(uri):
        raise UsageError(f"{setting}: there is no file {uri}; correct the path or remove the setting")
    try:
        return storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{setting} {uri} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _read_aliases(uri: str) -> dict[str, str]:
    setting = "annotations.aliases"
    text = _read(uri, setting)
    if uri.endswith(".csv"):
        rows = [row for row in csv.reader(io.StringIO(text)) if row and not row[0].startswith("#")]
        wrong = next((row for row in rows if len(row) != 2), None)
        if wrong is not None:
            raise UsageError(f"{setting} {uri}: the line {','.join(wrong)!r} has {len(wrong)} columns, not alias,term")
        return {row[0]: row[1] for row in rows}
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{setting} {uri} is no YAML: {error}; write lines 'alias: term', or a .csv file") from None
    if not isinstance(loaded, dict) or not all(isinstance(x, str) for pair in loaded.items() for x in pair):
        raise UsageError(f"{setting} {uri} is no mapping of words to words; write lines 'alias: term' (quote yes, no)")
    return loaded
