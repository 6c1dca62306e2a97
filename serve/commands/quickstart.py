"""``lookalike quickstart``: run every step of a recipe, serve its index, send a few queries, and write a report.

Published steps are skipped, so another run continues where an interrupted one stopped.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.commands.run import DEFAULT_RECIPE, print_dry_run
from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.flags import Parser
from lookalike.recipe import Recipe, run_steps
from lookalike.serve.commands import tour
from lookalike.serve.commands.tour import TourAnswer, TourConfig
from lookalike.serve.commands.tour_report import render_html, render_text
from lookalike.serve.settings.config import ServeConfig

PLAN_FACTS = ("plan", "description", "target", "k", "num_queries", "map_check", "holdout")
NEEDED = ("corpus", "labels", "evaluate", "index", "plan")
"""Stages that the service and the report need."""
Facts = dict[str, Any]
QUERY_FACTS = ("image_id", "title", "group", "view", "category")


def quickstart(args: Sequence[str]) -> int:
    """Run a recipe from end to end and report the result."""
    parser = Parser(
        prog="lookalike quickstart",
        description="Run every step of a recipe, serve its index, query it over gRPC and "
        "write report.html and report.json under the recipe's root.",
    )
    parser.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help=f"recipe YAML (default: {DEFAULT_RECIPE})")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="as for every stage")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, run nothing")
    options = parser.parse_intermixed_args(args)
    if "=" in options.recipe and not Path(options.recipe).exists():
        options.overrides, options.recipe = [options.recipe, *options.overrides], DEFAULT_RECIPE
    recipe = Recipe.load(options.recipe, options.overrides)
    require_tour(recipe)
    if options.dry_run:
        print_dry_run(recipe, recipe.steps)
        return 0
    return _run(recipe, options)


def _run(recipe: Recipe, options: argparse.Namespace) -> int:
    from lookalike.cluster import ensure_ray

    config = parse_config(TourConfig, recipe.demo, "demo")
    start = time.monotonic()
    recipe.foresee()
    ensure_ray(recipe.cluster)
    artifacts, stages = run_steps(recipe)
    serving = time.monotonic()
    answers, service = serve_and_ask(options, artifacts, config, recipe.seed)
    serve_s = round(time.monotonic() - serving, 1)
    stages.append({"step": "serve and query", "stage": "serve", "skipped": False, "seconds": serve_s})
    facts = collect(recipe, artifacts, answers, stages, service) | {"names": config.names}
    facts["total_seconds"] = round(time.monotonic() - start, 1)
    html = render_html(facts, artifacts, answers, tour.pictures(_of_stage(recipe, artifacts, "corpus"), answers))
    storage.write_atomic(storage.join(recipe.root, "report.html"), html.encode())
    storage.write_atomic(storage.join(recipe.root, "report.json"), (json.dumps(facts, indent=1) + "\n").encode())
    print(render_text(facts, recipe.root))
    return 0


def require_tour(recipe: Recipe) -> None:
    """Raise ``UsageError`` for mistakes that would stop a quickstart at its end: a missing step, or wrong settings
    in ``serve:`` or ``demo:``."""
    for stage in NEEDED:
        if not any(step.stage == stage for step in recipe.steps.values()):
            raise UsageError(
                f"recipe {recipe.name!r} has no {stage!r} step; the quickstart needs one (`lookalike run` does not)"
            )
    parse_config(TourConfig, recipe.demo, "demo")
    parse_config(ServeConfig, {"index": "published by then", **recipe.serve}, "serve")


def serve_and_ask(
    options: argparse.Namespace, artifacts: dict[str, Artifact], config: TourConfig, seed: int
) -> tuple[list[TourAnswer], Facts]:
    """Start the service on a free port, query it as a client, stop it; return the answers and facts on the service."""
    from lookalike.serve.app import start, stop
    from lookalike.serve.client import Client
    from lookalike.serve.commands.serve import resolve

    service = resolve(options.recipe, [*options.overrides, "port=0"], None)
    corpus = next(a for a in artifacts.values() if a.manifest.kind == "corpus")
    queries = tour.choose_queries(corpus, config, seed)
    print(f"[serve] {service.placement} placement, querying with {len(queries)} images", file=sys.stderr, flush=True)
    address = start(service)
    try:
        with Client(address, timeout_s=120.0) as client:
            client.wait_ready(120.0)
            description = client.describe()
            answers = tour.ask(client, queries, config.k)
    finally:
        stop()
    facts = {"address": address, "placement": service.placement, "generation": description.generation}
    return answers, facts | {"model_fingerprint": description.model_fingerprint}


def _of_stage(recipe: Recipe, artifacts: dict[str, Artifact], stage: str) -> Artifact:
    return artifacts[[name for name, step in recipe.steps.items() if step.stage == stage][-1]]


def collect(
    recipe: Recipe, artifacts: dict[str, Artifact], answers: list[TourAnswer], stages: list[Facts], service: Facts
) -> Facts:
    """Return the content of ``report.json``."""
    plan = _of_stage(recipe, artifacts, "plan").read_json("plan.json")
    neighbours = [
        {
            "query": {key: answer.query[key] for key in QUERY_FACTS},
            "same_by_vector": answer.same_by_vector,
            "times_ms": answer.times_ms,
            "hits": [{"id": hit.id, "score": round(hit.score, 4), **dict(hit.metadata)} for hit in answer.hits],
        }
        for answer in answers
    ]
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "service": service,
        "stages": stages,
        "labels": _of_stage(recipe, artifacts, "labels").stats,
        "corpus": _of_stage(recipe, artifacts, "corpus").stats,
        "evaluation": _of_stage(recipe, artifacts, "evaluate").read_json("report.json"),
        "plan": {key: plan[key] for key in PLAN_FACTS} | {"chosen": plan["candidates"][plan["chosen"]]},
        "neighbours": neighbours,
        "index": _of_stage(recipe, artifacts, "index").uri,
        "artifacts": {name: artifact.uri for name, artifact in artifacts.items()},
    }
