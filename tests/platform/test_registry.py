"""Registries refuse duplicates and explain unknown names."""

import pytest

from lookalike.errors import UsageError
from lookalike.registry import Registry, nearest


def make_registry() -> Registry[int]:
    registry: Registry[int] = Registry("loss")
    registry.register("softmax")(1)
    registry.register("triplet")(2)
    return registry


def test_a_name_gives_its_object() -> None:
    registry = make_registry()
    assert registry.get("triplet") == 2
    assert "softmax" in registry
    assert "sofmax" not in registry
    assert list(registry) == ["softmax", "triplet"]


def test_a_duplicate_raises_and_changes_nothing() -> None:
    registry = make_registry()
    with pytest.raises(ValueError, match=r"loss 'softmax' is registered already"):
        registry.register("softmax")(3)
    assert registry.get("softmax") == 1


def test_an_unknown_name_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown loss 'sofmax' \(did you mean 'softmax'\?\); valid: softmax, trip"):
        make_registry().get("sofmax")


def test_nothing_near_suggests_nothing() -> None:
    assert nearest("zzz", ["softmax"]) == ""
