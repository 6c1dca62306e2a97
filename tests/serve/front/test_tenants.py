"""Tokens, roles and quotas, without a cluster: the gate in front of the service."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lookalike.cli import main
from lookalike.errors import UsageError
from lookalike.serve.front import gate as gates
from lookalike.serve.front import tenants
from lookalike.serve.front.gate import Gate
from lookalike.serve.front.quota import Bucket, Meter
from lookalike.serve.front.tenants import Tenants, hash_token, read_bearer, read_tenants, role_for
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import RequestLimits, ServeConfig
from lookalike.serve.settings.security import Quota
from lookalike.serve.wire.errors import RetrievalError
from lookalike.vision.encoder import to_bytes

READER, WRITER, ADMIN = "reader-token", "writer-token", "admin-token"


def entry(name: str, token: str, role: str = "read", **quota: Any) -> dict[str, Any]:
    return {"name": name, "token_sha256": [hash_token(token)], "role": role, "quota": quota}


def write(path: Path, *entries: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump({"tenants": list(entries)}))
    return str(path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of quotas that stands still: its one item is the time."""
    time = [100.0]
    monkeypatch.setattr(gates, "now", lambda: time[0])
    return time


def make_gate(path: Path, *entries: dict[str, Any], **limits: int) -> Gate:
    return Gate(ServeConfig(index="x", tenants=write(path / "tenants.yaml", *entries), limits=RequestLimits(**limits)))


def bearer(token: str) -> list[tuple[str, str]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def refused(code: grpc.StatusCode, words: str) -> Any:
    return pytest.raises(RetrievalError, match=f"^{code.name}: .*{words}")


def batch(num: int, **options: Any) -> pb.SearchBatchRequest:
    return pb.SearchBatchRequest(queries=[pb.Query(image_id="x")] * num, options=pb.SearchOptions(**options))


def test_every_rpc_needs_a_role_and_every_role_a_token(tmp_path: Path) -> None:
    gate = make_gate(tmp_path, entry("r", READER), entry("w", WRITER, "write"), entry("a", ADMIN, "admin"))
    may = {READER: {"read"}, WRITER: {"read", "write"}, ADMIN: {"read", "write", "admin"}}
    rpcs = [rpc for service in pb.DESCRIPTOR.services_by_name.values() for rpc in service.methods_by_name]
    assert {rpc: role_for(rpc) for rpc in rpcs} == {
        **dict.fromkeys(("Search", "SearchBatch", "SearchStream", "Embed", "Describe", "Feedback"), "read"),
        **dict.fromkeys(("Upsert", "Delete"), "write"),
        **dict.fromkeys(("Switch", "Rollback", "Compact", "Status", "Backup"), "admin"),
    }
    for token, roles in may.items():
        for rpc in rpcs:
            if role_for(rpc) in roles:
                assert gate.identify(rpc, bearer(token)).name == {READER: "r", WRITER: "w", ADMIN: "a"}[token]
            else:
                with refused(grpc.StatusCode.PERMISSION_DENIED, f"{rpc} needs the role '{role_for(rpc)}'"):
                    gate.identify(rpc, bearer(token))


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", READER)],
        [("authorization", f"Basic {READER}")],
        [("authorization", "Bearer ")],
        bearer(READER) + bearer(READER),
        bearer("reader-toke"),
        bearer(hash_token(READER)),
        bearer("ключ" * 1000),
    ],
)
def test_without_a_valid_token_nobody_is_admitted(tmp_path: Path, metadata: list[tuple[str, str]]) -> None:
    with refused(grpc.StatusCode.UNAUTHENTICATED, "authorization: Bearer TOKEN") as caught:
        make_gate(tmp_path, entry("r", READER)).identify("Search", metadata)
    assert READER not in str(caught.value)


def test_scheme_and_key_are_found_in_any_case() -> None:
    assert read_bearer([("Authorization", "bearer  abc ")]) == "abc"


def test_without_tenants_nobody_is_asked() -> None:
    caller = Gate(ServeConfig(index="x")).identify("Switch", [])
    with caller.request("Switch", pb.SwitchRequest()):
        assert caller.name == ""


def test_a_rate_has_a_burst_and_comes_back(tmp_path: Path, clock: list[float]) -> None:
    caller = make_gate(tmp_path, entry("r", READER, requests_per_s=2, burst=3)).identify("Search", bearer(READER))
    for _ in range(3):
        caller.check("Describe", pb.DescribeRequest())
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, r"2 requests a second \(burst 3\); retry after 500 ms"):
        caller.check("Describe", pb.DescribeRequest())
    clock[0] += 0.5
    caller.check("Describe", pb.DescribeRequest())
    clock[0] += 1000
    for _ in range(3):
        caller.check("Describe", pb.DescribeRequest())
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "retry after 500 ms"):
        caller.check("Describe", pb.DescribeRequest())


def test_a_batch_counts_its_queries_and_what_is_refused_counts_nothing(tmp_path: Path, clock: list[float]) -> None:
    caller = make_gate(tmp_path, entry("r", READER, queries_per_s=100)).identify("Search", bearer(READER))
    caller.check("SearchBatch", batch(60))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "100 queries a second; retry after 200 ms"):
        caller.check("SearchStream", pb.SearchStreamRequest(batch=batch(60)))
    caller.check("Embed", pb.EmbedRequest(images=[b"x"] * 40))
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "retry after 10 ms"):
        caller.check("Search", pb.SearchRequest())
    caller.check("Describe", pb.DescribeRequest())
    clock[0] += 1
    caller.check("SearchBatch", batch(250))  # more than a second's worth passes alone, and is waited for
    clock[0] += 1.5
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "retry after 10 ms"):
        caller.check("Search", pb.SearchRequest())


def test_images_are_charged_by_the_pixels_of_their_headers(tmp_path: Path, clock: list[float]) -> None:
    caller = make_gate(tmp_path, entry("r", READER, pixels_per_s=1000)).identify("Search", bearer(READER))
    large = to_bytes(Image.new("RGB", (40, 20)))  # 800 pixels
    caller.check("Embed", pb.EmbedRequest(images=[large]))
    for request in (
        pb.SearchRequest(query=pb.Query(image=large)),
        pb.SearchBatchRequest(queries=[pb.Query(vector=b"x"), pb.Query(image=large)]),
        pb.UpsertRequest(rows=[pb.Row(id="a", image=large)]),
        pb.SearchStreamRequest(batch=pb.SearchBatchRequest(queries=[pb.Query(image=large)])),
    ):
        rpc = type(request).__name__.removesuffix("Request")
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "1000 pixels of images a second; retry after 600 ms"):
            caller.check(rpc, request)
    caller.check("Search", pb.SearchRequest(query=pb.Query(image_id="x")))  # without an image nothing is charged
    caller.check("Embed", pb.EmbedRequest(images=[b"no image", large[:20]]))
    clock[0] += 0.61
    caller.check("Embed", pb.EmbedRequest(images=[large]))


def test_requests_under_way_are_counted_however_they_end(tmp_path: Path) -> None:
    gate = make_gate(tmp_path, entry("r", READER, concurrent=2, requests_per_s=1, burst=2))
    caller = gate.identify("Search", bearer(READER))
    with caller.under_way():
        with pytest.raises(ZeroDivisionError), caller.request("Search", pb.SearchRequest()):
            raise ZeroDivisionError
        with caller.request("Search", pb.SearchRequest()):
            same = gate.identify("Search", bearer(READER))
            third = same.request("Search", pb.SearchRequest())
            with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "2 requests under way; retry after 100 ms"), third:
                pytest.fail("admitted")
    with caller.under_way(), caller.under_way():
        pass


def test_sizes_are_checked_before_quotas(tmp_path: Path) -> None:
    quota = {"max_k": 20, "max_batch": 2, "requests_per_s": 1, "burst": 1}
    gate = make_gate(tmp_path, entry("r", READER, **quota), max_request_bytes=2000)
    caller = gate.identify("SearchBatch", bearer(READER))
    large = batch(1)
    large.queries[0].image = bytes(3000)
    for rpc, message, words in [
        ("SearchBatch", large, "bytes, the limit is 2000; send less"),
        ("SearchStream", pb.SearchStreamRequest(tag="t" * 3000), "limits.max_request_bytes"),
        ("SearchBatch", batch(3), "3 queries in one request, tenant 'r' may send 2"),
        ("SearchStream", pb.SearchStreamRequest(batch=batch(3)), "3 queries"),
        ("Embed", pb.EmbedRequest(images=[b""] * 3), "3 images"),
        ("Delete", pb.DeleteRequest(ids=["a"] * 3), "3 ids"),
        ("Search", pb.SearchRequest(options=pb.SearchOptions(k=21)), "k=21 exceeds the 20 of tenant 'r'"),
        ("SearchBatch", batch(1, k=21), "k=21 exceeds"),
    ]:
        with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
            caller.check(rpc, message)
    caller.check("SearchBatch", batch(2, k=20))  # none of these was counted
    anyone = Gate(ServeConfig(index="x", limits=RequestLimits(max_request_bytes=2000))).identify("SearchBatch", [])
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "the limit is 2000"):
        anyone.check("SearchBatch", large)


def test_tokens_rotate_and_a_broken_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "CHECK_S", 3600.0)
    path = tmp_path / "tenants.yaml"
    both = {"name": "r", "token_sha256": [hash_token(READER), hash_token("next")]}
    registry = Tenants(write(path, both))
    first = registry.find(READER)
    assert first is not None
    other = registry.find("next")
    assert other is not None
    assert other[:2] == first[:2]
    for broken in ("tenants: [", "tenants: []", json.dumps({"tenants": [{"name": "r", "token": READER}]}), "- 1"):
        path.write_text(broken)
        registry.refresh()
        assert registry.find(READER) == first
        assert "tenants kept as they were" in caplog.text
        assert READER not in caplog.text
        caplog.clear()
    path.unlink()
    registry.refresh()
    assert "cannot be read" in caplog.text
    write(path, entry("r", "next"), entry("s", WRITER))
    registry.refresh()
    assert registry.find(READER) is None
    second = registry.find("next")
    assert second is not None
    assert second.meter is first.meter  # what was used stays used
    registry.close()


def test_the_file_is_read_again_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(tenants, "CHECK_S", 0.01)
    registry = Tenants(write(tmp_path / "t.yaml", entry("r", READER)))
    write(tmp_path / "t.yaml", entry("r", WRITER))
    pause = threading.Event()
    for _ in range(1000):
        if registry.find(WRITER) is not None:
            break
        pause.wait(0.01)
    assert registry.find(WRITER) is not None
    assert registry.find(READER) is None
    registry.close()


HASH, ZEROS = hash_token("x"), "0" * 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tenants:\n- {name: a", "is not valid YAML"),
        ("[]", "holds a list"),
        ("tenants: []", "at least 1 item"),
        (f"tenants: [{{name: a, token_sha256: ['{HASH}']}}, {{name: a, token_sha256: ['{ZEROS}']}}]", "twice"),
        (f"tenants: [{{name: a, token_sha256: ['{HASH}']}}, {{name: b, token_sha256: ['{HASH}']}}]", "the same token"),
        ("tenants: [{name: a, token_sha256: [the-token-itself]}]", "16 characters are not a SHA-256"),
        (f"tenants: [{{name: a, token_sha256: ['{HASH}'], role: root}}]", r"0\.role: .*'read', 'write'"),
        (f"tenants: [{{name: a, token_sha256: ['{HASH}'], quota: {{requests_per_s: 0}}}}]", "greater than 0"),
        (f"tenants: [{{name: a, token_sha256: ['{HASH}'], the-token-itself: 1}}]", "Extra inputs"),
        (f"tenants: [{{name: 'a b', token_sha256: ['{HASH}']}}]", "pattern"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        read_tenants(str(tmp_path / "t.yaml"))
    assert "'the-token-itself'" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"/no/such\.yaml cannot be read"):
        read_tenants("/no/such.yaml")


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 20)), max_size=60), st.floats(0.5, 50), st.floats(1, 50))
def test_no_bucket_gives_more_than_its_rate(takes: list[tuple[float, float]], rate: float, size: float) -> None:
    bucket, now, taken, last = Bucket(), 0.0, 0.0, 0.0
    for pause, amount in takes:
        now += pause
        if bucket.wait_s(amount, rate=rate, size=size, now=now) == 0:
            bucket.take(amount)
            taken += amount
            last = max(last, amount)
    assert taken <= size + rate * now + last + 1e-6


@given(st.floats(0.1, 20), st.floats(0.5, 50), st.floats(1, 50), st.floats(0, 200))
def test_the_wait_that_is_named_suffices(amount: float, rate: float, size: float, used: float) -> None:
    bucket = Bucket()
    bucket.take(used)
    wait = bucket.wait_s(amount, rate=rate, size=size, now=0.0)
    assert bucket.wait_s(amount, rate=rate, size=size, now=wait + 1e-9) == pytest.approx(0.0, abs=1e-6)


def test_a_token_is_shown_once_and_its_entry_fits_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, secret = tmp_path / "tenants.yaml", tmp_path / "token"
    assert main(["token", "shop", "--role", "write"]) == 0
    printed = capsys.readouterr()
    fresh = printed.err.split()[-1]
    assert main(["token", "admin", "--role", "admin", "--out", str(secret)]) == 0
    second = capsys.readouterr()
    assert second.err == ""
    assert secret.stat().st_mode & 0o777 == 0o600
    path.write_text("tenants:\n" + printed.out + second.out)
    assert fresh not in path.read_text()
    shop, admin = read_tenants(str(path))
    assert (shop.name, shop.role, shop.token_sha256) == ("shop", "write", (hash_token(fresh),))
    assert admin.token_sha256 == (hash_token(secret.read_text().strip()),)
    assert main(["token", "x", "--out", str(secret)]) == 2  # never written over
    assert main(["token", "a b"]) == 2
    assert "cannot name a tenant" in capsys.readouterr().err


def test_what_was_used_without_a_quota_does_not_count_once_there_is_one() -> None:
    meter, now = Meter(), 1000.0
    for _ in range(100_000):
        assert meter.charge(Quota(), 10, now) is None
    quota = Quota(requests_per_s=1, burst=2, queries_per_s=20)
    assert [meter.charge(quota, 10, now) for _ in range(2)] == [None, None]
    assert meter.charge(quota, 10, now) is not None
