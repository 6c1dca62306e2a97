"""The access log: what a line holds and what it never does, files that turn over, a disk that fails."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from lookalike.errors import UsageError
from lookalike.serve.client import SearchPlan
from lookalike.serve.local import LocalClient
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.settings.watching import AccessLogSettings
from lookalike.serve.watch.access_log import AccessLog, hash_text
from lookalike.serve.wire.errors import RetrievalError

if TYPE_CHECKING:
    from tests.serve.conftest import World


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("access-*.jsonl*"))
        for line in path.read_text().split("\n")
        if line
    ]


@pytest.fixture
def logged(world: "World", tmp_path: Path) -> Iterator[tuple[LocalClient, Path]]:
    config = ServeConfig(index=world.index, plan=world.plan, access_log=AccessLogSettings(folder=str(tmp_path)))
    with LocalClient(config) as client:
        yield client, tmp_path


def test_a_line_a_request_and_no_payload(logged: tuple[LocalClient, Path], world: "World") -> None:
    client, folder = logged
    found = client.search(image=world.images["img-007"], k=5, session="someone")
    client.search_batch(["img-003", "img-004"], k=3, plan=SearchPlan(8, 20, 64))
    with pytest.raises(RetrievalError):
        client.search(image_id="img-999")
    client.embed([world.images["img-001"]])
    list(client.search_stream([["img-001"], ["img-998"]], k=1))
    client.service.observer.close()
    lines = read_lines(folder)
    told = [(line["method"], line["code"], line.get("k"), line.get("queries")) for line in lines]
    assert told == [
        ("Search", "OK", 5, 1),
        ("SearchBatch", "OK", 3, 2),
        ("Search", "NOT_FOUND", 10, 1),
        ("Embed", "OK", None, None),
        ("SearchStream", "OK", 1, 1),
        ("SearchStream", "NOT_FOUND", 1, 1),
    ]
    first = lines[0]
    assert first["request_id"] == found.info.request_id
    assert first["generation"] == world.searcher.meta.generation
    assert first["plan"] == "index at 16-d, 12 rows -> re-rank at 64-d"
    assert (first["coverage"], first["degraded"]) == (1, False)
    assert {"encode", "shards", "merge"} == set(first["stages"])
    assert sum(first["stages"].values()) <= first["ms"]
    assert len({line["request_id"] for line in lines}) == len(lines)
    text = "".join(path.read_text() for path in folder.glob("access-*"))
    assert not any(secret in text for secret in ("someone", hash_text("someone"), "img-"))


def test_a_fault_of_ours_is_no_cancelled_call(
    logged: tuple[LocalClient, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, folder = logged

    async def broken(*_: Any, **__: Any) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(client.service.router, "search", broken)
    with pytest.raises(KeyError, match="broken"):
        list(client.search_stream([["img-001"]]))
    client.service.observer.close()
    assert [line["code"] for line in read_lines(folder)] == ["INTERNAL"]


def test_feedback_is_a_line_with_the_answers_id(logged: tuple[LocalClient, Path]) -> None:
    client, folder = logged
    found = client.search(image_id="img-001", k=2)
    client.feedback(found.info.request_id, "click", id=found.ids[1])
    client.feedback(found.info.request_id, "save")
    client.service.observer.close()
    search, click, save = read_lines(folder)
    assert search["request_id"] == click["request_id"] == save["request_id"]
    assert (click["method"], click["kind"], click["id"]) == ("Feedback", "click", hash_text(found.ids[1]))
    assert (save["kind"], "id" in save) == ("save", False)


@pytest.mark.parametrize(
    ("feedback", "words"),
    [
        (("", "click", ""), "request_id=''"),
        (("0" * 23 + "g", "click", ""), "request_id="),
        (("0" * 24, "", ""), "kind=''"),
        (("0" * 24, "Click!", ""), "kind='Click!'"),
        (("0" * 24, "k" * 33, ""), "kind="),
        (("0" * 24, "click", "x" * 1025), "1025 characters"),
    ],
)
def test_wrong_feedback_is_refused(
    logged: tuple[LocalClient, Path], feedback: tuple[str, str, str], words: str
) -> None:
    request_id, kind, image_id = feedback
    with pytest.raises(RetrievalError) as caught:
        logged[0].feedback(request_id, kind, id=image_id)
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert words in caught.value.message


def test_feedback_without_a_log_is_refused(world: "World") -> None:
    with LocalClient(world.index) as client, pytest.raises(RetrievalError, match=r"FAILED_PRECONDITION.*access_log"):
        client.feedback("0" * 24, "click")


def test_a_long_session_is_refused(logged: tuple[LocalClient, Path]) -> None:
    with pytest.raises(RetrievalError, match=r"INVALID_ARGUMENT.*1025 characters"):
        logged[0].search(vector=np.ones(64), session="x" * 1025)


def test_files_turn_over_and_stay_few(tmp_path: Path) -> None:
    log = AccessLog(AccessLogSettings(folder=str(tmp_path), max_mb=0.002, max_files=3))
    for number in range(60):
        log.add({"number": number, "pad": "x" * 90})
    log.close()
    files = sorted(tmp_path.glob("access-*.jsonl*"))
    assert len(files) == 3
    assert all(path.stat().st_size <= 2000 for path in files)
    kept = sorted(line["number"] for line in read_lines(tmp_path))
    assert kept == list(range(kept[0], 60))
    assert log.dropped == 0


def test_replicas_have_their_own_files_and_a_new_one_takes_up_an_old_ones(tmp_path: Path) -> None:
    settings = AccessLogSettings(folder=str(tmp_path))
    one, two = AccessLog(settings), AccessLog(settings)
    assert one.path != two.path
    one.add({"who": 1})
    two.add({"who": 2})
    one.close()
    three = AccessLog(settings)
    assert three.path == one.path
    three.add({"who": 3})
    two.close()
    three.close()
    assert sorted(line["who"] for line in read_lines(tmp_path)) == [1, 2, 3]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_lines_that_find_no_room_are_dropped_and_counted(tmp_path: Path) -> None:
    log = AccessLog(AccessLogSettings(folder=str(tmp_path), max_waiting=5))
    for number in range(5000):
        log.add({"number": number})
    log.close()
    assert log.dropped > 0
    assert len(read_lines(tmp_path)) + log.dropped == 5000


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    settings = AccessLogSettings(folder=str(tmp_path))
    (log := AccessLog(settings)).close()
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    log = AccessLog(settings)
    for number in (1, 2):
        log.add({"number": number})
    log.flush()
    assert log.dropped == 2
    log.path.unlink()
    log.add({"number": 3})
    log.close()
    assert log.dropped == 2
    assert [line["number"] for line in read_lines(tmp_path)] == [3]


def test_a_line_cut_short_spoils_no_other(tmp_path: Path) -> None:
    log = AccessLog(AccessLogSettings(folder=str(tmp_path)))
    log.add({"number": 0, "pad": "x" * 1_000_000})
    log.flush()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, limits[1]))
    try:
        log.add({"number": 1})
        log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.add({"number": 2})
    log.close()
    first, second, third = log.path.read_text().splitlines()
    assert (json.loads(first)["number"], len(second), json.loads(third)["number"]) == (0, 10, 2)
    assert log.dropped == 1


def test_a_file_that_someone_moved_is_begun_anew(tmp_path: Path) -> None:
    log = AccessLog(AccessLogSettings(folder=str(tmp_path)))
    log.add({"number": 0})
    log.flush()
    log.path.rename(tmp_path / "moved")
    log.add({"number": 1})
    log.close()
    assert [line["number"] for line in read_lines(tmp_path)] == [1]
    assert json.loads((tmp_path / "moved").read_text())["number"] == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"access_log.folder .*file"):
        AccessLog(AccessLogSettings(folder=str(tmp_path / "file")))
