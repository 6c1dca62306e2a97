"""The stage verbs and ``lookalike run``: steps of a recipe, in order; published steps are skipped."""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from lookalike import cluster
from lookalike.errors import ArtifactError, UsageError
from lookalike.flags import Parser
from lookalike.recipe import Recipe, run_steps
from lookalike.stages import get_stage
from lookalike.telemetry import printable, setup_logging

DEFAULT_RECIPE = "deploy/recipes/quickstart.yaml"


def recipe_arguments(verb: str, description: str) -> argparse.ArgumentParser:
    """Arguments shared by all commands that take a recipe."""
    parser = Parser(prog=f"lookalike {verb}", description=description)
    parser.add_argument("recipe", help=f"recipe YAML, for example {DEFAULT_RECIPE}")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="dotted overrides: root=..., seed=3, or STEP.key=value for a step's setting",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, run nothing")
    return parser


def run_stage(verb: str, description: str, args: Sequence[str]) -> int:
    """Run the steps of one stage and print the URI of each artifact."""
    parser = recipe_arguments(verb, description)
    parser.add_argument("--step", action="append", help=f"run only this step (default: every {verb!r} step)")
    parser.add_argument("--describe", action="store_true", help="print the JSON schema of the settings and exit")
    if "--describe" in args:
        print(json.dumps(get_stage(verb).config.model_json_schema(), indent=1))
        return 0
    options = parser.parse_intermixed_args(args)
    setup_logging()
    recipe = Recipe.load(options.recipe, options.overrides)
    names = options.step or recipe.steps_of(verb)
    for name in names:
        if (other := recipe.stage(name).name) != verb:
            raise UsageError(f"step {name!r} is a {other!r} step; run `lookalike {other}`")
    if options.dry_run:
        print_dry_run(recipe, names)
        return 0
    for name in names:
        if recipe.published(name) is None:  # raises if an input is missing, before Ray starts
            cluster.ensure_ray(recipe.cluster)
        print(printable(recipe.run_step(name).uri))
    return 0


def run(args: Sequence[str]) -> int:
    """Run all steps and print the URI of each artifact."""
    parser = recipe_arguments("run", "Run every step of a recipe; published steps are skipped.")
    options = parser.parse_intermixed_args(args)
    recipe = Recipe.load(options.recipe, options.overrides)
    if options.dry_run:
        print_dry_run(recipe, recipe.steps)
        return 0
    recipe.foresee()
    cluster.ensure_ray(recipe.cluster)
    artifacts, _ = run_steps(recipe)
    for name, artifact in artifacts.items():
        print(f"{name}\t{printable(artifact.uri)}")
    return 0


def print_dry_run(recipe: Recipe, names: Iterable[str]) -> None:
    """Print ``describe_step`` of each step as JSON; raises the ``UsageError`` that would stop the run later."""
    recipe.foresee(names)
    print(json.dumps([describe_step(recipe, name) for name in names], indent=1))


def describe_step(recipe: Recipe, name: str) -> dict[str, Any]:
    """The state of a step before it runs, its resolved settings and the stage's preview."""
    try:
        artifact = recipe.published(name)
        state = "would run" if artifact is None else "published already"
        uri = None if artifact is None else artifact.uri
    except ArtifactError as error:
        state, uri = f"waits: {error}", None
    step = recipe.steps[name]
    preview = {"preview": recipe.preview(name)} if state == "would run" else {}
    return {
        "step": name,
        "stage": step.stage,
        "inputs": step.inputs,
        "state": state,
        "uri": uri,
        **preview,
        "settings": recipe.config(name).model_dump(mode="json"),
    }
