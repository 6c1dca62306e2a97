"""The service without a server: the searcher's answers, and the exact status code of every wrong request."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from PIL import Image

from lookalike.errors import UsageError
from lookalike.retrieval.plan import Plan
from lookalike.serve.client import Client, SearchPlan, StoredRow
from lookalike.serve.generations.generation import read_generation
from lookalike.serve.local import LocalClient
from lookalike.serve.settings.config import RequestLimits, ServeConfig
from lookalike.serve.wire.errors import RetrievalError
from lookalike.vision.encoder import to_bytes

if TYPE_CHECKING:
    from tests.serve.conftest import World

PLAN = Plan(shortlist_dim=16, shortlist_k=12, rerank_dim=64)
LIMITS = RequestLimits(
    max_k=50, max_batch=8, max_image_bytes=20_000, max_pixels=10_000, max_shortlist_k=100, max_filter_values=20
)
INVALID = grpc.StatusCode.INVALID_ARGUMENT
VECTOR = np.ones(64, np.float32)


@pytest.fixture(scope="module")
def client(world: "World") -> Iterator[Client]:
    with LocalClient(ServeConfig(index=world.index, plan=world.plan, limits=LIMITS)) as client:
        yield client


def test_vector_image_and_id_queries_answer_as_the_searcher_does(client: Client, world: "World") -> None:
    name = "img-007"
    hits = world.searcher.search(world.vectors[name], 5, PLAN)
    queries: list[dict[str, Any]] = [{"vector": world.vectors[name]}, {"image": world.images[name]}, {"image_id": name}]
    for query in queries:
        result = client.search(**query, k=5)
        assert result.ids == world.searcher.ids(hits.rows[0])
        assert np.allclose([hit.score for hit in result.hits], hits.scores[0], atol=1e-5)
        assert result.info.plan == SearchPlan(16, 12, 64)
    assert result.ids[0] == name
    assert result.hits[0].metadata == {"title": "picture img-007", "view": "side"}  # the null category is left out


def test_a_batch_mixes_kinds_and_keeps_the_order(client: Client, world: "World") -> None:
    results = client.search_batch(["img-003", world.images["img-004"], world.vectors["img-005"]], k=3)
    assert [result.ids[0] for result in results] == ["img-003", "img-004", "img-005"]
    assert all(len(result.hits) == 3 for result in results)


def test_k_beyond_the_index_gives_all_of_it(client: Client, world: "World") -> None:
    few = client.search(image_id="img-001", k=50, plan=SearchPlan(8, 60, 64))
    hits = world.searcher.search(world.vectors["img-001"], 50, Plan(shortlist_dim=8, shortlist_k=60, rerank_dim=64))
    assert few.ids == world.searcher.ids(hits.rows[0])
    with LocalClient(world.index) as all_limits:
        everything = all_limits.search(image_id="img-001", k=100)
    assert sorted(everything.ids) == sorted(world.images)


def test_filters_keep_the_answer_to_rows_that_meet_them(client: Client, world: "World") -> None:
    ids = [name for name in world.images if int(name[-3:]) % 3 == 1]
    some = client.search(image_id="img-002", k=50, where={"view": ["side"]})
    assert sorted(some.ids) == sorted(ids)
    two = client.search(image_id="img-002", k=50, where={"view": ["side", "back"], "title": ["picture img-002"]})
    assert two.ids == ["img-002"]
    assert not client.search(image_id="img-002", where={"view": []}).hits
    assert not client.search(image_id="img-002", where={"view": ["nowhere"]}).hits
    exact = Plan.exact(64)
    best = client.search(vector=VECTOR, k=5, where={"view": ["front"]}, plan=exact)
    everything = client.search(vector=VECTOR, k=50, plan=exact).ids
    with LocalClient(world.index) as unlimited:
        everything = unlimited.search(vector=VECTOR, k=60, plan=exact).ids
    assert best.ids == [name for name in everything if int(name[-3:]) % 3 == 0][:5]


@pytest.mark.parametrize(
    ("recall", "plan"),
    [
        (0.4, SearchPlan(16, 6, 64)),
        (0.95, SearchPlan(16, 12, 64)),
        (0.98, SearchPlan(64, 1, 64, scan=True)),
    ],
)
def test_min_recall_takes_the_cheapest_plan_known_to_reach_it(
    client: Client, world: "World", recall: float, plan: SearchPlan
) -> None:
    result = client.search(image_id="img-009", k=5, min_recall=recall)
    assert result.info.plan == plan
    assert result.ids == client.search(image_id="img-009", k=5, plan=plan).ids
    with LocalClient(world.index) as unplanned:  # nothing was measured
        assert unplanned.search(image_id="img-009", min_recall=recall).info.plan.scan


def test_a_stream_answers_in_order_and_survives_a_bad_batch(client: Client) -> None:
    batches = [["img-001", "img-002"], ["img-999"], [VECTOR], ["img-003"]]
    one, bad, vector, last = client.search_stream(batches, k=2)
    assert not isinstance(one, RetrievalError)
    assert [result.ids[0] for result in one] == ["img-001", "img-002"]
    assert isinstance(bad, RetrievalError)
    assert bad.code == grpc.StatusCode.NOT_FOUND
    assert not isinstance(vector, RetrievalError)
    assert not isinstance(last, RetrievalError)
    assert last[0].ids[0] == "img-003"


def test_an_answer_too_large_for_a_message_fails_in_its_place(
    client: Client, world: "World", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lookalike.serve.wire.requests.MAX_ANSWER_BYTES", 1000)
    one, large, last = client.search_stream([["img-001"], ["img-001"] * 8, ["img-003"]], k=5)
    assert isinstance(large, RetrievalError)
    assert large.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "ask for a smaller k, or fewer queries" in large.message
    assert not isinstance(one, RetrievalError)
    assert not isinstance(last, RetrievalError)
    assert last[0].ids[0] == "img-003"
    for send in (lambda: client.search(image_id="img-001", k=50), lambda: client.embed([world.images["img-000"]] * 8)):
        with pytest.raises(RetrievalError, match="RESOURCE_EXHAUSTED: the answer has more than 1000 bytes"):
            send()


def test_embed_gives_the_encoders_vectors(client: Client, world: "World") -> None:
    embeddings = client.embed([world.images["img-000"], world.images["img-001"]])
    wanted = np.stack([world.vectors["img-000"], world.vectors["img-001"]])
    assert np.allclose(embeddings.vectors, wanted, atol=1e-4)
    assert embeddings.model_fingerprint == world.encoder.fingerprint


def test_describe_says_what_is_served(client: Client, world: "World") -> None:
    found = client.describe()
    assert (found.dim, found.dims, found.num_rows, found.num_shards) == (64, (8, 16, 64), 60, 2)
    assert (found.generation, found.model_fingerprint) == (world.searcher.meta.generation, world.encoder.fingerprint)
    assert found.limits == LIMITS.model_dump()
    assert found.has_encoder
    assert found.columns == ("image_id", "title", "category", "view")


def bomb() -> bytes:
    return to_bytes(Image.new("RGB", (200, 200)))


def with_value(value: float) -> np.ndarray:
    vector = VECTOR.copy()
    vector[5] = value
    return vector


WRONG: dict[str, tuple[Callable[[Client], Any], grpc.StatusCode, str]] = {
    "k of zero": (lambda c: c.search(vector=VECTOR, k=0), INVALID, "k=0"),
    "k above the limit": (lambda c: c.search(vector=VECTOR, k=51), INVALID, "k=51 is not between 1 and 50"),
    "short vector": (lambda c: c.search(vector=VECTOR[:8]), INVALID, "32 bytes; 64 float32 numbers are 256"),
    "NaN": (lambda c: c.search(vector=with_value(np.nan)), INVALID, "nan at position 5"),
    "infinity": (lambda c: c.search(vector=with_value(np.inf)), INVALID, "inf at position 5"),
    "zeros": (lambda c: c.search(vector=VECTOR * 0), INVALID, "no direction"),
    "overflow": (lambda c: c.search(vector=VECTOR * np.float32(3e38)), INVALID, "no direction"),
    "underflow": (lambda c: c.search(vector=VECTOR * np.float32(1e-40)), INVALID, "no direction"),
    "no image": (lambda c: c.search(image=b"hello"), INVALID, "no image"),
    "zero bytes": (lambda c: c.search(image=b""), INVALID, "zero bytes"),
    "truncated image": (lambda c: c.search(image=bomb()[:150]), INVALID, "image"),
    "too many pixels": (lambda c: c.search(image=bomb()), INVALID, "limit is 10000"),
    "too many bytes": (lambda c: c.search(image=b"x" * 20_001), INVALID, "20001 bytes, the limit is 20000"),
    "one bad image of two": (lambda c: c.search_batch([to_bytes(Image.new("RGB", (9, 9))), b"x"]), INVALID, "image 1:"),
    "large batch": (lambda c: c.search_batch([VECTOR] * 9), INVALID, "9 queries in one request; send 1 to 8"),
    "empty batch": (lambda c: c.search_batch([]), INVALID, "0 queries"),
    "no images": (lambda c: c.embed([]), INVALID, "0 images"),
    "large shortlist": (lambda c: c.search(vector=VECTOR, plan=SearchPlan(8, 101, 64)), INVALID, "101 exceeds 100"),
    "plan of unknown dim": (lambda c: c.search(vector=VECTOR, plan=SearchPlan(8, 10, 32)), INVALID, "[32]"),
    "plan without shortlist": (lambda c: c.search(vector=VECTOR, plan=SearchPlan(64, 10, 64)), INVALID, "or scan"),
    "plan that shrinks": (lambda c: c.search(vector=VECTOR, plan=SearchPlan(16, 10, 8)), INVALID, "grow"),
    "unknown id": (lambda c: c.search(image_id="img-999"), grpc.StatusCode.NOT_FOUND, "'img-999'"),
    "unknown column": (
        lambda c: c.search(vector=VECTOR, where={"colour": ["red"]}),
        INVALID,
        "'colour': the index has the columns image_id, title, category, view",
    ),
    "many filter values": (lambda c: c.search(vector=VECTOR, where={"view": ["x"] * 21}), INVALID, "21 filter values"),
    "recall above one": (lambda c: c.search(vector=VECTOR, min_recall=1.5), INVALID, "min_recall=1.5"),
    "recall of zero": (lambda c: c.search(vector=VECTOR, min_recall=0.0), INVALID, "min_recall=0 "),
    "recall and plan": (lambda c: c.search(vector=VECTOR, min_recall=0.9, plan=PLAN), INVALID, "both set"),
    "another model": (
        lambda c: c.search(vector=VECTOR, model_fingerprint="f00"),
        grpc.StatusCode.FAILED_PRECONDITION,
        "model 'f00'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_get_their_status(client: Client, case: str) -> None:
    send, code, words = WRONG[case]
    with pytest.raises(RetrievalError) as caught:
        send(client)
    assert caught.value.code == code
    assert words in caught.value.message


def test_the_right_fingerprint_passes(client: Client, world: "World") -> None:
    assert client.search(vector=VECTOR, model_fingerprint=world.encoder.fingerprint).hits


def test_without_encoder_images_are_refused_and_vectors_are_not(world: "World") -> None:
    with LocalClient(ServeConfig(index=world.index, encoder="none")) as client:
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*without an encoder"):
            client.search(image=world.images["img-000"])
        assert client.search(vector=world.vectors["img-000"]).ids[0] == "img-000"
        assert not client.describe().has_encoder


def test_exactly_one_query(client: Client) -> None:
    with pytest.raises(ValueError, match="2 queries given"):
        client.search(vector=VECTOR, image_id="img-000")
    with pytest.raises(ValueError, match="0 queries given"):
        client.search()


def test_writes_and_switches_are_refused_as_a_service_refuses_them(client: Client) -> None:
    for send in (
        lambda: client.upsert([StoredRow("a", VECTOR)]),
        lambda: client.delete(["a"]),
        client.status,
        lambda: client.switch("x"),
        client.rollback,
        client.compact,
    ):
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*writes\.state"):
            send()


def test_a_service_that_started_without_an_encoder_has_none_after_a_switch(world: "World") -> None:
    with LocalClient(ServeConfig(index=world.index, encoder="none")) as client:
        client.service.current = read_generation(world.index, None)
        assert not client.describe().has_encoder
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*without an encoder"):
            client.search(image=world.images["img-000"])


def test_a_call_may_take_as_long_as_is_asked_for(world: "World") -> None:
    with LocalClient(world.index, timeout_s=77) as client:
        assert client.service.config.timeout_s == 77
    with pytest.raises(UsageError, match="timeout_s"):
        LocalClient(world.index, timeout_s=0)
