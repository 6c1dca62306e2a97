"""A service that changes while it serves: writes, another index, rollback, compaction, a restart."""

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from lookalike.artifacts import Artifact
from lookalike.cli import main
from lookalike.serve.app import start, stop
from lookalike.serve.client import Client, StoredRow
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.serve.wire.errors import RetrievalError
from tests.serve.conftest import draw, publish_embeddings, publish_index

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.ray
VISIBLE_S = 1.0


@pytest.fixture(params=["sharded", "fused"])
def service(request: pytest.FixtureRequest, ray_session: None, world: "World", tmp_path: Path) -> ServeConfig:
    return ServeConfig(
        index=world.index,
        plan=world.plan,
        placement=request.param,
        port=0,
        timeout_s=5.0,
        cpus_per_replica=0.1,
        writes=Writes(state=str(tmp_path / "state"), roots=(str(tmp_path),)),
    )


def search_within(client: Client, seconds: float, **query: object) -> list[str]:
    """Ids that a search for a written id finds, as soon as it is found."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return client.search(**query).ids  # type: ignore[arg-type]
        except RetrievalError as error:
            if error.code != grpc.StatusCode.NOT_FOUND or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_writes_generations_and_a_restart(
    service: ServeConfig, world: "World", other: Artifact, tmp_path: Path
) -> None:
    vector = np.arange(1, 65, dtype=np.float32)
    address = start(service)
    with Client(address) as client:
        client.wait_ready()
        assert client.describe().generation == Artifact.open(world.index).manifest.fingerprint
        assert client.upsert([StoredRow("new", vector, {"view": "front", "title": "new one"})]) == 1
        assert client.upsert([StoredRow("drawn", draw(500)), StoredRow("img-003", vector[::-1].copy())]) == 2
        assert client.delete(["img-007", "nobody"]) == 3
        assert search_within(client, VISIBLE_S, image_id="new", k=1) == ["new"]
        time.sleep(VISIBLE_S)
        hit = client.search(vector=vector, k=1).hits[0]
        assert (hit.id, hit.metadata) == ("new", {"view": "front", "title": "new one"})
        assert client.search(vector=vector[::-1].copy(), k=1).ids == ["img-003"]
        assert client.search(image=draw(500), k=1).ids == ["drawn"]
        everything = client.search(vector=vector, k=200).ids
        assert len(everything) == len(set(everything)) == 60 + 2 - 1
        assert "img-007" not in everything
        with pytest.raises(RetrievalError, match=r"NOT_FOUND.*img-007"):
            client.search(image_id="img-007")
        status = client.status()
        assert (status.last_write, status.pending_rows) == (3, 5)
        check_commands(address, tmp_path)
        check_refusals(client, world)

        first = client.describe().generation
        assert client.switch(other.uri).name == other.manifest.fingerprint
        info = client.search(image_id="new", k=1)
        assert (info.ids, info.info.generation) == (["new"], other.manifest.fingerprint)  # writes go along
        assert client.rollback().name == first
        assert client.search(image_id="drawn", k=1).info.generation == first
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*it is not there"):
            client.switch(f"{world.root}/nowhere/at/all")
        with pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*it is not there"):
            client.switch("/nowhere/at/all")
        assert client.status().current == first
    stop()

    address = start(service)  # everything is as it was
    with Client(address) as client:
        client.wait_ready()
        assert client.search(vector=vector, k=200).ids == everything
        assert client.describe().generation == first
        compacted = client.compact()
        assert compacted.name not in (first, other.manifest.fingerprint)
        assert (compacted.includes_writes, compacted.num_rows) == (3, 61)
        status = client.status()
        assert (status.pending_rows, status.current, status.previous) == (0, compacted.name, first)
        assert sorted(client.search(vector=vector, k=200).ids) == sorted(everything)
        assert client.search(vector=vector, k=1).hits[0].metadata["title"] == "new one"
        assert client.compact().name == compacted.name  # nothing to do
        assert client.upsert([StoredRow("later", -vector)]) == 4
        assert search_within(client, VISIBLE_S, image_id="later", k=1) == ["later"]
    stop()


@pytest.fixture(scope="session")
def other(world: "World") -> Artifact:
    """The same pictures but the last ten, of the same model."""
    encoder = Artifact.open(world.encoder_uri)
    vectors = dict(list(world.vectors.items())[:50])
    embeddings = publish_embeddings(world.root, encoder, vectors, fingerprint="f" * 20)
    return publish_index(world.root, embeddings, vectors, encoder.manifest.fingerprint, fingerprint="4" * 20)


def check_commands(address: str, folder: Path) -> None:
    """``lookalike admin`` with the verbs that change nothing in the service."""
    assert main(["admin", "status", "--address", address, "--json"]) == 0
    assert main(["admin", "backup", "--to", f"{folder}/backup.sqlite", "--address", address]) == 0
    assert (folder / "backup.sqlite").exists()
    assert main(["admin", "backup", "--to", f"{folder}/backup.sqlite", "--address", address]) == 2  # it exists
    assert main(["admin", "upsert", "x", "--address", address]) == 2
    assert main(["admin", "upsert", f"x={folder}/none.jpg", "--address", address]) == 2
    assert main(["admin", "rollback", "--address", address]) == 2


def check_refusals(client: Client, world: "World") -> None:
    vector = np.ones(64, np.float32)
    for rows, words in [
        ([StoredRow("", vector)], "has 0 bytes"),
        ([StoredRow("a", vector[:3])], "64 float32 numbers"),
        ([StoredRow("a", vector), StoredRow("a", vector)], "twice"),
        ([], "0 rows"),
        ([StoredRow("a", vector, {"colour": "red"})], "'colour'"),
        ([StoredRow("a", vector * np.nan)], "nan"),
        ([StoredRow("a", b"no picture")], "no image"),
        ([StoredRow("x" * 600, vector)], "has 600 bytes"),
    ]:
        with pytest.raises(RetrievalError, match=f"INVALID_ARGUMENT.*{words}"):
            client.upsert(rows)
    with pytest.raises(RetrievalError, match="FAILED_PRECONDITION"):
        client.upsert([StoredRow("a", vector)], model_fingerprint="another")
    with pytest.raises(RetrievalError, match=r"INVALID_ARGUMENT.*absolute path"):
        client.backup("backup.sqlite")
    with pytest.raises(RetrievalError, match="beyond the last write"):
        client.switch(world.index, includes_writes=99)
    assert client.status().last_write == 3


def test_switches_under_load_mix_nothing(ray_session: None, world: "World", other: Artifact, tmp_path: Path) -> None:
    """Every answer is that of the generation it names, while generations change back and forth."""
    config = ServeConfig(
        index=world.index,
        placement="sharded",
        port=0,
        timeout_s=5.0,
        encoder="none",
        cpus_per_replica=0.1,
        writes=Writes(state=str(tmp_path / "state")),
    )
    address = start(config)
    vectors = np.stack([world.vectors[name] for name in list(world.images)[45:60]])
    generations = {Artifact.open(uri).manifest.fingerprint: searched(uri, vectors) for uri in (world.index, other.uri)}
    seen: set[str] = set()
    wrong: list[str] = []
    done = threading.Event()

    def ask() -> None:
        with Client(address) as client:
            while not done.is_set():
                try:
                    results = client.search_batch(vectors, k=5)
                except RetrievalError as error:
                    wrong.append(str(error))
                    return
                name = results[0].info.generation
                seen.add(name)
                if [result.ids for result in results] != generations[name]:
                    wrong.append(f"{name}: {[result.ids for result in results]}")

    threads = [threading.Thread(target=ask) for _ in range(2)]
    try:
        with Client(address) as client:
            client.wait_ready()
            for thread in threads:
                thread.start()
            for uri in (other.uri, world.index, other.uri):
                assert client.switch(uri, encoder="none").index == uri
                time.sleep(0.3)
    finally:
        done.set()
        for thread in threads:
            thread.join(20)
        stop()
    assert not wrong
    assert seen == set(generations)


def searched(uri: str, vectors: np.ndarray) -> list[list[str]]:
    from lookalike.retrieval.searcher import Searcher

    searcher = Searcher.open(uri)
    return [searcher.ids(rows) for rows in searcher.search(vectors, 5).rows]
