"""Access log, experiment, feedback and recall monitor in replicas behind a gRPC port."""

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from lookalike.artifacts import Artifact
from lookalike.serve.app import start, stop
from lookalike.serve.client import AsyncClient, Client
from lookalike.serve.local import LocalClient
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.watch.access_log import hash_text
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.conftest import publish_index

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.ray


class Served(NamedTuple):
    client: Client
    index_b: str
    folder: Path


@pytest.fixture(scope="module")
def served(ray_session: None, world: "World", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("log")
    embeddings = Artifact.open(f"{world.root}/embeddings/embed/{'e' * 20}", "embeddings")
    half = {name: vector for name, vector in world.vectors.items() if int(name[-3:]) < 30}
    index_b = publish_index(world.root, embeddings, half, world.encoder.fingerprint, "b" * 20).uri
    config = ServeConfig.model_validate(
        {
            "index": world.index,
            "plan": world.plan,
            "placement": "staged",
            "port": 0,
            "num_replicas": 2,
            "access_log": {"folder": str(folder)},
            "monitor": {"share": 1.0, "max_per_s": 1000},
            "experiment": {"name": "trial", "arms": [{"name": "a"}, {"name": "half", "index": index_b}]},
        }
    )
    address = start(config)
    with Client(address) as client:
        client.wait_ready()
        yield Served(client, index_b, folder)
    stop()


def wait_for_lines(folder: Path, count: int) -> list[dict[str, Any]]:
    """The lines of all replicas, once there are ``count``."""
    for _ in range(600):
        texts = [text for path in folder.glob("access-*.jsonl") for text in path.read_text().splitlines()]
        if len(texts) >= count:
            break
        time.sleep(0.05)
    return [json.loads(text) for text in texts]


def test_arms_feedback_and_log_of_two_replicas(served: Served, world: "World") -> None:
    client = served.client
    arms: dict[str, set[str]] = {}
    shown = {}
    with LocalClient(world.index) as whole, LocalClient(served.index_b) as half:
        alone = {"a": whole, "half": half}
        for round_ in range(3):  # a session's requests may go to either replica
            for number in range(8):
                session = f"s{number}"
                with Client(client.address) as fresh:
                    found = fresh.search(vector=world.vectors["img-007"], k=5, session=session)
                arms.setdefault(session, set()).add(found.info.arm)
                shown[found.info.request_id] = session
                assert (
                    found.info.generation
                    == Artifact.open(
                        world.index if found.info.arm == "a" else served.index_b, "index"
                    ).manifest.fingerprint
                )
                if not round_:
                    top = alone[found.info.arm].search(vector=world.vectors["img-007"], k=1).ids
                    assert found.ids[:1] == top
    assert all(len(seen) == 1 for seen in arms.values())
    assert set.union(*arms.values()) == {"a", "half"}
    client.feedback(found.info.request_id, "click", id=found.ids[0])

    async def tell() -> None:
        async with AsyncClient(client.address) as asking:
            await asking.feedback(found.info.request_id, "save")
            with pytest.raises(RetrievalError, match=r"INVALID_ARGUMENT.*not a short word"):
                await asking.feedback(found.info.request_id, "Save it!")

    asyncio.run(asyncio.wait_for(tell(), 30))
    lines = wait_for_lines(served.folder, 27)
    searches = [line for line in lines if line["method"] == "Search"]
    assert {line["request_id"]: line["session"] for line in searches} == {
        name: hash_text(session) for name, session in shown.items()
    }
    told = [
        (line.get("kind"), line["code"], line["request_id"] == found.info.request_id)
        for line in lines
        if line["method"] == "Feedback"
    ]
    assert sorted(told, key=str) == [("click", "OK", True), ("save", "OK", True), (None, "INVALID_ARGUMENT", False)]
    assert len(list(served.folder.glob("access-*.lock"))) == 2  # a file for each replica


def test_streams_are_logged_by_their_batches(served: Served, world: "World") -> None:
    before = len(wait_for_lines(served.folder, 0))
    answers = list(served.client.search_stream([["img-001"], ["img-999"], np.stack([world.vectors["img-002"]] * 3)]))
    lines = wait_for_lines(served.folder, before + 3)
    told = sorted((line["code"], line["queries"]) for line in lines if line["method"] == "SearchStream")
    assert told == [("NOT_FOUND", 1), ("OK", 1), ("OK", 3)]
    ids = {result.info.request_id for answer in answers if not isinstance(answer, RetrievalError) for result in answer}
    assert ids == {line["request_id"] for line in lines if line["method"] == "SearchStream" and line["code"] == "OK"}


def wait_for_metric(name: str, *labels: str) -> None:
    """Return once Ray's own Prometheus endpoint has the metric with these labels; replicas report every ten seconds."""
    import ray

    address = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    lines: list[str] = []
    for _ in range(120):
        with urllib.request.urlopen(address, timeout=10) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.startswith(f"ray_{name}{{")]
        if any(all(label in line for label in labels) for line in lines):
            return
        time.sleep(0.5)
    pytest.fail(f"no {name} with {labels}, only {lines}")


def test_metrics_of_arms_and_recall_reach_prometheus(served: Served, world: "World") -> None:
    for number in range(10):
        served.client.search(vector=world.vectors["img-007"], k=5, session=f"s{number}")
    for name in ("lookalike_recall", "lookalike_recall_low", "lookalike_recall_high"):
        wait_for_metric(name, 'arm="a"', 'generation="11111')
    wait_for_metric("lookalike_arm_requests_total", 'arm="half"', 'code="OK"')
    wait_for_metric("lookalike_arm_duration_seconds_count")


def test_what_waits_is_written_when_the_service_stops(served: Served) -> None:
    found = served.client.search(image_id="img-003")
    stop()
    ids = [
        json.loads(text)["request_id"]
        for path in served.folder.glob("access-*.jsonl")
        for text in path.read_text().splitlines()
    ]
    assert found.info.request_id in ids
