"""Who gets which arm, what an arm answers, and how an arm that fails is closed."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from pydantic import ValidationError

from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError, UsageError
from lookalike.serve.app import build
from lookalike.serve.client import SearchPlan
from lookalike.serve.experiment.assignment import hash_share
from lookalike.serve.experiment.guardrails import Guard
from lookalike.serve.local import LocalClient
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.watching import ExperimentSettings
from lookalike.serve.watch.access_log import hash_text
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.conftest import publish_embeddings, publish_index, publish_plan

if TYPE_CHECKING:
    from tests.serve.conftest import World

PLAN_B = {"shortlist_dim": 8, "shortlist_k": 7, "rerank_dim": 64}


@pytest.fixture(scope="module")
def plan_b(world: "World") -> str:
    return publish_plan(world.root, Artifact.open(world.index, "index"), PLAN_B, name="plan-b").uri


@pytest.fixture(scope="module")
def index_b(world: "World", other_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same pictures by another encoder."""
    from lookalike.vision.encoder import Encoder

    root = str(tmp_path_factory.mktemp("arm"))
    encoder = Artifact.open(other_encoder, "encoder")
    vectors = dict(zip(world.images, Encoder.load(encoder).encode(list(world.images.values())), strict=True))
    embeddings = publish_embeddings(root, encoder, vectors)
    return publish_index(root, embeddings, vectors, encoder.manifest.fingerprint, "b" * 20).uri


def config_of(world: "World", *arms: dict[str, Any], mode: str = "split", **more: Any) -> ServeConfig:
    experiment = {"name": "trial", "mode": mode, "arms": [{"name": "a"}, *arms], **more.pop("experiment", {})}
    return ServeConfig.model_validate({"index": world.index, "plan": world.plan, "experiment": experiment, **more})


@pytest.fixture
def split(world: "World", plan_b: str) -> Iterator[LocalClient]:
    with LocalClient(config_of(world, {"name": "b", "plan": plan_b})) as client:
        yield client


def test_shares_are_even_and_always_the_same() -> None:
    shares = np.array([hash_share("trial", f"session {number}") for number in range(20_000)])
    counts, _ = np.histogram(shares, bins=20, range=(0, 1))
    assert (np.abs(counts - 1000) < 150).all()  # five standard deviations
    assert hash_share("trial", "x") == pytest.approx(0.6215, abs=1e-4)  # what other replicas and releases say
    assert abs(np.corrcoef(shares, [hash_share("next", f"session {number}") for number in range(20_000)])[0, 1]) < 0.05


def test_a_session_keeps_its_arm_and_weights_are_kept(world: "World", plan_b: str) -> None:
    arms = [{"name": "b", "plan": plan_b, "weight": 2.0}, {"name": "c", "plan": "none", "weight": 1.0}]
    seen: Counter[str] = Counter()
    with LocalClient(config_of(world, *arms)) as replica, LocalClient(config_of(world, *arms)) as other:
        for number in range(400):
            arm = replica.search(image_id="img-001", k=3, session=f"s{number}").info.arm
            seen[arm] += 1
            if number < 40:
                assert other.search(image_id="img-002", session=f"s{number}").info.arm == arm
    assert abs(seen["b"] - 200) < 50
    assert abs(seen["a"] - 100) < 45
    assert abs(seen["c"] - 100) < 45


def test_each_arm_answers_by_its_own_plan(split: LocalClient, world: "World") -> None:
    plans = {"a": SearchPlan(16, 12, 64), "b": SearchPlan(**PLAN_B)}
    arms = set()
    for number in range(12):
        result = split.search(image_id="img-007", k=5, session=f"s{number}")
        assert result.info.plan == plans[result.info.arm]
        assert result.ids == split.search(image_id="img-007", k=5, plan=plans[result.info.arm]).ids
        arms.add(result.info.arm)
    assert arms == {"a", "b"}
    batches = split.search_stream([["img-001"]] * 2, session="s1")
    arms = {result.info.arm for batch in batches if not isinstance(batch, RetrievalError) for result in batch}
    assert arms == {split.search(image_id="img-001", session="s1").info.arm}


def test_without_a_session_chance_decides(split: LocalClient) -> None:
    assert {split.search(image_id="img-001").info.arm for _ in range(60)} == {"a", "b"}


def test_own_plans_stay_outside(split: LocalClient) -> None:
    for number in range(6):
        session = f"s{number}"
        assert split.search(image_id="img-001", plan=SearchPlan(16, 5, 64), session=session).info.arm == ""
        assert split.search(image_id="img-001", min_recall=0.9, session=session).info.arm == ""


def test_arms_of_two_models(world: "World", index_b: str, other_encoder: str) -> None:
    name_a, name_b = (
        Artifact.open(uri, "encoder").manifest.fingerprint
        for uri in (world.root + f"/encoder/encoder/{world.encoder.fingerprint}", other_encoder)
    )
    arms = {"name": "b", "index": index_b, "encoder": other_encoder}
    with LocalClient(config_of(world, arms)) as client, LocalClient(index_b) as only_b:
        sessions = {client.search(image_id="img-001", session=f"s{n}").info.arm: f"s{n}" for n in range(20)}
        assert set(sessions) == {"a", "b"}
        for image in list(world.images.values())[:3]:  # each arm's own encoder
            result = client.search(image=image, k=4, session=sessions["b"])
            assert (result.info.arm, result.info.model_fingerprint) == ("b", name_b)
            assert result.ids == only_b.search(image=image, k=4).ids
            assert client.search(image=image, session=sessions["a"]).info.model_fingerprint == name_a
        vector = np.ones(64, np.float32)
        for session in sessions.values():  # vectors go where they belong
            assert client.search(vector=vector, model_fingerprint=name_b, session=session).info.arm == "b"
            assert client.search(vector=vector, model_fingerprint=name_a, session=session).info.arm == "a"
            assert client.search(vector=vector, session=session).info.arm == "a"  # of the served model, unless named
        with pytest.raises(RetrievalError) as caught:
            client.search(vector=vector, model_fingerprint="f00")
        assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION


def test_the_log_tells_forced_requests_apart(world: "World", index_b: str, tmp_path: Path) -> None:
    config = config_of(world, {"name": "b", "index": index_b, "encoder": "none"}, access_log={"folder": str(tmp_path)})
    with LocalClient(config) as client:
        for number in range(10):
            client.search(image_id="img-001", session=f"s{number}")
        client.search(image=world.images["img-001"], session="s0")  # arm b has no encoder
        client.search(image_id="img-001", plan=SearchPlan(16, 5, 64), session="s0")
    lines = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    free, image, own = lines[:10], lines[10], lines[11]
    assert {line["arm"] for line in free} == {"a", "b"}
    assert not any("forced" in line for line in free)
    assert [line["session"] for line in free] == [hash_text(f"s{number}") for number in range(10)]
    assert (image["arm"], image["forced"]) == ("a", "fits")
    assert not {"arm", "experiment", "session"} & set(own)
    (published,) = tmp_path.glob("experiment-trial-*.json")
    assert ExperimentSettings.model_validate_json(published.read_text()) == config.experiment


def test_interleaved_hits_come_from_both_and_say_so(world: "World", index_b: str) -> None:
    config = config_of(world, {"name": "b", "index": index_b, "encoder": "none"}, mode="interleave")
    with LocalClient(config) as client, LocalClient(index_b) as only_b, LocalClient(world.index) as only_a:
        result = client.search(image_id="img-005", k=8, session="s")
        assert (result.info.arm, len(result.ids), len(set(result.ids))) == ("interleave", 8, 8)
        assert Counter(hit.arm for hit in result.hits) == {"a": 4, "b": 4}
        best = {"a": only_a.search(image_id="img-005", k=8).ids, "b": only_b.search(image_id="img-005", k=8).ids}
        for arm in "ab":
            mine = [hit.id for hit in result.hits if hit.arm == arm]
            assert mine == [name for name in best[arm] if name in mine]
        assert result.info.generation == world.searcher.meta.generation  # control's
        two = client.search_batch(["img-005", "img-006"], k=4)
        assert [Counter(hit.arm for hit in answer.hits) for answer in two] == [{"a": 2, "b": 2}] * 2


def test_an_interleaved_arm_that_fails_leaves_the_other(world: "World", plan_b: str) -> None:
    with LocalClient(config_of(world, {"name": "b", "plan": plan_b}, mode="interleave")) as client:
        break_plan(client, PLAN_B["shortlist_k"])
        result = client.search(image_id="img-005", k=4)
        assert (result.info.arm, {hit.arm for hit in result.hits}) == ("a", {""})


def break_plan(client: LocalClient, shortlist_k: int) -> Counter[int]:
    """Searches by the plan with this shortlist_k fail from now on; counts those by each shortlist_k."""
    calls: Counter[int] = Counter()
    router: Any = client.service.router
    answered = router.search

    async def search(ask: Ask, **settings: Any) -> Any:
        calls[ask.plan.shortlist_k] += 1
        if ask.plan.shortlist_k == shortlist_k:
            raise RetrievalError(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
        return await answered(ask, **settings)

    router.search = search
    return calls


def test_an_arm_that_fails_is_closed_and_control_takes_its_sessions(
    world: "World", plan_b: str, tmp_path: Path
) -> None:
    rails = {"guardrails": {"max_error_share": 0.05, "min_requests": 10}}
    config = config_of(world, {"name": "b", "plan": plan_b}, experiment=rails, access_log={"folder": str(tmp_path)})
    with LocalClient(config) as client:
        break_plan(client, PLAN_B["shortlist_k"])
        codes: Counter[str] = Counter()
        for number in range(60):
            try:
                codes[client.search(image_id="img-001", session=f"s{number}").info.arm] += 1
            except RetrievalError as error:
                codes[error.code.name] += 1
        assert codes == {"UNAVAILABLE": 10, "a": 50}
    lines = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    (closed,) = [line for line in lines if line["method"] == "Guardrail"]
    assert (closed["arm"], closed["reason"]) == ("b", "10 of 10 requests failed, max_error_share is 0.05")
    after = lines[lines.index(closed) + 1 :]
    assert {line["arm"] for line in after} == {"a"}
    assert {"guardrail"} == {line.get("forced") for line in after} - {None}


def test_a_closed_arm_is_interleaved_no_more(world: "World", plan_b: str) -> None:
    rails = {"guardrails": {"max_error_share": 0.05, "min_requests": 10}}
    with LocalClient(config_of(world, {"name": "b", "plan": plan_b}, mode="interleave", experiment=rails)) as client:
        calls = break_plan(client, PLAN_B["shortlist_k"])
        arms = [client.search(image_id="img-001", k=4).info.arm for _ in range(30)]
        assert arms == ["a"] * 30
        assert calls == Counter({PLAN_B["shortlist_k"]: 10, 12: 30})


def guard(**rails: Any) -> Guard:
    settings = {"name": "trial", "arms": [{"name": "a"}, {"name": "b"}], "guardrails": rails}
    return Guard(ExperimentSettings.model_validate(settings))


def test_guardrails_wait_for_proof() -> None:
    watching = guard(max_error_share=0.05, min_requests=100)
    for number in range(1000):  # 5%, at the limit
        watching.count("b", "UNAVAILABLE" if number % 20 == 0 else "OK", 1.0)
    assert not watching.is_closed("b")
    for number in range(1000):
        watching.count("b", "UNAVAILABLE" if number % 10 == 0 else "OK", 1.0)
    assert watching.is_closed("b")


def test_a_good_arm_outlives_many_looks() -> None:
    """Four fifths of the limit, and 30,000 looks: a 95% interval would close half of such arms."""
    closed = 0
    for seed in range(10):
        watching = guard(max_error_share=0.01, min_requests=200)
        for fails in np.random.default_rng(seed).random(30_000) < 0.008:
            watching.count("b", "UNAVAILABLE" if fails else "OK", 1.0)
        closed += watching.is_closed("b")
    assert closed <= 2


def test_callers_mistakes_and_control_are_not_judged() -> None:
    watching = guard(max_error_share=0.05, min_requests=10)
    for _ in range(200):
        watching.count("b", "INVALID_ARGUMENT", 1.0)
        watching.count("b", "CANCELLED", 1.0)
        watching.count("a", "UNAVAILABLE", 1.0)
    assert not watching.reasons


def test_guardrail_of_latency() -> None:
    watching = guard(max_p99_ms=50.0, min_requests=100)
    for number in range(1000):
        watching.count("b", "OK", 60.0 if number % 85 == 0 else 10.0)  # 1.2%: no proof
    assert not watching.is_closed("b")
    for number in range(1000):
        watching.count("b", "OK", 60.0 if number % 20 == 0 else 10.0)
    assert "took longer than max_p99_ms, 50" in watching.reasons["b"]


def test_guardrail_of_recall() -> None:
    watching = guard(min_recall=0.9, min_requests=50)
    for _ in range(49):
        watching.measure("b", 0.5)
    assert not watching.is_closed("b")
    watching.measure("b", 0.5)
    assert watching.reasons["b"] == "recall is 0.5000 over 50 queries, min_recall 0.9"
    watching = guard(min_recall=0.9, min_requests=50)
    for _ in range(100):
        watching.measure("a", 0.0)  # control
        watching.measure("", 0.0)  # outside the experiment
    for number in range(1000):
        watching.measure("b", 0.8 if number % 2 else 1.0)  # .9, at the limit
    assert not watching.reasons
    for number in range(200):
        watching.measure("b", 0.7 if number % 2 else 0.9)
    assert watching.reasons["b"].startswith("recall is 0.8")


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        ({"arms": [{"name": "a"}]}, "at least 2"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "names must differ"),
        ({"arms": [{"name": "a"}, {"name": "interleave"}]}, "'interleave' is taken"),
        ({"arms": [{"name": "a"}, {"name": "b"}, {"name": "c"}], "mode": "interleave"}, "compares two arms"),
        ({"arms": [{"name": "a", "index": "x"}, {"name": "b"}]}, "control is what is served"),
        ({"arms": [{"name": "a"}, {"name": "b", "encoder": "x"}]}, "has an encoder and no index"),
        ({"arms": [{"name": "a"}, {"name": "B!"}]}, "pattern"),
    ],
)
def test_settings_that_make_no_experiment(experiment: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ServeConfig.model_validate({"index": "x", "experiment": {"name": "trial", **experiment}})


def test_arms_are_checked_before_anything_is_served(world: "World", index_b: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it is not there"):
        build(config_of(world, {"name": "b", "index": str(tmp_path / "nothing")}))
    with pytest.raises(ArtifactError, match="not of kind 'plan'"):
        build(config_of(world, {"name": "b", "plan": world.index}))
    with pytest.raises(UsageError, match="would miss the writes"):
        build(config_of(world, {"name": "b", "index": index_b}, writes={"state": str(tmp_path / "state")}))
    rails = {"guardrails": {"min_recall": 0.9}}
    with pytest.raises(UsageError, match=r"min_recall=0.9 is never judged with monitor.share=0,"):
        build(config_of(world, {"name": "b", "plan": "none"}, experiment=rails))
    build(config_of(world, {"name": "b", "plan": "none"}, experiment=rails, monitor={"share": 0.1}))
    build(config_of(world, {"name": "b", "index": index_b, "encoder": "none"}))
