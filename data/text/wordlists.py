"""Lists of terms: sensitive terms, terms that say nothing about a picture, aliases, and a supplied vocabulary.

A list is a text file with one term per line and ``#`` for comments; aliases are YAML (``alias: term``) or CSV
(``alias,term``). Terms of users' lists are made canonical: a list may say ``Office Chairs``.
"""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lookalike import storage
from lookalike.data.text.terms import ALIASES, canonical, is_latin, subterms
from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_yaml

MOST_ALIASES_BYTES = 16 << 20


@dataclass(frozen=True)
class WordLists:
    """Which terms an image may have, whatever its text says."""

    sensitive: frozenset[str]
    """Refused, alone and as a part of a longer term."""
    boilerplate: frozenset[str]
    """Refused, but not as a part of a longer term."""
    spoilers: frozenset[str]
    """Words that make every term with them boilerplate."""
    aliases: dict[str, str]
    """Term -> the term that it is merged into; no term is on both sides."""
    vocabulary: frozenset[str] | None
    """The only terms allowed; None allows all."""
    latin: bool
    """Whether terms with letters that are not Latin are refused."""

    def accepts(self, term: str) -> bool:
        """Whether a canonical term may enter the vocabulary."""
        if term in self.boilerplate or (self.vocabulary is not None and term not in self.vocabulary):
            return False
        if self.latin and not is_latin(term):
            return False
        return not any(part in self.sensitive or part in self.spoilers for part in subterms(term))


def load_lists(
    *,
    sensitive: str | None,
    packaged_sensitive: bool,
    stop_terms: tuple[str, ...],
    aliases: Mapping[str, str] | str,
    vocabulary: str | None,
    latin: bool,
) -> WordLists:
    """The packaged lists and those at the given URIs. Raises ``UsageError`` for a file that cannot be used."""
    refused = _packaged("sensitive.txt") if packaged_sensitive else frozenset()
    if sensitive is not None:
        refused |= _terms_at(sensitive, "annotations.sensitive")
    boilerplate = _packaged("boilerplate.txt")
    given = _read_aliases(aliases) if isinstance(aliases, str) else aliases
    resolved = resolve_aliases({**ALIASES, **_canonical_aliases(given)})
    supplied = None
    if vocabulary is not None:
        supplied = frozenset(resolved.get(term, term) for term in _terms_at(vocabulary, "annotations.vocabulary"))
    spoilers = frozenset(line[2:] for line in boilerplate if line.startswith("* "))
    boilerplate |= {canonical(term) or term for term in stop_terms}
    return WordLists(refused, boilerplate, spoilers, resolved, supplied, latin)


def resolve_aliases(aliases: Mapping[str, str]) -> dict[str, str]:
    """``aliases`` with chains resolved: each leads to its last term. A circle raises ``UsageError``."""
    resolved = {}
    for alias in aliases:
        chain, term = [alias], aliases[alias]
        while term in aliases:
            if term in chain:
                raise UsageError(f"aliases {' -> '.join([*chain, term])} go in a circle; remove one")
            chain.append(term)
            term = aliases[term]
        resolved[alias] = term
    return resolved


def _canonical_aliases(aliases: Mapping[str, str]) -> dict[str, str]:
    pairs = {}
    for alias, term in aliases.items():
        source, target = canonical(alias), canonical(term)
        if source is None or target is None:
            raise UsageError(
                f"alias {alias!r}: {term!r} is not a pair of terms; a term is one to three words, does not "
                "begin or end with a word like 'the', and has a letter in every word"
            )
        if source != target:
            pairs[source] = target
    return pairs


@cache
def _packaged(name: str) -> frozenset[str]:
    return frozenset(_lines(files("lookalike.data.text").joinpath(name).read_text(encoding="ascii")))


def _lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def _terms_at(uri: str, setting: str) -> frozenset[str]:
    terms = frozenset(term for line in _lines(_read(uri, setting)) if (term := canonical(line)) is not None)
    if not terms:
        raise UsageError(f"{setting} {uri} holds no term; write one term of one to three words per line")
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
    loaded = parse_yaml(text, f"{setting} {uri}", MOST_ALIASES_BYTES)
    if not isinstance(loaded, dict) or not all(isinstance(x, str) for pair in loaded.items() for x in pair):
        raise UsageError(
            f"{setting} {uri} is not a mapping of words to words; write lines 'alias: term' (quote yes, no)"
        )
    return loaded
