"""The quickstart's report, as text for the terminal and as one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.serve.commands.tour import TourAnswer
from lookalike.telemetry import printable_lines

Row = dict[str, Any]
METHODS = {"prefix": "", "svd": ", SVD"}


def dim_table(facts: Mapping[str, Any], task: str) -> tuple[list[str], list[Row]]:
    """Return (column names, rows) of figures by dimension, with one column per embedding and method."""
    table: dict[int, Row] = {}
    columns: dict[str, None] = {}
    for row in facts["evaluation"]["rows"]:
        if row["task"] == task:
            column = facts["names"].get(row["embedding"], row["embedding"]) + METHODS[row["method"]]
            columns[column] = None
            table.setdefault(row["dim"], {"dim": row["dim"]})[column] = row
    return list(columns), [table[dim] for dim in sorted(table)]


def subject_table(evaluation: Mapping[str, Any], task: str) -> list[Row]:
    """Return P@1, mAP@10, recall@10 and bytes per vector of the subject's prefixes, smallest first."""
    key = (task, evaluation["subject"], "prefix")
    rows = [row for row in evaluation["rows"] if (row["task"], row["embedding"], row["method"]) == key]
    return [{**row, "bytes_fp32": 4 * row["dim"]} for row in sorted(rows, key=lambda row: int(row["dim"]))]


def render_text(facts: Mapping[str, Any], root: str) -> str:
    """Return the report for the terminal."""
    evaluation = facts["evaluation"]
    task = evaluation["headline_task"]
    lines = ["", "Neighbours over gRPC (held-out images; the query itself is left out)"]
    for answer in facts["neighbours"]:
        query = answer["query"]
        lines.append(f"  {query['title'] or query['image_id']}  [{query['category']}]  {query['image_id']}")
        for hit in answer["hits"]:
            same = "  <- same product" if query["group"] and hit.get("group") == query["group"] else ""
            lines.append(
                f"    {hit['score']:+.3f}  {hit.get('title') or '(no title)'}  [{hit.get('category', '')}]"
                f"  {hit['id']}{same}"
            )
    vector_ok = all(answer["same_by_vector"] for answer in facts["neighbours"])
    verdict = "the same hits" if vector_ok else "OTHER hits: see report.json"
    lines += [f"  the same queries by vector gave {verdict}", "", *_dims_text(facts, task), ""]
    lines += [*plan_text(facts["plan"]), "", *_times_text(facts), ""]
    lines += [f"Report: {storage.join(root, 'report.html')}", f"Figures: {storage.join(root, 'report.json')}"]
    return printable_lines([*lines, f"Lineage: lookalike show {facts['index']}"])


def _dims_text(facts: Mapping[str, Any], task: str) -> list[str]:
    evaluation = facts["evaluation"]
    columns, table = dim_table(facts, task)
    full = subject_table(evaluation, task)[-1]
    lines = [
        f"P@1 by dimension, task {task!r}: {full['queries']} held-out queries, {full['database']} candidates "
        f"(seed {evaluation['seed']}; percent)"
    ]
    width = max(len(column) for column in columns)
    lines.append("  " + "dim".rjust(6) + "  bytes" + "".join(column.rjust(width + 2) for column in columns))
    for line in table:
        cells = "".join((f"{100 * line[c]['p_at_1']:.1f}" if c in line else "-").rjust(width + 2) for c in columns)
        lines.append("  " + str(line["dim"]).rjust(6) + str(4 * line["dim"]).rjust(7) + cells)
    return lines


def plan_text(plan: Mapping[str, Any]) -> list[str]:
    """Return lines on the plan: recall, cost beside exact search, mAP check."""
    chosen = plan["chosen"]
    result = plan["holdout"] or {"recall": chosen["recall"], "num_queries": plan["num_queries"], "map_check": None}
    check = result["map_check"] or plan["map_check"]
    whose = "that took no part in choosing it" if plan["holdout"] else "that chose it"
    lines = [
        f"Plan: {plan['description']}",
        f"  recall@{plan['k']} against exact search {result['recall']:.4f} on {result['num_queries']} queries {whose} "
        f"(target {plan['target']})",
    ]
    if chosen["query_us"]:
        lines.append(
            f"  a query alone took {chosen['query_us']:.0f} us when plans were measured, an exact one "
            f"{chosen['query_us'] * chosen['exact_ratio']:.0f} us"
        )
    if check:
        k = check["k"]
        plan_map, exact_map = (100 * check[f"{name}_map_at_{k}_by_k"] for name in ("plan", "exact"))
        lines.append(
            f"  mAP@{k} by k, label {check['label']}: plan {plan_map:.2f}, exact {exact_map:.2f}, difference "
            f"{check['difference_points']:+.2f} points"
        )
    return lines


def _times_text(facts: Mapping[str, Any]) -> list[str]:
    lines = ["Time of each stage (s)"]
    for stage in facts["stages"]:
        note = "  skipped now; this is its time when it ran" if stage["skipped"] else ""
        lines.append(f"  {stage['step']:<16}{stage['seconds']:>8.1f}{note}")
    return [*lines, f"  {'this run':<16}{facts['total_seconds']:>8.1f}"]


def render_html(
    facts: Mapping[str, Any], artifacts: Mapping[str, Artifact], answers: Sequence[TourAnswer], pictures: dict[str, Row]
) -> str:
    """Return the report with pictures and plots as one HTML page."""
    evaluation = facts["evaluation"]
    task = evaluation["headline_task"]
    columns, table = dim_table(facts, task)
    by_kind = {artifact.manifest.kind: artifact for artifact in artifacts.values()}
    plots = {
        f"P@1 and mAP@10 by dimension, task {name}": by_kind["report"].path(f"{name}.png")
        for name in dict.fromkeys(row["task"] for row in evaluation["rows"])
    }
    plots["Candidate plans: recall and cost"] = by_kind["plan"].path("plan.png")
    neighbours = [
        {
            "query": answer.query,
            "image": data_uri(answer.query["image"]),
            "same_by_vector": answer.same_by_vector,
            "hits": [
                {
                    "hit": hit,
                    "row": pictures[hit.id],
                    "image": data_uri(pictures[hit.id]["image"]),
                    "same": bool(answer.query["group"]) and hit.metadata.get("group") == answer.query["group"],
                }
                for hit in answer.hits
            ],
        }
        for answer in answers
    ]
    template = resources.files("lookalike.serve.commands").joinpath("tour.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        facts=facts,
        task=task,
        columns=columns,
        table=table,
        subject=subject_table(evaluation, task),
        neighbours=neighbours,
        plots={title: data_uri(storage.read_bytes(uri)) for title, uri in plots.items()},
        artifacts={name: artifact.uri for name, artifact in artifacts.items()},
    )


def data_uri(content: bytes) -> str:
    """Return image bytes as a ``data:`` URI, its type taken from the first bytes."""
    kinds = {b"\x89PNG": "png", b"RIFF": "webp", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
    kind = next((kind for magic, kind in kinds.items() if content.startswith(magic)), "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
