"""``lookalike run``: every step of a recipe in order, those that are published skipped."""

import argparse
import json
from collections.abc import Sequence

from lookalike.cli import describe_step
from lookalike.recipe import Recipe, run_steps


def recipe_arguments(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments that commands over a whole recipe share."""
    parser = argparse.ArgumentParser(prog=f"lookalike {prog}", description=description)
    parser.add_argument("recipe", help="recipe YAML")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="dotted overrides: root=..., seed=3, or STEP.key=value for a step's setting",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, run nothing")
    return parser


def run(args: Sequence[str]) -> int:
    """Run all steps and print where each one's artifact is."""
    from lookalike.cluster import ensure_ray

    parser = recipe_arguments("run", "Run every step of a recipe; steps that are published are skipped.")
    options = parser.parse_intermixed_args(list(args))
    recipe = Recipe.load(options.recipe, options.overrides)
    if options.dry_run:
        print(json.dumps([describe_step(recipe, name) for name in recipe.steps], indent=1))
        return 0
    ensure_ray(recipe.cluster)
    artifacts, _ = run_steps(recipe)
    for name, artifact in artifacts.items():
        print(f"{name}\t{artifact.uri}")
    return 0
