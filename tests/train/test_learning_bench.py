"""The learning benchmark's arithmetic and its reading of a recipe."""

from pathlib import Path
from typing import Any

import pytest

from lookalike.recipe import Recipe
from tests.benchmarks.learning import find_roles, seed_overrides, spread, steps_up_to, summarise

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"


def row(seed: int, role: str, dim: int, p_at_1: float, method: str = "prefix") -> dict[str, Any]:
    return {"seed": seed, "role": role, "method": method, "dim": dim, "p_at_1": p_at_1, "map_at_10_by_k": p_at_1 / 2}


ROWS = [
    row(1, "nested", 8, 0.6), row(2, "nested", 8, 0.5), row(1, "nested", 64, 0.8), row(2, "nested", 64, 0.7),
    row(1, "twin", 8, 0.3), row(2, "twin", 8, 0.4), row(1, "twin", 64, 0.8), row(2, "twin", 64, 0.75),
    row(1, "twin", 8, 0.55, "svd"), row(2, "twin", 8, 0.35, "svd"),
    row(1, "base", 8, 0.2), row(2, "base", 8, 0.2), row(1, "base", 1280, 0.5), row(2, "base", 1280, 0.5),
    row(1, "random", 1280, 0.0), row(2, "random", 1280, 0.02),
]  # fmt: skip


def test_summary_pairs_seeds_and_takes_the_full_size_of_each() -> None:
    summary = summarise(ROWS)
    assert summary["seeds"] == [1, 2]
    assert summary["full_dim_p_at_1"]["base"] == {"mean": 0.5, "min": 0.5, "max": 0.5, "spread": 0.0}
    assert summary["nested_minus_base"] == {"mean": 0.25, "min": 0.2, "max": 0.3, "spread": 0.1, "above_spread": True}
    truncated = summary["nested_minus_truncated"]["p_at_1"]
    assert truncated["8"] == {"mean": 0.2, "min": 0.1, "max": 0.3, "spread": 0.2}
    assert truncated["64"] == {"mean": -0.025, "min": -0.05, "max": 0.0, "spread": 0.05}
    assert summary["nested_minus_svd"]["map_at_10_by_k"] == {"8": {"mean": 0.05, "min": 0.025, "max": 0.075,
                                                                   "spread": 0.05}}  # fmt: skip
    assert summary["ratios"] == {"nested_over_twin_p_at_1": 0.968, "nested_over_base_p_at_1": 1.5,
                                 "nested_over_random_p_at_1": 75.0}  # fmt: skip


def test_a_margin_within_the_spread_is_told() -> None:
    close = [row(s, role, 8, p) for role, values in (("nested", (0.5, 0.7)), ("base", (0.5, 0.5)))
             for s, p in enumerate(values)]  # fmt: skip
    assert summarise(close)["nested_minus_base"]["above_spread"] is False
    assert spread([1.0]) == {"mean": 1.0, "min": 1.0, "max": 1.0, "spread": 0.0}


@pytest.mark.parametrize("name", ["quickstart", "smoke"])
def test_recipes_are_understood(name: str) -> None:
    path = str(RECIPES / f"{name}.yaml")
    recipe = Recipe.load(path)
    roles = find_roles(recipe, "evaluate")
    assert roles["vectors"] == "nested"
    assert roles["twin-vectors"] == "twin"
    assert roles["base-vectors"] == "base"
    steps = steps_up_to(recipe, "evaluate")
    assert steps[-1] == "evaluate"
    assert "index" not in steps
    seeded = Recipe.load(path, seed_overrides(recipe, 99, "evaluate"))
    assert {step for step in seeded.steps if seeded.config(step).seed == 99} >= {"pretrain", "finetune", "twin"}
    assert {seeded.config(step).seed for step in ("corpus", "labels", "shards", "base", "base-vectors")} == {17}
