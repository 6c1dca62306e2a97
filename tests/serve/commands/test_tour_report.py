"""What the quickstart says at its end."""

import json

from lookalike.serve.commands.tour_report import plan_text


def test_the_plan_s_cost_stands_beside_the_exact_one_s() -> None:
    plan = {
        "description": "index at 16-d",
        "k": 10,
        "target": 0.99,
        "num_queries": 9,
        "map_check": None,
        "holdout": None,
        "chosen": {"recall": 0.995, "query_us": 106.3, "exact_ratio": 7.5},
    }
    text = "\n".join(plan_text(plan))
    assert "recall@10 against exact search 0.9950 on 9 queries that chose it" in text
    assert "a query alone took 106 us when plans were measured, an exact one 797 us" in text
    untimed = json.loads(json.dumps(plan))
    untimed["chosen"]["query_us"] = 0.0
    assert " us" not in "\n".join(plan_text(untimed))
