"""What training brings, by seed: nested against truncation, SVD and whatever else a recipe trains and measures.

    python -m tests.benchmarks.learning [--quick] [--seeds 3] [--recipe deploy/recipes/quickstart.yaml] [--root FOLDER]
                                        [--set KEY=VALUE ...] [--markdown]

Runs a recipe with one evaluation up to it once a seed; what no seed shapes (corpus, labels, shards, the base's vectors)
is published once and skipped after that, and so is everything when the command is given again. One JSON object a line:
a row for each seed, embedding, method and dim of the headline task, then the summary over seeds (``learning_tables``).
``deploy/recipes/learning.yaml`` has the variants of training; ``--set corpus.sources=...`` gives it other images.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lookalike.cluster import ensure_ray
from lookalike.recipe import Recipe
from lookalike.retrieval.machine import machine_facts
from lookalike.telemetry import setup_logging
from lookalike.train.run.settings import TrainConfig
from tests.benchmarks.learning_tables import Row, render_markdown, summarise

SEEDED = ("pretrain", "finetune")


@dataclass(frozen=True)
class Variant:
    """What made an embedding: the step of its encoder, its role, and the dims at which a loss was trained."""

    name: str
    role: str
    """``nested``: the subject, the first that is. ``tied`` (MRL-E), ``single`` (not nested), ``fixed`` (reads the first
    k features alone), ``trained`` (any other); ``base`` and ``random``: a backbone as it is; ``given``: by URI."""
    dims: tuple[int, ...] = ()


def needed_steps(recipe: Recipe, last: str) -> list[str]:
    """``last`` and every step it needs, in the recipe's order."""
    needed = {last}
    for name in reversed(recipe.steps):
        if name in needed:
            for sources in recipe.steps[name].inputs.values():
                needed.update([sources] if isinstance(sources, str) else sources)
    return [name for name in recipe.steps if name in needed]


def embed_steps(recipe: Recipe, evaluation: str) -> list[str]:
    """The embed steps that an evaluation reads, in its order, URIs left out."""
    names = recipe.steps[evaluation].inputs["embeddings"]
    return [name for name in ([names] if isinstance(names, str) else names) if name in recipe.steps]


def describe(recipe: Recipe, encoder: str) -> Variant:
    """The variant of an encoder's step, whatever stands beside it."""
    if encoder not in recipe.steps:
        return Variant(encoder, "given")
    config = recipe.config(encoder)
    if not isinstance(config, TrainConfig):
        random = recipe.steps[encoder].settings.get("weights", "random") == "random"
        return Variant(encoder, "random" if random else "base")
    whole = config.dims or ((config.embedding_dim,) if config.embedding_dim else ())
    dims = tuple(sorted({m for task in config.tasks.values() for m in task.dims or whole}))
    if len(dims) < 2:
        return Variant(encoder, "single" if dims == whole[-1:] else "fixed", dims)
    tied = all(task.nesting == "mrl-e" for task in config.tasks.values())
    return Variant(encoder, "tied" if tied else "trained", dims)


def find_variants(recipe: Recipe, evaluation: str) -> dict[str, Variant]:
    """Embed step -> variant; the first nested one, tied or not, is the subject."""
    found: dict[str, Variant] = {}
    for name in embed_steps(recipe, evaluation):
        encoder = recipe.steps[name].inputs["encoder"]
        assert isinstance(encoder, str)
        variant = describe(recipe, encoder)
        first = all(other.role != "nested" for other in found.values())
        if first and variant.role in ("trained", "tied"):
            variant = Variant(variant.name, "nested", variant.dims)
        found[name] = variant
    return found


def seed_overrides(recipe: Recipe, seed: int, evaluation: str) -> list[str]:
    """Overrides that seed the trained and the random encoders and the evaluation.

    An embedding of one of these is made again for every seed: where the other ones name the rows the evaluation needs,
    it keeps to them too.
    """
    needed = needed_steps(recipe, evaluation)
    random = {
        name for name in needed if recipe.steps[name].stage == "encoder" and describe(recipe, name).role == "random"
    }
    seeded = [name for name in needed if recipe.steps[name].stage in SEEDED or name in {*random, evaluation}]
    embeds = embed_steps(recipe, evaluation)
    wheres = {json.dumps(where) for name in embeds if (where := recipe.steps[name].settings.get("where"))}
    overrides = [f"{name}.seed={seed}" for name in seeded]
    if len(wheres) == 1:
        overrides += [
            f"{name}.where={next(iter(wheres))}" for name in embeds if recipe.steps[name].inputs["encoder"] in seeded
        ]
    return overrides


def run_seed(path: str, overrides: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """Figures of the headline task with every trained encoder seeded by ``seed``."""
    plain = Recipe.load(path, overrides)
    (evaluation,) = plain.steps_of("evaluate")
    recipe = Recipe.load(path, [*overrides, *seed_overrides(plain, seed, evaluation)])
    ensure_ray(recipe.cluster)
    for name in needed_steps(recipe, evaluation):
        artifact = recipe.run_step(name)
    report, variants = artifact.read_json("report.json"), find_variants(recipe, evaluation)
    for row in report["rows"]:
        if row["task"] == report["headline_task"]:
            variant = variants.get(row["embedding"]) or Variant(row["embedding"], "given")
            yield {
                "seed": seed,
                "variant": variant.name,
                "role": variant.role,
                "nested": row["dim"] in variant.dims,
                **row,
            }


def main() -> int:
    """Run every seed and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed of deploy/recipes/smoke.yaml")
    parser.add_argument("--seeds", type=int, default=3, help="how many; the recipe's own seed is the first")
    parser.add_argument("--recipe", default="deploy/recipes/quickstart.yaml")
    parser.add_argument("--root", help="where to publish (default: runs/learning, with --quick runs/learning-quick)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe")
    parser.add_argument("--markdown", action="store_true", help="tables of the summary on stderr too")
    options = parser.parse_args()
    setup_logging()
    path = "deploy/recipes/smoke.yaml" if options.quick else options.recipe
    overrides = [f"root={options.root or ('runs/learning-quick' if options.quick else 'runs/learning')}", *options.set]
    first = Recipe.load(path, overrides).seed
    facts = {"bench": "learning", "recipe": os.path.basename(path), "machine": machine_facts()}
    rows: list[Row] = []
    for seed in range(first, first + (1 if options.quick else options.seeds)):
        for row in run_seed(path, overrides, seed):
            rows.append(row)
            case = f"{row['variant']} {row['method']} {row['dim']}"
            print(json.dumps({**facts, "case": case, **row}), flush=True)
    summary = summarise(rows)
    print(json.dumps({**facts, "summary": True, **summary}), flush=True)
    if options.markdown:
        print(render_markdown(summary), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
