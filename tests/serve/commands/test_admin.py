"""What ``lookalike admin`` reads and prints."""

import threading
from argparse import Namespace
from pathlib import Path

import grpc
import pytest

from lookalike.errors import UsageError
from lookalike.serve.commands.admin import read_rows, render_status, run, tell_progress
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import RetrievalError


def test_rows_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a=b.jpg").write_bytes(b"picture")
    (row,) = read_rows([f"chair={tmp_path}/a=b.jpg"], ["view=icon", "title=a = b"])
    assert (row.id, row.content, row.metadata) == ("chair", b"picture", {"view": "icon", "title": "a = b"})
    for wrong in ("chair", "=file", f"chair={tmp_path}/none"):
        with pytest.raises(UsageError):
            read_rows([wrong], [])
    with pytest.raises(UsageError, match="NAME=VALUE"):
        read_rows([], ["view"])


def test_ids_and_files_may_hold_equals_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "x=y.jpg", "y.jpg", "p=q.jpg"):
        Path(name).write_bytes(name.encode())
    rows = read_rows(["a=b.jpg", "a=b=b.jpg", "=a==b.jpg", f"k=v={tmp_path}/p=q.jpg"], [])
    assert [(row.id, row.content) for row in rows] == [
        ("a", b"b.jpg"),
        ("a=b", b"b.jpg"),
        ("=a=", b"b.jpg"),
        ("k=v", b"p=q.jpg"),
    ]
    with pytest.raises(UsageError, match=r"may name the file 'x=y.jpg' or 'y.jpg'"):
        read_rows(["k=x=y.jpg"], [])
    with pytest.raises(UsageError, match=r"'s=r\.jpg' cannot be read"):
        read_rows(["p=s=r.jpg"], [])
    with pytest.raises(UsageError, match="'view' is given twice"):
        read_rows(["a=b.jpg"], ["view=icon", "view=top"])


class Recorder:
    """A client whose service makes every backup."""

    def backup(self, path: str, *, timeout_s: float) -> int:
        self.asked = path, timeout_s
        return 7


@pytest.mark.parametrize("as_json", [False, True])
def test_a_backup_goes_to_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.chdir(tmp_path)
    client, options = Recorder(), Namespace(verb="backup", to="b.sqlite", timeout=5.0, json=as_json)
    text = run(client, options)  # type: ignore[arg-type]
    path = f"{tmp_path}/b.sqlite"
    assert client.asked == (path, 5.0)
    assert text == (f'{{"path": "{path}", "last_write": 7}}' if as_json else f"writes up to 7 in {path}")


def test_status_in_words() -> None:
    served = pb.Generation(name="f00", index="/i", plan="/p", num_rows=7, includes_writes=3)
    recall = pb.RecallEstimate(recall=0.97, low=0.95, high=0.98, queries=40)
    followers = [pb.Followers(role="ingress", replicas=2, current=1)]
    status = pb.StatusResponse(
        generations=[served, pb.Generation(name="old", index="/o")],
        current="f00",
        previous="old",
        last_write=5,
        pending_rows=2,
        followers=followers,
        recall=recall,
        activities=[
            pb.Activity(kind="compaction", step="builds an index with the writes up to 5", seconds=12.4),
            pb.Activity(kind="switch", step="waits for its turn", seconds=3),
        ],
        compaction_failure="No space left",
    )
    assert render_status(status).splitlines() == [
        "serving   f00: 7 rows, writes up to 3, /i, plan /p",
        "previous  old: 0 rows, writes up to 0, /o, exact",
        "writes    5 in all, 2 rows wait for compaction",
        "under way compaction for 12 s: builds an index with the writes up to 5",
        "under way switch for 3 s: waits for its turn",
        "failed    the last compaction begun by itself: No space left",
        "replicas  ingress: 1 of 2 hold the index",
        "recall    0.9700 (0.9500 to 0.9800, 40 queries)",
    ]


def test_a_long_verb_says_once_what_the_service_is_busy_with(capsys: pytest.CaptureFixture[str]) -> None:
    asked = threading.Semaphore(0)

    class Busy:
        """A client of a service that compacts, then is gone for a moment, then loads."""

        steps = iter(["compaction: builds", "compaction: builds", "", "compaction: loads"])

        def status(self) -> pb.StatusResponse:
            asked.release()
            if not (text := next(self.steps, "compaction: loads")):
                raise RetrievalError(grpc.StatusCode.UNAVAILABLE, "no writer")
            kind, _, step = text.partition(": ")
            return pb.StatusResponse(activities=[pb.Activity(kind=kind, step=step)])

    with tell_progress(Busy(), every_s=0.01):  # type: ignore[arg-type]
        for _ in range(6):
            assert asked.acquire(timeout=10)
    said = capsys.readouterr().err.splitlines()
    assert said == ["lookalike admin: compaction: builds", "lookalike admin: compaction: loads"]
