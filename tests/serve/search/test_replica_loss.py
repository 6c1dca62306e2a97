"""Replicas killed in the middle of requests: searches and writes go on, without an error to a Python client."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
import ray

from lookalike.serve.app import APP_NAME, start, stop
from lookalike.serve.client import Client, StoredRow
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.serve.settings.load import Retries
from lookalike.serve.wire.errors import RetrievalError

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.ray


def replica(role: str) -> Any:
    """One actor of ``role``."""
    names = [
        (one["name"], one["namespace"])
        for one in ray.util.list_named_actors(all_namespaces=True)
        if one["name"].startswith("SERVE_REPLICA::") and f"#{role}#" in one["name"]
    ]
    name, namespace = names[0]
    return ray.get_actor(name, namespace=namespace)


def kill(role: str) -> None:
    """End one replica of ``role``."""
    ray.kill(replica(role), no_restart=True)


class Callers:
    """Two that search and one that writes, each one call after the other."""

    def __init__(self, address: str, vector: np.ndarray, expected: list[str]) -> None:
        self._address, self._vector, self._expected = address, vector, expected
        self.wrong: list[str] = []
        self.answered = [0, 0, 0]
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(3)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        with Client(self._address, timeout_s=60) as client:
            while not self._done.is_set():
                try:
                    self._call(client, number)
                    self.answered[number] += 1
                except RetrievalError as error:
                    self.wrong.append(str(error)[:300])

    def _call(self, client: Client, number: int) -> None:
        if number == 2:
            client.upsert([StoredRow("written", -self._vector)])
        elif (ids := client.search(vector=self._vector, k=5).ids) != self._expected:
            self.wrong.append(f"{ids} for {self._expected}")

    def wait_for_more(self) -> None:
        """Return when each has had three more answers, or something is wrong."""
        goal = [count + 3 for count in self.answered]
        while not self.wrong and any(now < wanted for now, wanted in zip(self.answered, goal, strict=True)):
            time.sleep(0.02)

    def stop(self) -> None:
        """End when the calls under way have."""
        self._done.set()
        for thread in self._threads:
            thread.join(90)


def test_no_search_or_write_fails_for_a_killed_replica(ray_session: None, world: "World", tmp_path: Path) -> None:
    config = ServeConfig(
        index=world.index,
        encoder="none",
        placement="sharded",
        port=0,
        num_replicas=2,
        shard_replicas=2,
        timeout_s=60,
        cpus_per_replica=0.1,
        writes=Writes(state=str(tmp_path / "state")),
    )
    address, vector = start(config), np.arange(1, 65, dtype=np.float32)
    try:
        with Client(address) as client:
            client.wait_ready()
            callers = Callers(address, vector, client.search(vector=vector, k=5).ids)
        for role in ("shard-000", "ingress", "writer", "shard-001"):
            callers.wait_for_more()
            kill(role)
        callers.wait_for_more()
        callers.stop()
    finally:
        stop()
    assert not callers.wrong
    assert min(callers.answered) >= 15


def test_no_search_fails_for_a_replica_that_hangs(ray_session: None, world: "World") -> None:
    """As one does whose node is out of reach: it stays connected, and answers nothing."""
    retries = Retries(hedge_ms=200, hedge_share=1)
    config = ServeConfig(
        index=world.index,
        encoder="none",
        placement="sharded",
        port=0,
        shard_replicas=2,
        timeout_s=10,
        cpus_per_replica=0.1,
        retries=retries,
    )
    address, vector = start(config), np.arange(1, 65, dtype=np.float32)
    try:
        with Client(address) as client:
            client.wait_ready()
            expected = client.search(vector=vector, k=5).ids
            process = find_process("shard-000")
            os.kill(process, signal.SIGSTOP)
            try:
                found = [client.search(vector=vector, k=5).ids for _ in range(30)]
                found += [one.ids for one in client.search_batch(np.stack([vector] * 30), k=5)]
            finally:
                os.kill(process, signal.SIGCONT)
    finally:
        stop()
    assert found == [expected] * 60


def find_process(role: str) -> int:
    """The process of one replica of ``role``."""
    started_here = psutil.Process().children(recursive=True)
    return next(process.pid for process in started_here if f"ServeReplica:{APP_NAME}:{role}" in process.cmdline()[0])


@pytest.mark.soak
def test_a_writer_that_hangs_is_replaced_and_loses_nothing(ray_session: None, world: "World", tmp_path: Path) -> None:
    """Serve's health check has to notice it, since it stays connected; meanwhile searches go on."""
    config = ServeConfig(
        index=world.index,
        encoder="none",
        port=0,
        timeout_s=5,
        cpus_per_replica=0.1,
        writes=Writes(state=str(tmp_path / "state")),
    )
    address, vector = start(config), np.arange(1, 65, dtype=np.float32)
    process, codes = 0, set[str]()
    try:
        with Client(address) as client:
            client.wait_ready()
            client.upsert([StoredRow("before", -vector)])
            process = find_process("writer")
            os.kill(process, signal.SIGSTOP)
            deadline, written = time.monotonic() + 90, False
            while not written and time.monotonic() < deadline:
                assert client.search(vector=vector, k=3).hits
                try:
                    written = bool(client.upsert([StoredRow("after", -vector)]))
                except RetrievalError as error:
                    codes.add(error.code.name)
            assert written
            assert codes <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
            while (found := set(client.search(vector=-vector, k=2).ids)) != {"before", "after"}:
                assert time.monotonic() < deadline + 30, found  # replicas hear of the new writer first
                time.sleep(0.05)
    finally:
        if process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        stop()
