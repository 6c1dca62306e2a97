"""From raw values of any form to clean texts, words, scored terms and attributes, with the repairs that they needed."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from itertools import chain
from typing import Any

import numpy as np

# C0 and C1 controls apart from white space, and lone surrogates, which no UTF-8 can hold.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_SCORED = re.compile(r"(?s)(.*\S)\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?inf|nan)\s*")
_LARGEST = float(np.finfo(np.float32).max)
_FIRST_INEXACT: dict[type, float] = {np.float16: 2.0**11, np.float32: 2.0**24}
"""Type -> the first whole number that another one may have been rounded to."""


def read_text(value: Any, max_chars: int) -> tuple[str | None, set[str]]:
    """(the text of a raw value, or None; what was wrong with it).

    A value that is ``not_utf8``, of the ``wrong_type``, or an ``inexact_number`` (see :func:`number_text`) gives no
    text; ``control_characters`` are removed, and a text that is ``too_long`` is cut to ``max_chars``.
    """
    value, problem = _decoded(value)
    if value is None:
        return None, {problem} if problem else set()
    clean = _CONTROLS.sub("", value)
    problems = {"control_characters"} if clean != value else set()
    clean = clean.strip()
    if len(clean) > max_chars:
        return clean[:max_chars].rstrip(), problems | {"too_long"}
    return clean, problems


def _decoded(value: Any) -> tuple[str | None, str | None]:
    """(a raw value as text, or None; what is wrong with it, if anything is)."""
    if isinstance(value, str) and _SURROGATES.search(value):
        value = _undo_escape(value)
    if isinstance(value, str):
        return value, None
    if isinstance(value, bytes):
        try:
            return value.decode(), None
        except UnicodeDecodeError:
            return None, "not_utf8"
    if isinstance(value, (bool, int)):
        return json.dumps(value), None
    if isinstance(value, (float, np.floating, Decimal)):
        text = None if math.isnan(value) else number_text(value)
        return text, "inexact_number" if text is None and not math.isnan(value) else None
    return None, None if value is None else "wrong_type"


def number_text(value: float | np.floating[Any] | Decimal) -> str | None:
    """The text of a number, the same in every format: ``7`` for 7.0, ``0.1`` for the nearest double or float.

    None if it is infinite, or a whole number too large for its type to tell from the next one (from 2^53 in a double).
    """
    if not math.isfinite(value):
        return None
    if value != int(value):
        return format(value, "f") if isinstance(value, Decimal) else str(value)
    inexact = not isinstance(value, Decimal) and abs(float(value)) >= _FIRST_INEXACT.get(type(value), 2.0**53)
    return None if inexact else str(int(value))


def _undo_escape(value: str) -> str | bytes:
    """The bytes that were escaped as surrogates when read; the text itself if its surrogates are not such escapes."""
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value


def read_words(value: Any, max_chars: int) -> tuple[list[str], set[str]]:
    """(words, problems) of a list, of a list as JSON text, or of a text with commas; at most ``max_chars`` in all."""
    words: list[str] = []
    problems: set[str] = set()
    for item in _listed(value, problems):
        text, reasons = read_text(item, max_chars)
        problems |= reasons
        if text:
            words.append(text)
            max_chars -= len(text)
        if max_chars <= 0:
            problems.add("too_long")
            break
    return words, problems


def _listed(value: Any, problems: set[str]) -> Iterable[Any]:
    if value is None:
        return []
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return [value]  # unreadable as a whole
    if isinstance(value, str):
        parsed = _parse(value)
        value = value.split(",") if parsed is None else parsed
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (list, tuple)):
        return value
    problems.add("wrong_type")
    return []


def _parse(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, (list, dict)) else None


def read_scored(
    value: Any, max_chars: int, name: str, highest: float | None = None
) -> tuple[list[dict[str, Any]], set[str]]:
    """(terms with their number, called ``name``; problems) from any of these forms.

    Structs of ``term`` and ``name``, a map, pairs, plain terms (number 1.0), ``term:0.83``; each as values, as JSON
    text or as text with commas. A term whose number is missing, not finite or negative is dropped; a number over
    ``highest`` is lowered to it: both are ``bad_<name>``. The terms have at most ``max_chars`` in all.
    """
    entries: list[dict[str, Any]] = []
    problems: set[str] = set()
    for raw_term, raw_number in _pairs(_listed(value, problems), name):
        term, reasons = read_text(raw_term, max_chars)
        problems |= reasons
        if not term:
            continue
        number = _number(raw_number)
        if number is None or (highest is not None and number > highest):
            problems.add(f"bad_{name}")
        if number is not None:
            entries.append({"term": term, name: number if highest is None else min(number, highest)})
        max_chars -= len(term)
        if max_chars <= 0:
            problems.add("too_long")
            break
    return entries, problems


def _pairs(items: Iterable[Any], name: str) -> Iterator[tuple[Any, Any]]:
    for item in items:
        if isinstance(item, Mapping):
            yield item.get("term"), item.get(name)
        elif isinstance(item, (list, tuple)) and len(item) == 2:
            yield item[0], item[1]
        else:
            text = item.decode("utf-8", "surrogateescape") if isinstance(item, bytes) else item
            scored = _SCORED.fullmatch(text) if isinstance(text, str) else None
            yield (scored[1], float(scored[2])) if scored else (text, 1.0)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number <= _LARGEST else None


def read_attributes(
    value: Any, max_chars: int, gathered: Mapping[str, Any] | None = None
) -> tuple[list[dict[str, str]], set[str]]:
    """(pairs of ``name`` and ``value``, each once, sorted; problems) from any of these forms.

    A map from names to a value or a list of values, structs of ``name`` and ``value``, pairs; each as values or as JSON
    text. ``gathered``: the values of columns that hold one attribute each. Any other form is a ``wrong_type``. Pairs
    that do not fit into ``max_chars`` in all are left out whole: ``too_long``.
    """
    problems: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    for raw_name, raw_values in chain(_attributes(value, max_chars, problems), (gathered or {}).items()):
        name, reasons = read_text(raw_name, max_chars)
        problems |= reasons
        for raw in raw_values if isinstance(raw_values, (list, tuple)) else [raw_values]:
            text, reasons = read_text(raw, max_chars)
            problems |= reasons
            if name and text:
                pairs.add((name, text))
    entries: list[dict[str, str]] = []
    for name, text in sorted(pairs):
        if len(name) + len(text) > max_chars:
            problems.add("too_long")
            continue
        max_chars -= len(name) + len(text)
        entries.append({"name": name, "value": text})
    return entries, problems


def _attributes(value: Any, max_chars: int, problems: set[str]) -> Iterator[tuple[Any, Any]]:
    for item in _listed(value, problems):
        if isinstance(item, Mapping) and {"name", "value"} <= item.keys():
            yield item["name"], item["value"]
        elif isinstance(item, (list, tuple)) and len(item) == 2:
            yield item[0], item[1]
        else:
            text, reasons = read_text(item, max_chars)
            problems |= reasons or ({"wrong_type"} if text else set())
