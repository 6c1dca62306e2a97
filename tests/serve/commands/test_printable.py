"""What a tenant or an index named reaches a terminal without characters that act there."""

import json

from lookalike.serve.client import Hit, SearchResult
from lookalike.serve.client.results import SearchInfo, SearchPlan
from lookalike.serve.commands import admin, search
from lookalike.serve.commands.tour_report import render_text
from lookalike.serve.proto import retrieval_pb2 as pb

EVIL = "a\x1b[2J\n  1  +1.0000  forged\u202e\x9b"


def check(text: str, lines: int) -> None:
    assert not any(letter in text for letter in "\x1b\u202e\x9b\r")
    assert len(text.splitlines()) == lines
    assert not any(line.startswith("  1  +1.0000  forged") for line in text.splitlines())


def test_hits() -> None:
    info = SearchInfo(SearchPlan(8, 10, 8), EVIL, EVIL, 1, 1, {EVIL: 1.0}, request_id=EVIL)
    result = SearchResult((Hit(EVIL, 0.5, {EVIL: EVIL, "title": EVIL}),), info)
    check(search.render(result), 2)
    shown = json.dumps(search._to_json(result), indent=1)  # noqa: SLF001
    assert not any(letter in shown for letter in "\x1b\u202e\x9b")


def test_status() -> None:
    generation = pb.Generation(name=EVIL, index=EVIL, plan=EVIL, num_rows=1)
    status = pb.StatusResponse(generations=[generation], current=EVIL, followers=[pb.Followers(role=EVIL)])
    shown = admin.render_status(status)
    check(shown, len(shown.splitlines()))
    assert sum(line.startswith(("serving", "writes", "replicas")) for line in shown.splitlines()) == 3


def test_the_tour() -> None:
    hit = {"id": EVIL, "score": 0.5, "title": EVIL, "category": EVIL}
    query = {"image_id": EVIL, "title": EVIL, "category": EVIL, "group": None}
    row = {"task": "t", "embedding": "e", "method": "prefix", "dim": 8, "p_at_1": 0.5, "queries": 1, "database": 1}
    plan = {
        **{"description": EVIL, "k": 1, "target": 0.9, "num_queries": 1, "holdout": None, "map_check": None},
        "chosen": {"recall": 1.0, "query_us": 0},
    }
    facts = {
        **{"plan": plan, "stages": [], "total_seconds": 1.0, "index": EVIL, "names": {"e": EVIL}},
        "neighbours": [{"query": query, "hits": [hit], "same_by_vector": True}],
        "evaluation": {"headline_task": "t", "subject": "e", "seed": 1, "rows": [row]},
    }
    shown = render_text(facts, "/root")
    check(shown, len(shown.splitlines()))
