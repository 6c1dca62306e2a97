"""What training brings: fine-tuned against its start and against chance, nested against truncation and SVD, by seed.

    python -m tests.benchmarks.learning [--quick] [--seeds 3] [--recipe deploy/recipes/quickstart.yaml] [--root FOLDER]

Runs the recipe up to its evaluation once a seed; what no seed shapes (corpus, labels, shards, the base's vectors) is
published once and skipped after that, and so is everything when the command is given again. One JSON object a line: a
row for each seed, embedding, method and dim of the headline task, then the summary over seeds.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from lookalike.cluster import ensure_ray
from lookalike.recipe import Recipe
from lookalike.retrieval.machine import machine_facts
from lookalike.telemetry import setup_logging

METRICS = ("p_at_1", "map_at_10_by_k")
SEEDED = ("pretrain", "finetune")
Row = Mapping[str, Any]


def steps_up_to(recipe: Recipe, last: str) -> list[str]:
    """``last`` and every step it needs, in the recipe's order."""
    needed = {last}
    for name in reversed(recipe.steps):
        if name in needed:
            for sources in recipe.steps[name].inputs.values():
                needed.update([sources] if isinstance(sources, str) else sources)
    return [name for name in recipe.steps if name in needed]


def find_roles(recipe: Recipe, evaluation: str) -> dict[str, str]:
    """Embed step -> what its encoder is: ``nested`` (the subject), ``twin`` (not nested), ``base`` or ``random``."""
    step, roles = recipe.steps[evaluation], {}
    names = step.inputs["embeddings"]
    for number, name in enumerate([names] if isinstance(names, str) else names):
        encoder = recipe.steps[name].inputs["encoder"]
        assert isinstance(encoder, str)
        source = recipe.steps[encoder]
        if source.stage == "encoder":
            roles[name] = "random" if source.settings.get("weights", "random") == "random" else "base"
        else:
            roles[name] = "twin" if number else "nested"
    return roles


def seed_overrides(recipe: Recipe, seed: int, evaluation: str) -> list[str]:
    """Overrides that give the trained and the random encoders a seed, and embed what the evaluation reads only."""
    roles = find_roles(recipe, evaluation)
    encoders = {str(recipe.steps[name].inputs["encoder"]) for name, role in roles.items() if role == "random"}
    seeded = [name for name, step in recipe.steps.items() if step.stage in SEEDED or name in encoders]
    (nested,) = (name for name, role in roles.items() if role == "nested")
    return [*(f"{name}.seed={seed}" for name in seeded), f"{nested}.where={{dataset: [furniture]}}"]


def run_seed(path: str, root: list[str], seed: int) -> Iterator[dict[str, Any]]:
    """Figures of the headline task with every trained encoder seeded by ``seed``."""
    plain = Recipe.load(path, root)
    (evaluation,) = plain.steps_of("evaluate")
    recipe = Recipe.load(path, [*root, *seed_overrides(plain, seed, evaluation)])
    ensure_ray(recipe.cluster)
    for name in steps_up_to(recipe, evaluation):
        artifact = recipe.run_step(name)
    report, roles = artifact.read_json("report.json"), find_roles(recipe, evaluation)
    for row in report["rows"]:
        if row["task"] == report["headline_task"]:
            yield {"seed": seed, "role": roles[row["embedding"]], **row}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, extremes and their distance, to four decimals."""
    figures = {"mean": fmean(values), "min": min(values), "max": max(values), "spread": max(values) - min(values)}
    return {name: round(value, 4) for name, value in figures.items()}


def full_dim_values(rows: Sequence[Row], role: str, metric: str) -> dict[int, float]:
    """Seed -> the metric of a role's whole vectors."""
    chosen = [row for row in rows if (row["role"], row["method"]) == (role, "prefix")]
    full = max((row["dim"] for row in chosen), default=0)
    return {row["seed"]: row[metric] for row in chosen if row["dim"] == full}


def nested_margins(rows: Sequence[Row], method: str, metric: str) -> dict[str, dict[str, float]]:
    """Dim -> nested minus the twin's ``method`` (``prefix`` is truncation), paired by seed."""
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["role"], row["method"], row["dim"]), {})[row["seed"]] = row[metric]
    dims = sorted({dim for role, used, dim in found if (role, used) == ("twin", method)})
    pairs = {dim: (found.get(("nested", "prefix", dim), {}), found["twin", method, dim]) for dim in dims}
    return {str(dim): spread([ours[seed] - theirs[seed] for seed in ours])
            for dim, (ours, theirs) in pairs.items() if ours}  # fmt: skip


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The summary over seeds: levels and margins at full size, nested against the twin by dim, ratios."""
    full = {role: values for role in ("nested", "twin", "base", "random")
            if (values := full_dim_values(rows, role, "p_at_1"))}  # fmt: skip
    nested, base = full["nested"], full["base"]
    margin = spread([nested[seed] - base[seed] for seed in nested])
    return {
        "seeds": sorted(nested),
        "full_dim_p_at_1": {role: spread(list(values.values())) for role, values in full.items()},
        "nested_minus_base": {**margin, "above_spread": margin["mean"] > spread(list(nested.values()))["spread"]},
        **{f"nested_minus_{name}": {metric: nested_margins(rows, method, metric) for metric in METRICS}
           for name, method in (("truncated", "prefix"), ("svd", "svd"))},
        "ratios": {f"nested_over_{role}_p_at_1": round(fmean(nested.values()) / fmean(full[role].values()), 3)
                   for role in ("twin", "base", "random") if role in full and fmean(full[role].values()) > 0},
    }  # fmt: skip


def main() -> int:
    """Run every seed and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed of deploy/recipes/smoke.yaml")
    parser.add_argument("--seeds", type=int, default=3, help="how many; the recipe's own seed is the first")
    parser.add_argument("--recipe", default="deploy/recipes/quickstart.yaml")
    parser.add_argument("--root", help="where to publish (default: runs/learning, with --quick runs/learning-quick)")
    options = parser.parse_args()
    setup_logging()
    path = "deploy/recipes/smoke.yaml" if options.quick else options.recipe
    root = [f"root={options.root or ('runs/learning-quick' if options.quick else 'runs/learning')}"]
    first = Recipe.load(path, root).seed
    facts = {"bench": "learning", "recipe": os.path.basename(path), "machine": machine_facts()}
    rows: list[Row] = []
    for seed in range(first, first + (1 if options.quick else options.seeds)):
        for row in run_seed(path, root, seed):
            rows.append(row)
            case = f"{row['role']} {row['method']} {row['dim']}"
            print(json.dumps({**facts, "case": case, **row}), flush=True)
    print(json.dumps({**facts, "summary": True, **summarise(rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
