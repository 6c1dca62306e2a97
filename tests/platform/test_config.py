"""Configuration: strict keys, overrides, and what enters a fingerprint."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from lookalike.config import Config, apply_overrides, parse_config, runtime
from lookalike.errors import UsageError


class Inner(Config):
    width: int = Field(3, ge=1)
    """Columns."""
    threads: int = runtime(1, ge=1)
    """Run-time only."""


class Outer(Config):
    name: str
    """Name."""
    inner: Inner = Inner()
    """One."""
    maybe: Inner | None = None
    """None or one."""
    named: dict[str, Inner] = {}
    """Some by name."""
    listed: tuple[Inner, ...] = ()
    """Some in order."""
    workers: int = runtime(2, ge=1)
    """Run-time only."""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"nam": "x"},
            [
                "unknown key 'nam' (did you mean 'name'?)",
                "valid keys: inner, listed, maybe, name",
                "'name' is required; add it",
            ],
        ),
        (
            {"name": "x", "inner": {"widht": 2}},
            ["unknown key 'inner.widht' (did you mean 'width'?)", "valid keys: threads, width"],
        ),
        ({"name": "x", "maybe": {"widht": 2}}, ["'maybe.widht' (did you mean 'width'?)"]),
        (
            {"name": "x", "named": {"a": {"widht": 2}}},
            ["'named.a.widht' (did you mean 'width'?)", "valid keys: threads, width"],
        ),
        ({"name": "x", "listed": [{"widht": 2}]}, ["'listed.0.widht' (did you mean 'width'?)"]),
        ({"name": "x", "width": 2}, ["unknown key 'width' (did you mean 'inner.width'?)", "valid keys: inner, listed"]),
        ({"name": "x", "inner": {"width": 0}}, ["'inner.width' is 0", "greater than or equal to 1"]),
        ({"name": "x", "workers": "many"}, ["'workers' is 'many'"]),
    ],
)
def test_mistakes_name_the_key_the_rule_and_the_nearest(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(Outer, values, "recipe.yaml")
    for word in ["recipe.yaml: ", *words]:
        assert word in str(caught.value)


def test_instances_do_not_change() -> None:
    with pytest.raises(ValueError, match=r"frozen"):
        Inner().width = 4  # type: ignore[misc]


def test_infinite_numbers_are_refused() -> None:
    class Rate(Config):
        value: float

    with pytest.raises(UsageError, match=r"finite"):
        parse_config(Rate, {"value": float("nan")}, "here")


def test_runtime_fields_stay_out_of_the_identity_at_every_depth() -> None:
    plain = Outer(name="x", maybe=Inner(), named={"a": Inner()}, listed=(Inner(),))
    busy = Inner(threads=8)
    other = Outer(name="x", inner=busy, maybe=busy, named={"a": busy}, listed=(busy,), workers=7)
    assert plain.identity() == other.identity()
    assert plain.identity() == {
        "name": "x",
        "inner": {"width": 3},
        "maybe": {"width": 3},
        "named": {"a": {"width": 3}},
        "listed": [{"width": 3}],
    }
    assert Outer(name="x", listed=(Inner(width=4),)).identity() != Outer(name="x", listed=(Inner(),)).identity()


def test_overrides_read_yaml_and_leave_the_original_alone() -> None:
    values = {"a": {"b": [1, 2]}, "c": 1}
    changed = apply_overrides(values, ["a.b=[3]", "c=null", "new.deep.key=2.5", "text=a=b"])
    assert changed == {"a": {"b": [3]}, "c": None, "new": {"deep": {"key": 2.5}}, "text": "a=b"}
    assert values == {"a": {"b": [1, 2]}, "c": 1}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("noequals", "not of the form key.sub=value"),
        ("=3", "not of the form"),
        ("c.deep=3", "'c' is 1, which has no keys of its own"),
        ("c=[1", "the value is not valid YAML"),
    ],
)
def test_bad_overrides_are_explained(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        apply_overrides({"c": 1}, [override])


@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=2), st.integers()), max_size=6))
def test_the_last_override_of_a_key_wins(pairs: list[tuple[str, int]]) -> None:
    changed = apply_overrides({}, [f"top.{key}={value}" for key, value in pairs])
    assert changed.get("top", {}) == dict(pairs)
