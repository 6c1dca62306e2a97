"""A question that crosses to another process is the same question there."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lookalike.retrieval.plan import Plan
from lookalike.serve.wire.ask import Ask
from tests.serve.test_placements import PLANS

TEXTS = st.text(max_size=5)


@given(
    st.integers(0, 3),
    st.sampled_from(PLANS),
    st.integers(1, 9),
    TEXTS,
    st.dictionaries(TEXTS, st.lists(TEXTS, max_size=3), max_size=3),
)
def test_nothing_is_lost_between_two_processes(
    num: int, plan: Plan, k: int, generation: str, filters: dict[str, list[str]]
) -> None:
    queries = np.random.default_rng(num).normal(size=(num, 8)).astype(np.float32)
    queries[:, 0] = 10  # a newline byte, in some numbers
    ask = Ask(generation, queries, k, plan, filters)
    again = Ask.unpack(ask.packed)
    assert (again.generation, again.k, again.plan, again.filters) == (generation, k, plan, filters)
    assert np.array_equal(again.queries, queries)
    assert again.kind == ask.kind


def test_only_the_queries_may_differ_within_a_kind() -> None:
    one, two = (np.full((1, 4), value, np.float32) for value in (1, 2))
    ask = Ask("g", one, 5, PLANS[0], {"view": ["side"]})
    assert ask.kind == Ask("g", two, 5, PLANS[0], {"view": ["side"]}).kind
    others = [
        Ask("h", one, 5, PLANS[0], {"view": ["side"]}),
        Ask("g", one, 6, PLANS[0], {"view": ["side"]}),
        Ask("g", one, 5, PLANS[1], {"view": ["side"]}),
        Ask("g", one, 5, PLANS[0], {"view": ["side", "front"]}),
        Ask("g", one, 5, PLANS[0]),
    ]
    assert len({ask.kind, *(other.kind for other in others)}) == 6
