"""When a service is lost, and when it is being put right."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lookalike.cluster import Part, look_at
from lookalike.errors import LookalikeError
from lookalike.serve.commands import supervisor as module
from lookalike.serve.commands.supervisor import Supervisor

STATES = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """A service whose health is as told."""

    status = STATES.SERVING
    silent = False

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        while self.silent and context.is_active():
            time.sleep(0.01)
        return STATES(status=self.status)


class World:
    """The service, Ray's parts and Serve, as the supervisor sees them."""

    def __init__(self) -> None:
        self.health, self.parts, self.work = Health(), list[Part](), list[str]()
        self.hangs = False
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def read_work(self) -> Sequence[str]:
        if self.hangs:
            time.sleep(5)
        return self.work

    def end(self) -> None:
        self.health.silent = False
        self._server.stop(None)

    def watch(self, until: Callable[[], bool], within_s: float = 5.0) -> None:
        """Check until something is raised or ``until`` holds."""
        supervisor = Supervisor(f"127.0.0.1:{self.port}", find_parts=lambda: self.parts, read_work=self.read_work)
        deadline = time.monotonic() + within_s
        while not until():
            assert time.monotonic() < deadline
            supervisor.check()
            time.sleep(0.01)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    seconds = {"EVERY_S": 0.05, "TIMEOUT_S": 0.3, "TELL_S": 0.2, "GIVE_UP_S": 0.8, "ALL_WELL_S": 1.2}
    for name, value in seconds.items():
        monkeypatch.setattr(module, name, value)
    world = World()
    yield world
    world.end()


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_a_service_that_answers_is_left_alone(world: World) -> None:
    world.parts = [Part("Ray's raylet", has_ended=False, is_stopped=False)]
    world.watch(after(1))


def test_a_part_that_nobody_replaces_ends_it_at_once(world: World) -> None:
    world.parts = [Part("Ray's raylet", has_ended=True, is_stopped=False)]
    with pytest.raises(LookalikeError, match=r"Ray's raylet has ended, so the service at 127.0.0.1:.* cannot go on"):
        world.watch(after(0.2))


def test_a_part_that_stands_still_ends_it(world: World) -> None:
    world.parts = [Part("Ray's GCS", has_ended=False, is_stopped=True)]
    world.watch(after(0.4))
    with pytest.raises(LookalikeError, match="Ray's GCS has stood still"):
        world.watch(after(3))


@pytest.mark.parametrize("trouble", ["gone", "silent", "not serving"])
def test_silence_with_serve_at_work_is_told_and_borne(
    world: World, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.work = ["shard-000 UNHEALTHY (1 STARTING)"]
    cause(world, trouble)
    with caplog.at_level("WARNING"):
        world.watch(after(1.2))
    told = [record.getMessage() for record in caplog.records if "not serving" in record.getMessage()]
    assert "shard-000 UNHEALTHY (1 STARTING)" in told[-1]


@pytest.mark.parametrize("trouble", ["gone", "silent", "not serving"])
def test_silence_of_serve_as_well_ends_it(world: World, trouble: str) -> None:
    world.hangs = True
    cause(world, trouble)
    with pytest.raises(LookalikeError, match="and Serve does not answer: the service cannot recover"):
        world.watch(after(3))


def test_silence_while_serve_says_that_all_is_well_ends_it_later(world: World) -> None:
    cause(world, "silent")
    with pytest.raises(LookalikeError, match=r"DEADLINE_EXCEEDED.*says that all is well"):
        world.watch(after(4))


def test_searches_that_hang_behind_sound_processes_do_not_end_it(world: World) -> None:
    cause(world, "not serving")
    world.watch(after(1.5))


def test_it_says_when_the_service_answers_again(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.work = ["ingress UPDATING (1 STARTING)"]
    cause(world, "not serving")

    def is_back() -> bool:
        messages = [record.getMessage() for record in caplog.records]
        if any("not serving" in message for message in messages):
            world.health.status = STATES.SERVING
        return any("serving again" in message for message in messages)

    with caplog.at_level("WARNING"):
        world.watch(is_back)


def cause(world: World, trouble: str) -> None:
    if trouble == "gone":
        world.end()
    world.health.silent = trouble == "silent"
    if trouble == "not serving":
        world.health.status = STATES.NOT_SERVING


def test_the_state_of_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert look_at("it", process) == Part("it", has_ended=False, is_stopped=False)
        process.send_signal(signal.SIGSTOP)
        while not look_at("it", process).is_stopped:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert look_at("it", process).has_ended


KILL = """
import signal, subprocess, sys, types
from lookalike import cluster

logs = sys.argv[1]
sleep = "import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", sleep])
frozen = subprocess.Popen([sys.executable, "-c", sleep])
frozen.send_signal(signal.SIGSTOP)
orphans = []
for files in (">worker.out 2>/dev/null", ">/dev/null 2>&1 7>agent.log", ">/dev/null 2>&1 <worker.out"):
    leave = ["sh", "-c", f"sleep 60 {files} & echo $!"]
    orphans.append(subprocess.run(leave, cwd=logs, stdout=subprocess.PIPE, text=True).stdout.strip())
cluster._own_node = lambda: types.SimpleNamespace(get_logs_dir_path=lambda: logs)
cluster.kill_ray()
print(child.wait(10), frozen.wait(10), *orphans)
"""


def test_nothing_is_left_of_a_lost_ray(tmp_path: Path) -> None:
    """Children, though they stand still, workers and agents that have lost their parent but not their logs.

    Who reads a log is left alone.
    """
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path)], capture_output=True, text=True, check=True)
    child, frozen, worker, agent, reader = done.stdout.split()
    try:
        assert (child, frozen) == ("-9", "-9")
        deadline = time.monotonic() + 5
        for orphan in (int(worker), int(agent)):
            while psutil.pid_exists(orphan) and psutil.Process(orphan).status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert psutil.Process(int(reader)).status() == psutil.STATUS_SLEEPING
    finally:
        psutil.Process(int(reader)).kill()
