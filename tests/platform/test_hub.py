"""Hub URIs: what they name, what is asked of the hub's client, and how its failures are told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lookalike import hub
from lookalike.errors import LookalikeError, UsageError


class FakeHub:
    """The client's three calls over a folder: one folder a repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        (self.root / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
        for file in Path(folder_path).iterdir():
            (self.root / repo_id / file.name).write_bytes(file.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub.test/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("snapshot_download", {"repo_id": repo_id, **options}))
        if not (self.root / repo_id).is_dir():
            raise OSError(f"404: {repo_id}\nsecond line")
        return str(self.root / repo_id)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_what_is_pushed_is_fetched(fake: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert hub.push(str(folder), "hf://shop/encoder@next", message="first").endswith("/shop/encoder/commit/1")
    assert (Path(hub.fetch("hf://shop/encoder@next")) / "config.json").read_text() == "{}"
    assert fake.calls == [
        ("create_repo", {"repo_id": "shop/encoder", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "shop/encoder", "revision": "next", "commit_message": "first"}),
        ("snapshot_download", {"repo_id": "shop/encoder", "revision": "next", "allow_patterns": hub.FILES}),
    ]


def test_a_new_repository_is_public_only_when_asked(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    hub.push(str(tmp_path / "export"), "hf://a/b", message="m", public=True)
    assert fake.calls[0][1]["private"] is False


def test_other_uris_are_left_alone(fake: FakeHub) -> None:
    assert hub.fetch("/some/folder") == "/some/folder"
    assert hub.fetch("s3://bucket/folder") == "s3://bucket/folder"
    assert fake.calls == []


@pytest.mark.parametrize("uri", ["hf://", "hf://owner", "hf://owner/", "hf://a/b/c", "hf:///b"])
def test_a_uri_that_names_no_repository_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="names no repository; write hf://owner/name or"):
        hub.split(uri)


def test_failures_name_repository_cause_and_remedy(fake: FakeHub) -> None:
    told = r"was fetched from no/where on the hub: OSError: 404: no/where second line; check the name, .*HF_TOKEN"
    with pytest.raises(LookalikeError, match=told):
        hub.fetch("hf://no/where")


def test_without_a_network_the_real_client_fails_with_the_same_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LookalikeError, match=r"nothing was fetched from no/where on the hub: \w+: .*or use a folder"):
        hub.fetch("hf://no/where")
    with pytest.raises(LookalikeError, match=r"nothing was pushed to no/where on the hub"):
        hub.push(str(tmp_path), "hf://no/where", message="m")
