from typing import Any

import pytest

from lookalike.artifacts import Artifact, Draft
from lookalike.commands.variants import render, table_of
from lookalike.errors import UsageError


def publish(root: str, kind: str, name: str, stats: dict[str, Any], **parents: list[Artifact]) -> Artifact:
    draft = Draft(root, kind, name, "0" * 20)
    draft.stats = stats
    draft.write_json("content.json", stats)
    if kind == "report":
        draft.write_json("report.json", stats)
    return draft.publish(config={}, parents=parents, stage_version=1, duration_s=0)


def trained(root: str, name: str, terms: int, labels: int, base: Artifact) -> Artifact:
    made = publish(
        root,
        "labels",
        f"{name}-labels",
        {"terms_used": terms, "labels": labels, "labels_per_image": 2.5, "images": 900},
        embeddings=[base],
    )
    shards = publish(root, "shards", f"{name}-shards", {"repeat": {"max_label": 3.0}}, labels=[made])
    encoder = publish(root, "encoder", name, {}, shards=[shards])
    return publish(root, "embeddings", name, {}, encoder=[encoder])


def evaluation(root: str, embeddings: list[Artifact], p_at_1: list[float]) -> Artifact:
    figures = {
        a.manifest.name: {"p_at_1": p, "p_at_1_standard_error": 0.01} for a, p in zip(embeddings, p_at_1, strict=True)
    }
    return publish(root, "report", "evaluate", {"full_dim": figures, "headline_task": "product"}, embeddings=embeddings)


def test_a_row_a_variant_with_the_counts_of_its_own_labels(root: str) -> None:
    """The form of Table 2 of Beal et al.: label count, retrieval, improvement over the row before; and ablations."""
    base = publish(root, "embeddings", "packaged", {})
    made = [base, trained(root, "clusters", 834, 500, base), trained(root, "dictionary", 340, 220, base)]
    made += [trained(root, f"without-{step}", 340, 220, base) for step in ("resampling", "dictionary")]
    rows = table_of(evaluation(root, made, [0.5, 0.55, 0.66, 0.6, 0.594]))
    assert [(r["variant"], r["terms"], r["labels"], r["p_at_1"], r["relative"]) for r in rows] == [
        ("packaged", None, None, 50.0, None),
        ("clusters", 834, 500, 55.0, "+10.0%"),
        ("dictionary", 340, 220, 66.0, "+20.0%"),
        ("without-resampling", 340, 220, 60.0, "-9.1%"),
        ("without-dictionary", 340, 220, 59.4, "-10.0%"),
    ]
    lines = render(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:3] == ["packaged", "-", "-"]


def test_an_evaluation_of_untrained_embeddings_is_no_table(root: str) -> None:
    base = publish(root, "embeddings", "packaged", {})
    with pytest.raises(UsageError, match="no embedding of this evaluation was trained on labels"):
        table_of(evaluation(root, [base], [0.5]))
