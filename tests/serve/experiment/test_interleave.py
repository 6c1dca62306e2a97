"""Team-draft interleaving as Radlinski, Kurup and Joachims (2008) describe it."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lookalike.serve.experiment.interleave import coins, draft
from lookalike.serve.proto import retrieval_pb2 as pb

lists = st.lists(st.sampled_from("abcdefghijklmnop"), unique=True, max_size=10)


def hits(ids: str | list[str]) -> list[pb.Hit]:
    return [pb.Hit(id=image_id, score=0.5) for image_id in ids]


def drafted(first: str, second: str, seed: str, k: int = 4) -> list[tuple[str, str]]:
    return [(hit.id, hit.arm) for hit in draft(hits(first), hits(second), ("A", "B"), k, coins(seed)).hits]


def test_the_four_drafts_of_two_rounds() -> None:
    """Each round's coin decides who picks first; the second picks its best that is left."""
    seen = {tuple(drafted("abcd", "badc", str(number))) for number in range(200)}
    rounds = [
        [(("a", "A"), ("b", "B")), (("b", "B"), ("a", "A"))],
        [(("c", "A"), ("d", "B")), (("d", "B"), ("c", "A"))],
    ]
    assert seen == {first + second for first in rounds[0] for second in rounds[1]}


@given(lists, lists, st.integers(1, 10), st.integers())
def test_every_draft(first: list[str], second: list[str], k: int, seed: int) -> None:
    drafted_hits = draft(hits(first), hits(second), ("A", "B"), k, coins(str(seed))).hits
    ids = [hit.id for hit in drafted_hits]
    assert len(set(ids)) == len(ids) == min(k, len({*first, *second}))
    teams = Counter(hit.arm for hit in drafted_hits)
    assert abs(teams["A"] - teams["B"]) <= 1
    for arm, own in (("A", first), ("B", second)):
        mine = [hit.id for hit in drafted_hits if hit.arm == arm]
        assert mine == [image_id for image_id in own if image_id in mine]  # in the arm's own order
    marked = [bool(hit.arm) for hit in drafted_hits]
    assert marked == sorted(marked, reverse=True)  # those without an arm come last
    if len(first) >= k and len(second) >= k:
        assert all(marked)


def test_the_same_names_flip_the_same_coins() -> None:
    assert drafted("abcdef", "fedcba", "x", 6) == drafted("abcdef", "fedcba", "x", 6)
    assert len({tuple(drafted("abcdef", "fedcba", str(number), 6)) for number in range(50)}) > 5


def test_equal_lists_credit_both_equally() -> None:
    firsts = Counter(drafted("abcd", "abcd", str(number))[0][1] for number in range(2000))
    assert abs(firsts["A"] - 1000) < 150
