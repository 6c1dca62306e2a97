"""The recall monitor says of live answers what an offline measurement says, and leaves out what is no plan's doing."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lookalike.retrieval.plan import Plan
from lookalike.retrieval.planner import per_query_recall
from lookalike.retrieval.ranking import Hits
from lookalike.serve.client import SearchPlan
from lookalike.serve.front import observer
from lookalike.serve.local import LocalClient
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.watching import MonitorSettings
from lookalike.serve.watch.recall_monitor import recall_of
from lookalike.serve.wire.answers import Answer

if TYPE_CHECKING:
    from tests.serve.conftest import World

POOR = Plan(shortlist_dim=8, shortlist_k=5, rerank_dim=64)
K = 5


@pytest.fixture(scope="module")
def poor_plan(world: "World") -> str:
    from lookalike.artifacts import Artifact
    from tests.serve.conftest import publish_plan

    return publish_plan(world.root, Artifact.open(world.index, "index"), POOR.model_dump(), name="poor").uri


class Metric:
    """What was set or counted, by labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, value: float, labels: dict[str, str]) -> None:
        self.values[tuple(labels.values())] = value

    def inc(self, value: float, labels: dict[str, str] | None = None) -> None:
        key = tuple((labels or {}).values())
        self.values[key] = self.values.get(key, 0) + value

    def observe(self, value: float, labels: dict[str, str]) -> None:
        """Not looked at."""


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> dict[str, Metric]:
    """Metrics of the observer made last, by name."""
    made: dict[str, Metric] = {}
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(observer, kind, lambda name, *_: made.setdefault(name, Metric()))
    return made


class Watched(LocalClient):
    """A local client whose monitor is looked into."""

    def __init__(self, world: "World", plan: str, metrics: dict[str, Metric], **settings: Any) -> None:
        super().__init__(ServeConfig(index=world.index, plan=plan, monitor=MonitorSettings(**settings)))
        self.monitor = self.service.observer.monitor
        self.monitor.random.seed(3)
        self._skipped = metrics["lookalike_recall_skipped_total"]

    @property
    def skips(self) -> dict[str, float]:
        return {reason: count for (reason,), count in self._skipped.values.items()}

    def drain(self) -> None:
        self._run(self.monitor.drain())


@pytest.fixture
def watched(world: "World", poor_plan: str, metrics: dict[str, Metric]) -> Iterator[Watched]:
    with Watched(world, poor_plan, metrics, share=1.0, max_per_s=10_000) as client:
        yield client


def queries(count: int) -> np.ndarray:
    return np.random.default_rng(11).standard_normal((count, 64)).astype(np.float32)


def offline(world: "World", vectors: np.ndarray) -> np.ndarray:
    given = world.searcher.search(vectors, K, POOR)
    return per_query_recall(given, world.searcher.search(vectors, K, Plan.exact(64)), same_dim=True)


def test_all_searches_sampled_is_the_offline_measurement(watched: Watched, world: "World") -> None:
    vectors = queries(60)
    for vector in vectors:
        watched.search(vector=vector, k=K)
        watched.drain()
    wanted = offline(world, vectors)
    assert wanted.mean() < 0.97  # a plan that misses something
    found = watched.monitor.estimate(world.searcher.meta.generation)
    assert found is not None
    assert (found.recall, found.queries) == (pytest.approx(wanted.mean(), abs=1e-12), 60)
    assert found.low < found.recall < found.high
    message = watched.service.observer.estimate(watched.service.current)
    assert message is not None
    assert (message.recall, message.queries) == (found.recall, 60)
    assert not watched.skips


def test_the_gauges_say_what_the_estimate_says(watched: Watched, world: "World", metrics: dict[str, Metric]) -> None:
    for vector in queries(20):
        watched.search(vector=vector, k=K)
        watched.drain()
    generation = world.searcher.meta.generation
    found = watched.monitor.estimate(generation)
    assert found is not None
    key = (generation, "default")
    ends = [metrics[f"lookalike_recall{end}"].values for end in ("", "_low", "_high")]
    assert ends == [{key: found.recall}, {key: found.low}, {key: found.high}]
    assert metrics["lookalike_recall_sampled_total"].values == {("default",): 20}


def test_a_sample_agrees_within_its_interval(world: "World", poor_plan: str, metrics: dict[str, Metric]) -> None:
    vectors = queries(400)
    with Watched(world, poor_plan, metrics, share=0.25, max_per_s=10_000) as client:
        for vector in vectors:
            client.search(vector=vector, k=K)
            client.drain()
        found = client.monitor.estimate(world.searcher.meta.generation)
    assert found is not None
    assert 70 < found.queries < 130
    assert found.low <= offline(world, vectors).mean() <= found.high
    assert found.high - found.low < 0.2


def test_a_batch_gives_one_query_with_its_own_filters(watched: Watched, world: "World") -> None:
    watched.search_batch(queries(8), k=3, where={"view": ["side"]})
    watched.drain()
    found = watched.monitor.estimate(world.searcher.meta.generation)
    assert found is not None
    assert found.queries == 1


def test_what_says_nothing_of_the_plan_is_left_out_and_counted(watched: Watched, world: "World") -> None:
    vector = queries(1)[0]
    watched.search(vector=vector, plan=SearchPlan(8, 5, 64))
    watched.search(vector=vector, min_recall=0.5)
    watched.drain()
    assert watched.skips == {"own_plan": 2}
    router = watched.service.router
    whole, router.shards = router.shards, [router.shards[0], Broken()]
    watched.search(vector=vector, allow_partial=True)
    watched.drain()
    assert watched.skips == {"own_plan": 2, "partial": 1}
    router.shards = whole
    watched.service.observer.in_flight = 5
    watched.search(vector=vector)
    assert watched.skips["busy"] == 1
    watched.service.observer.in_flight = 0
    assert watched.monitor.estimate(world.searcher.meta.generation) is None


class Broken:
    async def search(self, *args: Any) -> Any:
        raise ConnectionError("gone")


def test_an_exact_search_that_fails_costs_the_sample_alone(watched: Watched) -> None:
    watched.monitor.router.shards = [Broken(), Broken()]  # the monitor's own way to the workers
    assert watched.search(vector=queries(1)[0]).hits
    watched.drain()
    assert watched.skips == {"failed": 1}


def test_no_more_than_max_per_s(world: "World", poor_plan: str, metrics: dict[str, Metric]) -> None:
    with Watched(world, poor_plan, metrics, share=1.0, max_per_s=0.001) as client:
        for vector in queries(5):
            client.search(vector=vector)
        client.drain()
        assert client.skips == {"rate": 4}


def test_off_by_default(world: "World", poor_plan: str, metrics: dict[str, Metric]) -> None:
    with Watched(world, poor_plan, metrics) as client:
        client.search(vector=queries(1)[0])
        client.drain()
        assert client.monitor.estimate(world.searcher.meta.generation) is None
        assert not client.skips


def answer(ids: str, scores: list[float]) -> Answer:
    """One query's hits: a letter is an id, rows are arbitrary."""
    rows = np.arange(len(ids))[None]
    entries = {row: (image_id,) for row, image_id in enumerate(ids)}
    return Answer(Hits(rows, np.array([scores], np.float32)), ["image_id"], entries)


@pytest.mark.parametrize(
    ("given", "recall"),
    [
        (answer("abc", [0.9, 0.8, 0.7]), 1.0),
        (answer("abd", [0.9, 0.8, 0.7]), 1.0),  # d is as good as c: a duplicate
        (answer("abe", [0.9, 0.8, 0.6]), 2 / 3),
        (answer("xyz", [0.1, 0.1, 0.1]), 0.0),
    ],
)
def test_hits_are_compared_by_id_and_ties_count(given: Answer, recall: float) -> None:
    exact = answer("abc", [0.9, 0.8, 0.7])
    assert recall_of(given, 0, exact, same_dim=True) == pytest.approx(recall)


def test_scores_of_another_dim_do_not_count_as_ties() -> None:
    exact = answer("abc", [0.9, 0.8, 0.7])
    assert recall_of(answer("abd", [0.9, 0.8, 0.95]), 0, exact, same_dim=False) == pytest.approx(2 / 3)
