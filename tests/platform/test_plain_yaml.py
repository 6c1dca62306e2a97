"""YAML of strangers is read in bounded time; what cannot be read gets one error with file and line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike import plain_yaml
from lookalike.config import apply_overrides
from lookalike.errors import UsageError
from lookalike.plain_yaml import parse_documents, parse_yaml
from lookalike.recipe import read_values
from lookalike.serve.commands.check_config import check_file
from lookalike.serve.front.tenants import read_tenants

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.dates(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text() | st.integers(), values, max_size=4),
)


def nested_aliases(levels: int = 40, width: int = 9) -> str:
    """A list of lists with ``width ** levels`` values, most of them aliases."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def nested_merges(levels: int = 40, width: int = 9) -> str:
    """A mapping that merges others, which merge others."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * width)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize("content", [nested_aliases(), nested_merges(), f"a: &a {'x' * 50_000}\nb: [{'*a, ' * 500}]"])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: parse_yaml(path.read_bytes(), str(path)),
        lambda path: apply_overrides({}, [f"steps={path.read_text()}"]),
        lambda path: read_values(str(path)),
        lambda path: read_tenants(str(path)),
        lambda path: check_file(str(path)),
    ],
)
@pytest.mark.timeout(10)
def test_multiplied_aliases_are_refused(tmp_path: Path, read: Callable[[Path], object], content: str) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"line \d+, column \d+: with aliases written out it has more than"):
        read(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * 10_000, "more than 64 deep"),
        ("- " * 5_000, "more than 64 deep"),
        ("a: &a [*a]", "an alias stands inside its own value"),
        ("a: &a {b: {c: *a}}", "an alias stands inside its own value"),
        ("x\n" * 600_000, "at most 1,048,576 are read"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: 2001-99-99", "month must be in"),
        (f"a: {'9' * 5_000}", "4300 digits"),
        ("b: 08\nc: 0x_", "invalid literal"),
        ("{[1]: 2}", "unhashable key"),
        ("a: 1\n---\nb: 2", "2 YAML documents"),
        (b"a: \x80", "invalid start byte"),
    ],
)
@pytest.mark.timeout(20)
def test_what_is_no_plain_value_is_one_error_with_its_place(content: str | bytes, problem: str) -> None:
    with pytest.raises(UsageError, match=f"^(?s:here.*){re.escape(problem)}") as refused:
        parse_yaml(content, "here")
    assert "\n" not in str(refused.value)


@given(PLAIN)
@settings(max_examples=30, deadline=None)
def test_plain_values_are_read_like_safe_load(value: object) -> None:
    text = yaml.safe_dump(value)
    assert parse_yaml(text, "here") == yaml.safe_load(text) == value


def test_aliases_and_documents_within_the_bounds_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: {<<: *x, d: *x}", "here") == {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}
    assert parse_documents("a: 1\n---\n[2]\n", "here") == [{"a": 1}, [2]]
    assert parse_yaml("", "here") is None


def test_many_small_values_are_refused_before_they_are_built() -> None:
    assert len(parse_yaml("- a\n" * 500, "here", 10_000)) == 500
    with pytest.raises(UsageError, match="more than 625 values or 20,000 characters"):
        parse_yaml("- a\n" * 700, "here", 10_000)


def test_the_bounds_hold_for_all_documents_together() -> None:
    document = f"---\na: &a {'x' * 1000}\nb: [{'*a, ' * 40}]\n"
    assert len(parse_documents(document * 10, "here")) == 10
    with pytest.raises(UsageError, match="with aliases written out"):
        parse_documents(document * 60, "here")


def test_an_error_about_secrets_does_not_quote_them() -> None:
    for content in ("a: *tokenvalue", "!tokenvalue x", "a: 0x_tokenvalue\nb: 0x_"):
        with pytest.raises(UsageError, match=r"here.*not valid YAML") as refused:
            parse_yaml(content, "here", secret=True)
        assert "tokenvalue" not in str(refused.value)


def test_no_other_module_parses_yaml() -> None:
    root = Path(plain_yaml.__file__).parents[2]
    modules = [path for wing in ("platform", "data", "train", "serve") for path in (root / wing).rglob("*.py")]
    users = {path.name for path in modules if re.search(r"yaml\.(safe_|full_|unsafe_)?load", path.read_text())}
    assert users == set()
