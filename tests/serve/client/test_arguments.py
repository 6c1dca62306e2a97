"""Every client says what it takes: a call sends what its arguments mean, or it raises and sends nothing."""

import asyncio
import io
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lookalike.errors import LookalikeError, UsageError
from lookalike.serve.client import ArgumentError, AsyncClient, Client, ClientTls, RetrievalError, SearchPlan, StoredRow
from lookalike.serve.local import LocalClient
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.proto import retrieval_pb2_grpc as pb_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
VECTOR = np.array([1.0, 2.0], np.float32)
VECTOR_BYTES = VECTOR.tobytes()
Ask = Callable[..., Any]


class Recorder(pb_grpc.RetrievalServiceServicer):
    """Keeps the requests that it gets."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def answer(self, method: str, request: Any) -> Any:
        self.seen.append(request)
        if method in ("SearchBatch", "SearchStream"):
            batch = request.batch if method == "SearchStream" else request
            answer = pb.SearchBatchResponse(results=[pb.HitList() for _ in batch.queries])
            return pb.SearchStreamResponse(batch=answer) if method == "SearchStream" else answer
        return getattr(pb, f"{method}Response")()

    def SearchStream(self, requests: Iterator[Any], context: Any) -> Any:
        for request in requests:
            yield self.answer("SearchStream", request)

    def Describe(self, request: Any, context: Any) -> pb.DescribeResponse:
        limits = {"max_request_bytes": 1 << 20, "max_image_bytes": 64 << 10, "max_filter_values": 4}
        return pb.DescribeResponse(limits=pb.Limits(**limits, max_filter_bytes=1024))


for _name in ("Search", "SearchBatch", "Embed", "Feedback", "Upsert", "Delete"):
    setattr(Recorder, _name, lambda self, request, context, name=_name: self.answer(name, request))


class Loose(LocalClient):
    """A ``LocalClient`` whose service is the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def _call(self, method: str, request: Any) -> Any:
        return self.recorder.answer(method, type(request).FromString(request.SerializeToString()))


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module", params=["blocking", "asyncio", "local"])
def ask(recorder: Recorder, request: pytest.FixtureRequest) -> Iterator[Ask]:
    """``ask(method, *args, **kwargs)``: what the client of this kind does."""
    if request.param == "local":
        local = Loose(recorder)
        yield lambda method, *args, **named: consume(getattr(local, method)(*args, **named))
        return
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_RetrievalServiceServicer_to_server(recorder, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    if request.param == "blocking":
        with Client(address, timeout_s=20) as client:
            yield lambda method, *args, **named: consume(getattr(client, method)(*args, **named))
    else:
        with asyncio.Runner() as runner:
            asking = runner.run(opened(address))
            yield lambda method, *args, **named: runner.run(awaited(asking, method, args, named))
            runner.run(asking.close())
    server.stop(None)


def consume(answer: Any) -> Any:
    return list(answer) if hasattr(answer, "__next__") else answer


async def opened(address: str) -> AsyncClient:
    return AsyncClient(address, timeout_s=20)


async def awaited(client: AsyncClient, method: str, args: Any, named: Any) -> Any:
    answer = getattr(client, method)(*args, **named)
    return [one async for one in answer] if hasattr(answer, "__anext__") else await answer


def query(**content: Any) -> pb.SearchRequest:
    return pb.SearchRequest(query=pb.Query(**content), options=pb.SearchOptions(k=10))


def options(**settings: Any) -> pb.SearchRequest:
    return pb.SearchRequest(query=pb.Query(image_id="a"), options=pb.SearchOptions(**{"k": 10, **settings}))


def batch(*queries: dict[str, Any]) -> pb.SearchBatchRequest:
    return pb.SearchBatchRequest(queries=[pb.Query(**one) for one in queries], options=pb.SearchOptions(k=10))


ID = {"image_id": "a"}
ICON = [pb.Filter(column="view", values=["icon"])]
MEANT: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = [
    ("delete", ("12",), {}, pb.DeleteRequest(ids=["12"])),
    ("delete", (["1", "2"],), {}, pb.DeleteRequest(ids=["1", "2"])),
    ("delete", ({"x": 1}.keys(),), {}, pb.DeleteRequest(ids=["x"])),
    ("delete", (np.array(["x", "yz"]),), {}, pb.DeleteRequest(ids=["x", "yz"])),
    ("delete", ({"only"},), {}, pb.DeleteRequest(ids=["only"])),
    ("delete", ([],), {}, pb.DeleteRequest()),
    ("search", (), {**ID, "where": {"view": "icon"}}, options(filters=ICON)),
    ("search", (), {**ID, "where": {"view": ["icon"]}}, options(filters=ICON)),
    ("search", (), {**ID, "where": {}}, options()),
    ("search", (), {**ID, "k": np.int64(3)}, options(k=3)),
    ("search", (), {**ID, "k": 2**32 - 1}, options(k=2**32 - 1)),
    ("search", (), {**ID, "k": None, "plan": None, "session": None, "allow_partial": None}, options()),
    ("search", (), {**ID, "allow_partial": np.True_}, options(allow_partial=True)),
    ("search", (), {**ID, "min_recall": np.float32(0.5)}, options(min_recall=0.5)),
    (
        "search",
        (),
        {**ID, "plan": SearchPlan(8, 9, 16)},
        options(plan=pb.Plan(shortlist_dim=8, shortlist_k=9, rerank_dim=16)),
    ),
    ("search", (), {"image": bytearray(b"jpg")}, query(image=b"jpg")),
    ("search", (), {"image": memoryview(b"jpg")}, query(image=b"jpg")),
    ("search", (), {"vector": [1, 2]}, query(vector=VECTOR_BYTES)),
    ("search", (), {"vector": VECTOR.astype(">f8")}, query(vector=VECTOR_BYTES)),
    ("search", (), {"vector": np.repeat(VECTOR, 2)[::2]}, query(vector=VECTOR_BYTES)),
    ("search", (), {"vector": np.array([1, 2], np.uint8)}, query(vector=VECTOR_BYTES)),
    ("search_batch", ("712",), {}, batch({"image_id": "712"})),
    ("search_batch", (b"jpg",), {}, batch({"image": b"jpg"})),
    ("search_batch", (VECTOR,), {}, batch({"vector": VECTOR_BYTES})),
    ("search_batch", (np.stack([VECTOR] * 2),), {}, batch(*[{"vector": VECTOR_BYTES}] * 2)),
    ("search_batch", (["a", b"jpg", [1, 2]],), {}, batch(ID, {"image": b"jpg"}, {"vector": VECTOR_BYTES})),
    ("search_batch", ([],), {}, batch()),
    ("search_stream", ([["a"]],), {}, pb.SearchStreamRequest(batch=batch(ID))),
    ("search_stream", (["ab"],), {}, pb.SearchStreamRequest(batch=batch({"image_id": "ab"}))),
    ("embed", (b"jpg",), {}, pb.EmbedRequest(images=[b"jpg"])),
    ("embed", ([b"jpg", bytearray(b"png")],), {}, pb.EmbedRequest(images=[b"jpg", b"png"])),
    ("upsert", (StoredRow("a=b", b"jpg"),), {}, pb.UpsertRequest(rows=[pb.Row(id="a=b", image=b"jpg")])),
    (
        "upsert",
        ([StoredRow("a", [1, 2], {"view": "icon"})],),
        {},
        pb.UpsertRequest(rows=[pb.Row(id="a", vector=VECTOR_BYTES, metadata={"view": "icon"})]),
    ),
    ("feedback", ("r", "click"), {}, pb.FeedbackRequest(request_id="r", kind="click")),
]


@pytest.mark.parametrize("case", MEANT, ids=[f"{case[0]}-{number}" for number, case in enumerate(MEANT)])
def test_what_is_plainly_meant_is_sent(ask: Ask, recorder: Recorder, case: Any) -> None:
    method, args, named, wanted = case
    recorder.seen.clear()
    ask(method, *args, **named)
    assert recorder.seen == [wanted]


def test_generators_are_read_once(ask: Ask, recorder: Recorder) -> None:
    recorder.seen.clear()
    ask("delete", (name for name in "ab"))
    ask("search", image_id="a", where={"view": (one for one in ["icon"])})
    ask("search_batch", iter(["a"]))
    assert recorder.seen == [pb.DeleteRequest(ids=["a", "b"]), options(filters=ICON), batch(ID)]


PICTURE = Image.new("RGB", (2, 2))
WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("delete", (b"12",), {}, "ids is 2 bytes; give an id as str"),
    ("delete", ([1, 2],), {}, r"ids\[0\] is 1, which is no text"),
    ("delete", ({"a": 1},), {}, "ids is a dict"),
    ("delete", (7,), {}, "ids is 7, which cannot be iterated"),
    ("delete", (["\ud800"],), {}, "half of a surrogate pair"),
    ("delete", (), {"id": "a"}, "no argument 'id' .did you mean 'ids'"),
    ("search", (), {**ID, "filters": {"view": ["icon"]}}, "'filters' .did you mean 'where'"),
    ("search", (), {**ID, "top_k": 64}, "'top_k' .did you mean 'k'"),
    ("search", (), {**ID, "min_recal": 0.9}, "did you mean 'min_recall'"),
    ("search", (), {**ID, "where": "view=icon"}, "where is 'view=icon'; give"),
    ("search", (), {**ID, "where": [("view", "icon")]}, "where is a list"),
    ("search", (), {**ID, "where": {"view": [3]}}, r"where\['view'\]\[0\] is 3"),
    ("search", (), {**ID, "where": {"view": b"icon"}}, "4 bytes"),
    ("search", (), {**ID, "where": {3: "icon"}}, "a column in where is 3"),
    *[("search", (), {**ID, "k": k}, "is no whole number") for k in (True, 5.0, "5", math.nan, np.float32(5), [5])],
    ("search", (), {**ID, "k": 0}, "k=0 is less than 1"),
    ("search", (), {**ID, "k": -(10**5000)}, "k=a number of"),
    ("search", (), {**ID, "k": 2**32}, "k=4294967296 is more than 4294967295"),
    ("search", (), {**ID, "timeout_ms": 2**32}, "timeout_ms=4294967296"),
    ("search", (), {**ID, "timeout_ms": 0.5}, "timeout_ms=0.5 is no whole number"),
    ("search", (), {**ID, "timeout_ms": -1}, "timeout_ms=-1 is negative"),
    ("search", (), {**ID, "min_recall": "0.9"}, "min_recall='0.9' is no number"),
    ("search", (), {**ID, "min_recall": True}, "min_recall=True is no number"),
    ("search", (), {**ID, "allow_partial": "no"}, "neither True nor False"),
    ("search", (), {**ID, "session": 3}, "session is 3"),
    ("search", (), {**ID, "session": "\udcff"}, "half of a surrogate pair"),
    ("search", (), {**ID, "plan": {"shortlist_dim": 8}}, "plan is a dict"),
    ("search", (), {**ID, "plan": SearchPlan("8", 9, 16)}, "plan is a SearchPlan"),  # type: ignore[arg-type]
    ("search", (), {**ID, "plan": SearchPlan(8, 9, 16, stages=3)}, "plan is a SearchPlan"),  # type: ignore[arg-type]
    ("search", (), {}, "0 queries given"),
    ("search", (), {**ID, "vector": VECTOR}, "2 queries given"),
    ("search", (), {"image": "chair.jpg"}, r"image is 'chair.jpg', not bytes; give the content of the file"),
    ("search", (), {"image": Path("chair.jpg")}, "give the content of the file"),
    ("search", (), {"image": io.BytesIO(b"jpg")}, r"\.read\(\)"),
    ("search", (), {"image": PICTURE}, "save it into"),
    ("search", (), {"image": np.asarray(PICTURE)}, "of uint8 with shape"),
    ("search", (), {"image_id": b"a"}, "image_id is 1 bytes, which is no text"),
    ("search", (), {"image_id": 7}, "image_id is 7"),
    ("search", (), {"image_id": "a\ud800"}, "character 1 is half"),
    ("search", (), {"vector": [[1, 2]]}, r"one dimension, vector has shape \(1, 2\)"),
    ("search", (), {"vector": 3.5}, r"has shape \(\)"),
    ("search", (), {"vector": ["1", "2"]}, "give numbers"),
    ("search", (), {"vector": [None, 1]}, "of object"),
    ("search", (), {"vector": [1, [2]]}, "no array of numbers"),
    ("search", (), {"vector": [True, False]}, "of bool"),
    ("search", (), {"vector": np.array([1j])}, "complex"),
    ("search", (), {"vector": VECTOR_BYTES}, "8 bytes"),
    ("search", (), {"vector": np.array([object()])}, "object"),
    ("search", (), {"vector": [1.0, 1e300]}, r"vector\[1\] is 1e\+300, beyond float32"),
    ("search", (), {"vector": np.ma.masked_array([1.0, 2.0], [False, True])}, "masked"),
    ("search", (), {"vector": np.array(["2026-01-01"], "M8[D]")}, "datetime64"),
    ("search_batch", ({"a"},), {}, "queries is a set"),
    ("search_batch", ({"a": 1},), {}, "queries is a dict"),
    ("search_batch", ([None],), {}, r"queries\[0\] is None"),
    ("search_batch", ([Path("a.jpg")],), {}, r"queries\[0\] is a PosixPath"),
    ("search_batch", ([PICTURE],), {}, "save it into"),
    ("search_batch", ([0.5, 0.5],), {}, r"queries\[0\] has shape \(\)"),
    ("search_batch", (np.zeros((2, 2, 2)),), {}, r"queries\[0\] has shape \(2, 2\)"),
    ("search_batch", (None,), {}, "queries is None"),
    ("search_stream", ("abc",), {}, "batches is 'abc'"),
    ("search_stream", (3,), {}, "batches is 3"),
    ("search_stream", ([["a"]],), {"kk": 3}, "did you mean 'k'"),
    ("search_stream", ([["a"]],), {"k": 0}, "k=0"),
    ("embed", ("chair.jpg",), {}, "images is 'chair.jpg'"),
    ("embed", (["chair.jpg"],), {}, r"images\[0\] is 'chair.jpg', not bytes"),
    ("embed", ({b"jpg"},), {}, "images is a set"),
    ("embed", (PICTURE,), {}, "images is an Image"),
    ("upsert", ({"id": "a"},), {}, "rows is a dict"),
    ("upsert", ([{"id": "a"}],), {}, r"rows\[0\] is a dict; give a StoredRow"),
    ("upsert", ([StoredRow("a", b"", {"n": 3})],), {}, r"rows\[0\].metadata\['n'\] is 3"),  # type: ignore[dict-item]
    ("upsert", ([StoredRow("a", b"", {"n": None})],), {}, "is None, which is no text"),  # type: ignore[dict-item]
    ("upsert", ([StoredRow("a", b"", ["n"])],), {}, "metadata is a list"),  # type: ignore[arg-type]
    ("upsert", ([StoredRow(3, b"")],), {}, r"rows\[0\].id is 3"),  # type: ignore[arg-type]
    ("upsert", ([StoredRow("a", "a.jpg")],), {}, "not bytes"),  # type: ignore[arg-type]
    ("upsert", ([StoredRow("a", None)],), {}, "content is None"),  # type: ignore[arg-type]
    ("upsert", (StoredRow("a", VECTOR),), {"model_fingerprint": b"f"}, "model_fingerprint is 1 bytes"),
    ("feedback", (b"r", "click"), {}, "request_id is 1 bytes"),
    ("feedback", ("r", None), {}, "kind is None"),
    ("feedback", ("r", "click"), {"hit": "x"}, "no argument 'hit'"),
]


@pytest.mark.parametrize("case", WRONG, ids=[f"{case[0]}-{number}" for number, case in enumerate(WRONG)])
def test_what_is_not_is_refused_and_nothing_is_sent(ask: Ask, recorder: Recorder, case: Any) -> None:
    method, args, named, words = case
    recorder.seen.clear()
    with pytest.raises((ArgumentError, RetrievalError), match=words) as caught:
        ask(method, *args, **named)
    assert not recorder.seen
    if isinstance(caught.value, RetrievalError):
        assert caught.value.code == INVALID
    else:
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, ValueError)


def test_a_wrong_batch_has_its_error_in_its_place(ask: Ask, recorder: Recorder) -> None:
    recorder.seen.clear()
    one, wrong, picture, last = ask("search_stream", [["a", "b"], [3], [Path("x")], "c"])
    assert (len(one), len(last)) == (2, 1)
    assert wrong.code == picture.code == INVALID
    assert "queries[0] has shape ()" in str(wrong)
    assert "queries[0] is a PosixPath" in str(picture)
    assert [len(request.batch.queries) for request in recorder.seen] == [2, 0, 0, 1]


def test_a_batch_above_the_bound_of_the_service_has_its_error_in_its_place(recorder: Recorder) -> None:
    def in_bytes(size: int) -> list[bytes]:
        return [bytes(1000)] * (size // 1003)

    sizes = [1 << 16, (1 << 18) - 4096, (1 << 18) + 4096, 1 << 21, 1 << 10]
    for kind in ("blocking", "asyncio"):
        for answers in asked_by(kind, recorder, map(in_bytes, sizes)):
            *small, refused, large, last = answers
            assert [len(batch) for batch in (*small, last)] == [len(in_bytes(sizes[n])) for n in (0, 1, 4)]
            assert refused.code == large.code == INVALID
            assert "the limit of the service is 262144 for a batch of a stream; send fewer queries" in str(refused)


def asked_by(kind: str, recorder: Recorder, batches: Iterator[list[bytes]]) -> Iterator[list[Any]]:
    """The answers to a stream of the client of this kind."""
    server = grpc.server(ThreadPoolExecutor(3))
    pb_grpc.add_RetrievalServiceServicer_to_server(recorder, server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()

    async def asynchronously() -> list[Any]:
        async with AsyncClient(address, timeout_s=20) as client:
            return [answer async for answer in client.search_stream(batches)]

    if kind == "asyncio":
        yield asyncio.run(asynchronously())
    else:
        with Client(address, timeout_s=20) as client:
            yield list(client.search_stream(batches))
    server.stop(None)


def test_what_the_callers_iterator_raises_is_raised_after_the_answers(ask: Ask) -> None:
    def batches() -> Iterator[list[str]]:
        yield ["a"]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ask("search_stream", batches())
    with Client("127.0.0.1:1") as client, pytest.raises(ArgumentError, match="batches"):
        client.search_stream(3)  # type: ignore[arg-type]  # at once, not when it is read


CONNECTIONS: list[tuple[dict[str, Any], str]] = [
    *[({"timeout_s": wrong}, "timeout_s=") for wrong in (None, math.inf, math.nan, 1e10, 0, -1.0, "3", True)],
    ({"application": "caf\u00e9"}, "printable ASCII"),
    ({"application": "a\nb"}, "printable ASCII"),
    ({"application": b"a"}, "application is 1 bytes"),
    ({"token": "\u00e9"}, "visible ASCII"),
    ({"token": "\ud800secret"}, "visible ASCII"),
    ({"token": b"secret"}, "the token is 6 bytes"),
    ({"tls": True}, "tls is True; give a ClientTls"),
    ({"tls": ClientTls(ca=3)}, "3 cannot be read"),  # type: ignore[arg-type]
    ({"tls": ClientTls(ca="-----BEGIN CERTIFICATE-----")}, "give its path"),
    ({"tls": ClientTls(ca="a\0b")}, "cannot be read"),
    ({"adress": "x"}, "did you mean 'address'"),
    ({"address": 9000}, "address is 9000"),
    ({"address": "\udcff:1"}, "half of a surrogate pair"),
]


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("named", "words"), CONNECTIONS, ids=[f"{next(iter(c[0]))}-{n}" for n, c in enumerate(CONNECTIONS)]
)
def test_a_connection_is_checked_at_once(client: Any, named: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        client(**{"address": "127.0.0.1:1", **named})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("method", ["switch", "rollback", "compact", "backup", "wait_ready"])
@pytest.mark.parametrize("timeout_s", [None, math.inf, math.nan, 1e10, 0, "3"])
def test_times_to_wait_are_checked(method: str, timeout_s: Any) -> None:
    args = {"switch": ["index"], "backup": ["/file"]}.get(method, [])
    with Client("127.0.0.1:1") as client, pytest.raises(ArgumentError, match="timeout_s="):
        getattr(client, method)(*args, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("method", "args", "named", "words"),
    [
        ("switch", (Path("/index"),), {}, "index is a PosixPath"),
        ("switch", ("i",), {"plan": None}, "plan is None"),
        ("switch", ("i",), {"includes_writes": -1}, "includes_writes=-1"),
        ("switch", ("i",), {"includes_writes": 2**64}, "includes_writes"),
        ("switch", ("i",), {"includes_writes": 1.5}, "no whole number"),
        ("backup", (b"/file",), {}, "path is 5 bytes"),
        ("backup", ("/f\ud800",), {}, "surrogate"),
        ("rollback", (), {"timeout": 3}, "did you mean 'timeout_s'"),
    ],
)
def test_administration_is_checked(method: str, args: Any, named: Any, words: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(LookalikeError, match=words) as caught:
        getattr(client, method)(*args, **named)
    assert not isinstance(caught.value, RetrievalError) or caught.value.code == INVALID


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(), max_size=4),
    st.binary(max_size=4),
    st.binary(max_size=4).map(bytearray),
    st.binary(max_size=4).map(memoryview),
    st.sampled_from([Path("a"), object(), PICTURE, Ellipsis, int, 1j, np.float32(3), np.int8(3), np.str_("ab")]),
    st.sampled_from(["f2", "f4", "f8", "i8", "u8", "?", "O", "U2", "c8"]).map(lambda kind: np.ones(2, kind)),
    st.sampled_from([(), (0,), (2, 0), (1, 2), (1, 2, 2)]).map(np.ones),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda items: (item for item in items)),
        st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=2),
        st.builds(StoredRow, inner, inner, inner),
    ),
    max_leaves=5,
)
SLOTS: list[tuple[str, str]] = [
    *[("search", name) for name in ("image", "vector", "image_id", "k", "plan", "min_recall", "where", "timeout_ms")],
    *[("search", name) for name in ("model_fingerprint", "allow_partial", "session", "other")],
    ("search_batch", "queries"),
    ("search_stream", "batches"),
    ("embed", "images"),
    ("upsert", "rows"),
    ("upsert", "model_fingerprint"),
    ("delete", "ids"),
]
REQUIRED = {"search_batch": {"queries": "a"}, "search_stream": {"batches": ["a"]}, "upsert": {"rows": []}}
SEVERAL = ("queries", "images", "rows", "ids")


@settings(max_examples=300, deadline=None)
@given(slot=st.sampled_from(SLOTS), value=anything)
def test_anything_is_sent_as_meant_or_refused(slot: tuple[str, str], value: Any) -> None:
    method, name = slot
    client = Loose(Recorder())
    named: dict[str, Any] = {**REQUIRED.get(method, {}), name: value}
    if method == "search" and name not in ("image", "vector", "image_id"):
        named["image_id"] = "a"
    failure: Exception | None = None
    try:
        consume(getattr(client, method)(**named))
    except (RetrievalError, ArgumentError) as error:
        failure = error
    if failure is not None:
        assert str(failure).isascii()
        assert not isinstance(failure, RetrievalError) or failure.code == INVALID
        assert not client.recorder.seen
        return
    if name in SEVERAL and isinstance(value, (str, bytes, bytearray, memoryview, StoredRow)):
        assert len(getattr(client.recorder.seen[0], name)) == 1
    assert name != "other"
