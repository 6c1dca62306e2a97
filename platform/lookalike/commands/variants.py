"""``lookalike variants``: a table of a recipe whose last evaluation compares embeddings of pipeline variants.

Each embedding is a row: terms, labels and labels per image from the labels and shards in its lineage, retrieval from
the evaluation. With ``deploy/recipes/table2.yaml`` this is Table 2 of the Pinterest paper: label counts and downstream
retrieval with each step of the label pipeline switched on in turn.
"""

import json
from collections.abc import Sequence
from typing import Any

from lookalike import cluster, storage
from lookalike.artifacts import Artifact, lineage
from lookalike.commands.run import recipe_arguments
from lookalike.errors import ArtifactError, UsageError
from lookalike.recipe import Recipe, run_steps
from lookalike.telemetry import printable, printable_lines

COLUMNS = (
    ("variant", "variant"),
    ("terms", "terms"),
    ("labels", "labels"),
    ("labels_per_image", "labels/image"),
    ("train_images", "images"),
    ("max_repeat", "max r(I)"),
    ("p_at_1", "P@1 %"),
    ("standard_error", "+-"),
    ("relative", "relative"),
)

WITHOUT = "without-"
"""Prefix of variants that lack one step of the whole pipeline; no other row is compared with them."""


def variants(args: Sequence[str]) -> int:
    """Run the recipe, print the table, write ``variants.json`` under its root."""
    parser = recipe_arguments(
        "variants",
        "Run a recipe of variants and print label counts beside retrieval, one row per embedding of its last "
        "evaluation.",
    )
    options = parser.parse_intermixed_args(list(args))
    recipe = Recipe.load(options.recipe, options.overrides)
    evaluation = recipe.steps_of("evaluate")[-1]
    if options.dry_run:
        print(json.dumps(recipe.steps[evaluation].inputs, indent=1))
        return 0
    recipe.foresee()
    cluster.ensure_ray(recipe.cluster)
    artifacts, _ = run_steps(recipe)
    rows = table_of(artifacts[evaluation])
    target = storage.join(recipe.root, "variants.json")
    storage.write_atomic(target, (json.dumps(rows, indent=1) + "\n").encode())
    print(render(rows))
    print(
        f"\nP@1 of task {artifacts[evaluation].read_json('report.json')['headline_task']!r} at full size; relative to "
        f"the row before, leaving out rows named {WITHOUT}...\nFigures: {printable(target)}"
    )
    return 0


def table_of(evaluation: Artifact) -> list[dict[str, Any]]:
    """One row per embedding of an evaluation, in its order; ``UsageError`` if none was trained on labels."""
    figures = evaluation.read_json("report.json")["full_dim"]
    rows: list[dict[str, Any]] = []
    for input_name, entry, uri in evaluation.parents():
        if input_name != "embeddings":
            continue
        embeddings = Artifact.open(uri, entry.kind, check=False)
        name = embeddings.manifest.name
        row = {
            "variant": name,
            **_training_facts(embeddings),
            "p_at_1": round(100 * figures[name]["p_at_1"], 2),
            "standard_error": round(100 * figures[name]["p_at_1_standard_error"], 2),
        }
        before = next((other["p_at_1"] for other in reversed(rows) if not other["variant"].startswith(WITHOUT)), None)
        row["relative"] = None if not before else f"{100 * (row['p_at_1'] / before - 1):+.1f}%"
        rows.append(row)
    if not any(row["labels"] is not None for row in rows):
        raise UsageError(
            f"{evaluation.uri}: no embedding of this evaluation was trained on labels; give the recipe a "
            "pretrain or finetune step before the embeddings it compares"
        )
    return rows


def _training_facts(embeddings: Artifact) -> dict[str, Any]:
    """Facts of the nearest labels and shards in the lineage; None for each without training."""
    facts: dict[str, Any] = dict.fromkeys(("terms", "labels", "labels_per_image", "train_images", "max_repeat"))
    seen: set[str] = set()
    for _, _, ancestor in lineage(embeddings):
        if isinstance(ancestor, ArtifactError):
            raise ancestor
        kind, stats = ancestor.manifest.kind, ancestor.stats
        if kind in seen:
            continue
        seen.add(kind)
        if kind == "labels":
            facts |= {
                "terms": stats["terms_used"],
                "labels": stats["labels"],
                "labels_per_image": stats["labels_per_image"],
                "train_images": stats["images"],
            }
        elif kind == "shards":
            facts["max_repeat"] = stats["repeat"]["max_label"]
    return facts


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an aligned text table."""
    cells = [[title for _, title in COLUMNS]]
    cells += [["-" if row[key] is None else str(row[key]) for key, _ in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return printable_lines(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )
