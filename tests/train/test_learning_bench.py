"""The learning benchmark: its arithmetic on made-up rows, and its reading of recipes."""

import json
from pathlib import Path
from typing import Any

import pytest

from lookalike.recipe import Recipe
from tests.benchmarks.learning import find_variants, needed_steps, seed_overrides
from tests.benchmarks.learning_tables import name_of, render_markdown, spread, summarise

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "deploy" / "recipes"
ROLES = {
    "mrl": "nested",
    "twin": "single",
    "mrl-e": "tied",
    "base": "base",
    "random": "random",
    "one-task": "trained",
    "ff-8": "fixed",
    "ff-64": "fixed",
}
NESTED = {"mrl": (8, 64), "mrl-e": (8, 64), "one-task": (8, 64), "twin": (64,), "ff-8": (8,), "ff-64": (64,)}


def row(seed: int, variant: str, dim: int, p_at_1: float, method: str = "prefix") -> dict[str, Any]:
    return {
        "seed": seed,
        "variant": variant,
        "role": ROLES[variant],
        "method": method,
        "dim": dim,
        "p_at_1": p_at_1,
        "nested": dim in NESTED.get(variant, ()),
        "map_at_10_by_k": p_at_1 / 2,
        "p_at_1_standard_error": 0.01,
    }


def both_seeds(variant: str, dim: int, values: tuple[float, float], method: str = "prefix") -> list[dict[str, Any]]:
    return [row(seed, variant, dim, value, method) for seed, value in enumerate(values, 1)]


ROWS = [
    *both_seeds("mrl", 8, (0.6, 0.5)),
    *both_seeds("mrl", 64, (0.8, 0.7)),
    *both_seeds("twin", 8, (0.3, 0.4)),
    *both_seeds("twin", 64, (0.8, 0.75)),
    *both_seeds("twin", 8, (0.55, 0.35), "svd"),
    *both_seeds("base", 8, (0.2, 0.2)),
    *both_seeds("base", 1280, (0.5, 0.5)),
    *both_seeds("random", 1280, (0.0, 0.02)),
]


def test_summary_pairs_seeds_and_takes_the_full_size_of_each() -> None:
    summary = summarise(ROWS)
    assert (summary["seeds"], summary["subject"]) == ([1, 2], "mrl")
    assert summary["levels"]["p_at_1"]["base"]["1280"] == {"mean": 0.5, "min": 0.5, "max": 0.5, "spread": 0.0}
    full = summary["subject_minus_at_full_size"]
    assert full["base"] == {"mean": 0.25, "min": 0.2, "max": 0.3, "spread": 0.1, "above_spread": True}
    assert full["twin truncated"]["mean"] == -0.025
    truncated = summary["subject_minus"]["p_at_1"]["twin truncated"]
    assert truncated["8"] == {"mean": 0.2, "min": 0.1, "max": 0.3, "spread": 0.2}
    assert truncated["64"] == {"mean": -0.025, "min": -0.05, "max": 0.0, "spread": 0.05}
    assert summary["subject_minus"]["map_at_10_by_k"]["twin svd"] == {
        "8": {"mean": 0.05, "min": 0.025, "max": 0.075, "spread": 0.05}
    }
    assert "random" not in summary["subject_minus"]["p_at_1"]  # no dim in common
    assert {name: (r["holds"], r["mean"]) for name, r in summary["relations"].items()} == {
        "above_truncated": (True, 0.2),
        "above_svd": (True, 0.1),
    }
    json.dumps(summary)


def test_a_margin_within_the_spread_is_told() -> None:
    close = [*both_seeds("mrl", 8, (0.5, 0.7)), *both_seeds("base", 8, (0.5, 0.5))]
    assert summarise(close)["subject_minus_at_full_size"]["base"]["above_spread"] is False
    assert spread([1.0]) == {"mean": 1.0, "min": 1.0, "max": 1.0, "spread": 0.0}


def test_fixed_feature_networks_make_one_line_of_their_own_dims() -> None:
    rows = [*ROWS, row(1, "ff-8", 8, 0.7), row(1, "ff-8", 64, 0.1), row(1, "ff-64", 8, 0.1), row(1, "ff-64", 64, 0.75)]
    assert [name_of(r) for r in rows[-4:]] == ["fixed", None, None, "fixed"]
    fixed = summarise(rows)["subject_minus"]["p_at_1"]["fixed"]
    assert {dim: margin["mean"] for dim, margin in fixed.items()} == {"8": -0.1, "64": 0.05}  # of seed 1, in both


@pytest.mark.parametrize(("value", "outside", "holds"), [(0.7, 0.0, True), (0.592, 0.008, True), (0.83, 0.03, False)])
def test_interpolated_dims_are_held_against_their_neighbours(value: float, outside: float, holds: bool) -> None:
    rows = [row(1, "mrl", 8, 0.6), row(1, "mrl", 16, value), row(1, "mrl", 64, 0.8), row(1, "mrl", 96, 0.9)]
    summary = summarise(rows)
    found = summary["interpolated"]["p_at_1"]
    assert list(found) == ["16"]  # nothing is nested above 96
    assert found["16"]["between"] == [8, 64]
    assert found["16"]["outside"]["mean"] == pytest.approx(outside)
    assert found["16"]["within"] is summary["relations"]["interpolated"]["holds"] is holds


@pytest.mark.parametrize(("tied", "holds"), [(0.79, True), (0.77, False)])
def test_weight_tying_may_cost_the_smallest_dims_only(tied: float, holds: bool) -> None:
    rows = [row(1, "mrl", 8, 0.6), row(1, "mrl", 64, 0.8), row(1, "mrl-e", 8, 0.2), row(1, "mrl-e", 64, tied)]
    assert summarise(rows)["relations"]["tied_level"]["holds"] is holds


def test_tables_hold_every_line_and_dim() -> None:
    text = render_markdown(summarise(ROWS))
    assert "| mrl | 55.0 (50.0 to 60.0) | 75.0 (70.0 to 80.0) |  |" in text
    assert "| twin truncated | +20.0 (+10.0 to +30.0) | -2.5 (-5.0 to +0.0) |" in text
    assert "- above_truncated: holds (worst at 8-d: 20.0)" in text
    for block in text.split("\n\n"):
        assert len({line.count("|") for line in block.splitlines() if line.startswith("|")}) <= 1


@pytest.mark.parametrize("name", ["quickstart", "smoke"])
def test_recipes_are_understood(name: str) -> None:
    path = str(RECIPES / f"{name}.yaml")
    recipe = Recipe.load(path)
    roles = {step: variant.role for step, variant in find_variants(recipe, "evaluate").items()}
    assert roles.pop("random-vectors", "random") == "random"
    assert roles == {"vectors": "nested", "twin-vectors": "single", "base-vectors": "base"}
    steps = needed_steps(recipe, "evaluate")
    assert steps[-1] == "evaluate"
    assert "index" not in steps
    seeded = Recipe.load(path, seed_overrides(recipe, 99, "evaluate"))
    assert {step for step in seeded.steps if seeded.config(step).seed == 99} >= {"pretrain", "finetune", "twin"}
    assert {seeded.config(step).seed for step in ("corpus", "labels", "shards", "base", "base-vectors")} == {17}
    narrow = {"dataset": ["furniture"]} if name == "quickstart" else {}
    assert seeded.steps["vectors"].settings.get("where", {}) == narrow
    assert "where" not in seeded.steps["base-vectors"].settings


@pytest.mark.parametrize("name", ["learning", "learning-smoke", "learning-grocery"])
def test_variants_differ_from_the_subject_in_what_they_are_named_for(name: str) -> None:
    path = str(RECIPES / f"{name}.yaml")
    recipe = Recipe.load(path)
    found = {variant.name: variant for variant in find_variants(recipe, "evaluate").values()}
    own = {"mrl": "nested", "mrl-e": "tied", "single": "single", "base": "base", "random": "random"}
    fixed = {f"ff-{k}": "fixed" for k in (8, 16, 32, 64)}
    trained = dict.fromkeys(("one-task", "triplet", "probe", "plain", "scratch"), "trained")
    assert {name: variant.role for name, variant in found.items()} == {**own, **fixed, **trained}
    assert [found[f"ff-{k}"].dims for k in (8, 16, 32, 64)] == [(8,), (16,), (32,), (64,)]
    subject = recipe.config("mrl").model_dump()
    # epochs aside: without repeats, and from random weights, there are more of them
    differing = {
        step: {key for key, value in recipe.config(step).model_dump().items() if value != subject[key]} - {"epochs"}
        for step in {**own, **fixed, **trained}
        if recipe.steps[step].stage == "finetune" and step != "mrl"
    }
    assert differing == {
        "mrl-e": {"tasks"},
        "single": {"dims"},
        "one-task": {"tasks"},
        "triplet": {"tasks", "loader"},
        **{f"ff-{k}": {"dims", "tasks"} for k in (8, 16, 32, 64)},
        "probe": {"backbone"},
        "plain": {"loader"},
        "scratch": {"backbone"},
    }
    seeded = Recipe.load(path, seed_overrides(recipe, 99, "evaluate"))
    assert {step for step in recipe.steps if seeded.config(step).seed == 99} == {*found, "evaluate"} - {"base"}


def test_photographs_are_asked_for_among_those_trained_on_and_in_the_catalogue() -> None:
    tasks = (
        Recipe.load(str(RECIPES / "learning-grocery.yaml"))
        .config("evaluate")
        .model_dump(exclude_defaults=True)["tasks"]
    )
    natural = {"split": ["test"], "view": ["natural"]}
    assert tasks["product"] == {
        "queries": natural,
        "database": {"split": ["train"], "view": ["natural"]},
        "label": "group",
    }
    assert tasks["catalogue"] == {"queries": natural, "database": {"view": ["iconic"]}, "label": "group"}
