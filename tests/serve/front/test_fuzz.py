"""Hostile requests over real gRPC: each gets its exact status and a short message, and the service goes on unharmed.
``tests/serve/test_local.py`` has the ordinary mistakes.

Bytes that are no message are INVALID_ARGUMENT: the guard of the listener parses them. Bytes that parse meet our own
checks.

With ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_ENABLE_HA_PROXY=1`` in the environment these tests run against the
mode of clusters.
"""

import io
import os
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import numpy as np
import psutil
import pytest
import yaml
from google.protobuf.message import DecodeError
from PIL import Image

from lookalike.serve.app import start, stop
from lookalike.serve.client import Client
from lookalike.serve.front.tenants import hash_token
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc
from lookalike.serve.settings.config import RequestLimits, ServeConfig, Writes
from lookalike.serve.wire.errors import RetrievalError

if TYPE_CHECKING:
    from tests.serve.conftest import World

pytestmark = pytest.mark.ray

TOKEN = "a-token-of-the-test"
METADATA = (("authorization", f"Bearer {TOKEN}"),)
LIMITS = RequestLimits(
    max_k=200,
    max_batch=16,
    max_image_bytes=200_000,
    max_request_bytes=20_000_000,
    max_shortlist_k=500,
    max_filter_values=1000,
)
ROUNDS, GROWTH_MB = 3, 40
"""Rounds of random bytes, and the memory that a replica may keep after them, in caches and the allocator."""
DIM = 64
GOOD = np.ones(DIM, "<f4")
Code = grpc.StatusCode


class Service(NamedTuple):
    """The service under test."""

    client: Client
    channel: grpc.Channel
    stub: Any
    admin: Any


@pytest.fixture(scope="module")
def service(ray_session: None, world: "World", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    path.write_text(yaml.safe_dump({"tenants": [{"name": "t", "role": "admin", "token_sha256": [hash_token(TOKEN)]}]}))
    writes = Writes(state=str(tmp_path_factory.mktemp("state")))
    open_to_all = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"  # behind it every caller looks local
    address = start(
        ServeConfig(
            index=world.index,
            plan=world.plan,
            placement="sharded",
            port=0,
            cpus_per_replica=0.1,
            limits=LIMITS,
            tenants=str(path),
            writes=writes,
            loopback_only=not open_to_all,
        )
    )
    with Client(address, token=TOKEN) as client, grpc.insecure_channel(address) as channel:
        client.wait_ready()
        stubs = pb_grpc.RetrievalServiceStub, pb_grpc.AdminServiceStub
        yield Service(client, channel, *(stub(channel) for stub in stubs))  # type: ignore[no-untyped-call]
    stop()


def check_alive(service: Service) -> None:
    """A search gets its answer."""
    assert service.client.search(image_id="img-007", k=1).ids == ["img-007"]


def refuse(service: Service, request: pb.SearchRequest, **call: Any) -> tuple[Code, str]:
    """Status and details of a search that must fail; the service must answer the next one."""
    with pytest.raises(grpc.RpcError) as caught:
        service.stub.Search(request, **{"timeout": 30, "metadata": METADATA, **call})
    check_alive(service)
    return caught.value.code(), caught.value.details()


def vector(values: Any) -> pb.Query:
    return pb.Query(vector=np.asarray(values, "<f4").tobytes())


def search(query: pb.Query | None = None, **options: Any) -> pb.SearchRequest:
    return pb.SearchRequest(query=vector(GOOD) if query is None else query, options=pb.SearchOptions(**options))


def changed(position: int, value: float) -> pb.Query:
    values = GOOD.copy()
    values[position] = value
    return vector(values)


def claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims ``width`` x ``height`` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()[:1500]


def plan(**changes: Any) -> pb.Plan:
    return pb.Plan(**{"shortlist_dim": 16, "shortlist_k": 12, "rerank_dim": 64, **changes})


BIG = (1 << 32) - 1
INVALID = {
    "no query": (pb.SearchRequest(), "query 0 is empty"),
    "empty vector": (search(pb.Query(vector=b"")), "the vector has 0 bytes"),
    "long vector": (search(vector(np.ones(4096))), "the vector has 16384 bytes"),
    "half a float": (search(pb.Query(vector=bytes(255))), "the vector has 255 bytes"),
    "k huge": (search(k=BIG), f"k={BIG} is not between 1 and 200"),
    "100 megapixels": (search(pb.Query(image=claiming(10_000, 10_000))), "10000 x 10000 pixels, the limit is 50000000"),
    "a decompression bomb": (
        search(pb.Query(image=claiming(60_000, 60_000))),
        "60000 x 60000 pixels, the limit is 50000000",
    ),
    "truncated JPEG": (search(pb.Query(image=truncated_jpeg())), "truncated"),
    "PNG without pixels": (search(pb.Query(image=claiming(100, 100))), "the image is"),
    "no id": (search(pb.Query(image_id="")), "has 0 bytes; ids have 1 to 512"),
    "long id": (search(pb.Query(image_id="x" * 513)), "has 513 bytes"),
    "long unicode id": (search(pb.Query(image_id="\u56fe" * 171)), "has 513 bytes"),
    "10 MB id": (search(pb.Query(image_id="\u56fe\x00\n" * 2_000_000)), "for Search; send less"),
    "1 MB id": (search(pb.Query(image_id="\u56fe\x00\n" * 200_000)), "has 1000000 bytes"),
    "huge request": (search(pb.Query(image_id="x" * 20_000_001)), "bytes, the limit is 1330112 for Search; send less"),
    "unnamed column": (search(filters=[pb.Filter(values=["red"])]), "filter on ''"),
    "1 MB column": (search(filters=[pb.Filter(column="\u56fe" * 350_000)]), "the index has the columns"),
    "column twice": (search(filters=[pb.Filter(column="view"), pb.Filter(column="view")]), "two filters on 'view'"),
    "recall NaN": (search(min_recall=np.nan), "min_recall=nan"),
    "empty plan": (search(plan=pb.Plan()), "plan"),
    "growing steps": (search(plan=plan(stages=[pb.PlanStep(dim=32, keep=BIG)])), "survivors"),
    "10,000 steps": (search(plan=plan(stages=[pb.PlanStep(dim=32, keep=1)] * 10_000)), "plan.stages has 10000"),
    "huge ef": (search(plan=plan(ef_search=BIG)), "1000000"),
    "no nprobe": (search(plan=plan(nprobe=0)), "greater than or equal to 1"),
    "margin NaN": (search(plan=plan(margins=[np.nan])), "finite"),
    "many margins": (search(plan=plan(margins=[0.1] * 100_000)), "plan.margins has 100000"),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_wrong_search_is_invalid_and_harms_nothing(service: Service, name: str) -> None:
    request, words = INVALID[name]
    code, details = refuse(service, request)
    assert (code, words in details) == (Code.INVALID_ARGUMENT, True), f"{code} {details[:500]}"
    assert len(details) <= 1000


def test_other_statuses_are_exact(service: Service) -> None:
    assert refuse(service, search(pb.Query(image_id="img-999")))[0] == Code.NOT_FOUND
    code, details = refuse(service, search(pb.Query(image_id="\u56fe\u7247\x00\n")))
    assert (code, "no image '\\u56fe\\u7247\\x00\\n'" in details) == (Code.NOT_FOUND, True), details
    code, details = refuse(service, search(model_fingerprint="\u56fe" * 300_000))
    assert (code, "the query is of model" in details, len(details) < 1000) == (Code.FAILED_PRECONDITION, True, True)
    assert refuse(service, search(timeout_ms=1), timeout=30)[0] in (Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)
    assert refuse(service, search(), timeout=1e-9)[0] == Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        METADATA * 2,
        (("authorization", "Bearer " + "x" * 4000),),
        (("authorization-bin", b"Bearer \xff"),),
    ],
)
def test_without_the_token_nothing_is_worked_on(service: Service, metadata: Any) -> None:
    for request in (search(), INVALID["100 megapixels"][0]):
        code, details = refuse(service, request, metadata=metadata)
        assert (code, "authorization: Bearer TOKEN" in details) == (Code.UNAUTHENTICATED, True), details
    with pytest.raises(grpc.RpcError) as caught:
        next(service.stub.SearchStream(iter([pb.SearchStreamRequest()]), timeout=30, metadata=metadata))
    assert caught.value.code() == Code.UNAUTHENTICATED


def test_more_hits_than_rows_are_all_rows(service: Service, world: "World") -> None:
    for request in (search(k=200), search(k=200, plan=plan(scan=True)), search(k=200, plan=plan(shortlist_k=1))):
        response = service.stub.Search(request, timeout=30, metadata=METADATA)
        assert sorted(hit.id for hit in response.hits) == sorted(world.images)
    none = search(k=200, filters=[pb.Filter(column="view", values=["nowhere"])])
    assert not service.stub.Search(none, timeout=30, metadata=METADATA).hits


def row(image_id: str = "new", **fields: Any) -> pb.Row:
    content = {} if "image" in fields or "vector" in fields else {"vector": GOOD.tobytes()}
    return pb.Row(id=image_id, **content, **fields)


WRONG_WRITES = {
    "no rows": ([], "0 rows in one request; send 1 to 16"),
    "17 rows": ([row(str(number)) for number in range(17)], "17 rows in one request"),
    "no id": ([row("")], "has 0 bytes; ids have 1 to 512"),
    "10 MB id": ([row("\u56fe" * 3_333_333)], "has 9999999 bytes"),
    "id twice": ([row("a"), row("b"), row("a")], "id 'a' occurs twice"),
    "no content": ([row("good"), pb.Row(id="\x00")], "row '\\x00' is empty"),
    "short vector": ([row(vector=bytes(4))], "the vector has 4 bytes"),
    "NaN": ([row("good"), row("b", vector=changed(1, np.nan).vector)], "nan at position 1"),
    "zero vector": ([row(vector=bytes(4 * DIM))], "no direction"),
    "100 megapixels": ([row("good"), row("b", image=claiming(10_000, 10_000))], "10000 x 10000 pixels"),
    "no image": ([row(image=b"x" * 99)], "99 bytes are no image"),
    "unknown column": ([row(metadata={"colour": "red"})], "has metadata 'colour'"),
    "empty column": ([row(metadata={"": "red"})], "has metadata ''"),
    "the id as a column": ([row(metadata={"image_id": "other"})], "has metadata 'image_id'"),
    "long metadata": ([row(metadata={"title": "\u56fe" * 6000})], "18005 bytes of metadata, the limit is 16384"),
}


@pytest.mark.parametrize("name", WRONG_WRITES)
def test_a_wrong_write_is_invalid_and_writes_nothing(service: Service, name: str) -> None:
    rows, words = WRONG_WRITES[name]
    with pytest.raises(grpc.RpcError) as caught:
        service.stub.Upsert(pb.UpsertRequest(rows=rows), timeout=30, metadata=METADATA)
    assert (caught.value.code(), words in caught.value.details()) == (Code.INVALID_ARGUMENT, True), caught.value
    assert len(caught.value.details()) <= 1000
    assert service.admin.Status(pb.StatusRequest(), timeout=30, metadata=METADATA).last_write == 0
    check_alive(service)


def test_wrong_deletes_and_switches_change_nothing(service: Service, world: "World") -> None:
    before = service.admin.Status(pb.StatusRequest(), timeout=30, metadata=METADATA)
    delete, switch = service.stub.Delete, service.admin.Switch
    wrong: list[tuple[Any, Any, Code]] = [
        (delete, pb.DeleteRequest(), Code.INVALID_ARGUMENT),
        (delete, pb.DeleteRequest(ids=["a"] * 2), Code.INVALID_ARGUMENT),
        (delete, pb.DeleteRequest(ids=["\u56fe" * 3_000_000]), Code.INVALID_ARGUMENT),
        (service.stub.Upsert, pb.UpsertRequest(rows=[row()], model_fingerprint="\u56fe"), Code.FAILED_PRECONDITION),
        (switch, pb.SwitchRequest(), Code.INVALID_ARGUMENT),
        (switch, pb.SwitchRequest(index="/etc/passwd"), Code.FAILED_PRECONDITION),
        (switch, pb.SwitchRequest(index="\u56fe\n" * 1_000_000), Code.INVALID_ARGUMENT),
        (switch, pb.SwitchRequest(index="strange://x"), Code.FAILED_PRECONDITION),
        (switch, pb.SwitchRequest(index="\x00"), Code.INVALID_ARGUMENT),
        (switch, pb.SwitchRequest(index="/\u56fe/" * 800), Code.FAILED_PRECONDITION),
        (switch, pb.SwitchRequest(index=world.index, plan=world.index), Code.FAILED_PRECONDITION),
        (service.admin.Rollback, pb.RollbackRequest(), Code.FAILED_PRECONDITION),
    ]
    for call, message, code in wrong:
        with pytest.raises(grpc.RpcError) as caught:
            call(message, timeout=60, metadata=METADATA)
        assert (caught.value.code(), len(caught.value.details()) <= 2000) == (code, True), caught.value
        check_alive(service)
    assert service.admin.Status(pb.StatusRequest(), timeout=30, metadata=METADATA) == before


def test_a_stream_says_what_is_wrong_in_its_place(service: Service) -> None:
    """Good and bad batches in turn: each bad one has its failure, each good one its answer."""
    good = pb.SearchBatchRequest(queries=[pb.Query(image_id="img-003")], options=pb.SearchOptions(k=1))
    bad = [
        pb.SearchBatchRequest(queries=[request.query], options=request.options)
        for request, _ in INVALID.values()
        if request.ByteSize() < 1_000_000
    ]
    messages = [
        pb.SearchStreamRequest(tag=str(number), batch=batch)
        for number, batch in enumerate(batch for wrong in bad for batch in (good, wrong))
    ]
    answers = list(service.stub.SearchStream(iter(messages), timeout=120, metadata=METADATA))
    assert [answer.tag for answer in answers] == [message.tag for message in messages]
    assert {answer.batch.results[0].hits[0].id for answer in answers[::2]} == {"img-003"}
    assert {answer.failure.code for answer in answers[1::2]} == {Code.INVALID_ARGUMENT.value[0]}
    check_alive(service)


def test_unknown_fields_are_no_mistake(service: Service) -> None:
    unknown = b"\xba\x3e\x04beef"  # field 999 of a future contract
    raw = service.channel.unary_unary("/lookalike.v1.RetrievalService/Search")
    sent = search(pb.Query(image_id="img-007"), k=1).SerializeToString() + unknown
    answer = pb.SearchResponse.FromString(raw(sent, timeout=30, metadata=METADATA))
    assert [hit.id for hit in answer.hits] == ["img-007"]


RPCS = [
    f"/{service.full_name}/{method.name}"
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
SANE = {Code.OK, Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.NOT_FOUND, Code.FAILED_PRECONDITION}
"""What bytes may lead to where they are a message, even another's: never INTERNAL, UNAVAILABLE or a call that hangs."""


def send(service: Service, rpc: str, content: bytes) -> Code:
    """The status of a call with raw bytes."""
    if rpc.endswith("Stream"):
        call = service.channel.stream_stream(rpc)(iter([content]), timeout=30, metadata=METADATA)
        with suppress(grpc.RpcError):
            list(call)
    else:
        call = service.channel.unary_unary(rpc).future(content, timeout=30, metadata=METADATA)
    code: Code = call.code()
    return code


@pytest.mark.parametrize("rpc", RPCS)
def test_bytes_that_are_no_message_are_an_error(service: Service, rpc: str) -> None:
    for content in (b"\xff" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a", b"\x00", b"\x0b" * 200, b"\x08" * 100_001):
        assert send(service, rpc, content) in {Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED}
    check_alive(service)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """``content`` with a few random changes: a byte, a cut, a piece twice, noise."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, until = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        change: Callable[[], object] = rng.choice(
            [
                lambda: data.insert(place, rng.randrange(256)),  # noqa: B023
                lambda: data.__setitem__(slice(place, place + 1), bytes([rng.randrange(256)])),  # noqa: B023
                lambda: data.__delitem__(slice(place, until)),  # noqa: B023
                lambda: data.extend(data[place : min(until, place + 1000)]),  # noqa: B023
                lambda: data.__setitem__(slice(place, place), rng.randbytes(8)),  # noqa: B023
            ]
        )
        change()
    return bytes(data)


def mutate_message(message: Any, rng: random.Random) -> bytes:
    """The bytes of ``message``, mutated so that they are a message, still: every other time, as chance allows."""
    for _ in range(rng.choice((1, 100))):
        content = mutate(message.SerializeToString(), rng)
        with suppress(DecodeError):
            type(message).FromString(content)
            break
    return content


def seeds(world: "World") -> dict[str, list[Any]]:
    """Messages that are right, by RPC; writes and switches are left out, as a mutation of one may be right, too."""
    image = world.images["img-001"]
    options = pb.SearchOptions(
        k=5,
        plan=plan(stages=[pb.PlanStep(dim=16, keep=6)]),
        timeout_ms=5000,
        session="s",
        filters=[pb.Filter(column="view", values=["side", "front"])],
    )
    queries = [vector(GOOD), pb.Query(image=image), pb.Query(image_id="img-001")]
    batch = pb.SearchBatchRequest(queries=queries, options=pb.SearchOptions(k=3, min_recall=0.9))
    return {
        "Search": [pb.SearchRequest(query=query, options=options) for query in queries],
        "SearchBatch": [batch],
        "SearchStream": [pb.SearchStreamRequest(tag="t", batch=batch)],
        "Embed": [pb.EmbedRequest(images=[image])],
        "Describe": [pb.DescribeRequest()],
    }


def replicas_mb() -> dict[int, float]:
    """Resident memory of this session's replicas by process, in MB."""
    sizes = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ServeReplica" in " ".join(process.cmdline()):
                sizes[process.pid] = process.memory_info().rss / 1e6
    return sizes


def test_random_bytes_leave_the_service_as_it_was(service: Service, world: "World") -> None:
    rng, content = random.Random(6), seeds(world)
    statuses: dict[Code, int] = {}

    def play() -> None:
        for _ in range(200):
            rpc = rng.choice(sorted(content))
            sent = mutate_message(rng.choice(content[rpc]), rng)
            code = send(service, f"/lookalike.v1.RetrievalService/{rpc}", sent)
            statuses[code] = statuses.get(code, 0) + 1
            assert code in SANE
        for name in ("10 MB id", "huge request", "100 megapixels", "many margins", "1 MB column"):
            refuse(service, INVALID[name][0])
        check_alive(service)

    play()  # the first round fills what is kept: threads, arenas, caches
    before = replicas_mb()
    assert before
    for _ in range(ROUNDS):
        play()
    after = replicas_mb()
    assert set(after) == set(before)  # no replica died
    grown = {pid: after[pid] - before[pid] for pid in before}
    assert max(grown.values()) < GROWTH_MB, grown
    assert statuses[Code.INVALID_ARGUMENT] > 0
    assert statuses[Code.OK] > 0


def test_the_deadline_of_a_stream_ends_it(service: Service) -> None:
    def slow() -> Iterator[pb.SearchStreamRequest]:
        yield pb.SearchStreamRequest(tag="1", batch=pb.SearchBatchRequest(queries=[vector(GOOD)]))
        time.sleep(2)

    with pytest.raises(grpc.RpcError) as caught:
        list(service.stub.SearchStream(slow(), timeout=1, metadata=METADATA))
    assert caught.value.code() == Code.DEADLINE_EXCEEDED
    check_alive(service)


def test_health_needs_no_token(service: Service) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    reply = health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        next(health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest(), timeout=30))
    assert caught.value.code() == Code.UNIMPLEMENTED
    with pytest.raises(RetrievalError, match=r"^UNAUTHENTICATED"), Client(service.client.address) as stranger:
        stranger.describe()
