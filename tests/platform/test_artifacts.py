"""Artifacts: what was published opens again, and nothing else does."""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lookalike import storage
from lookalike.artifacts import FORMAT_VERSION, MANIFEST, Artifact, Draft, find, hash_json, lineage
from lookalike.errors import ArtifactError

NAMES = st.text("abcxyz-_.0", min_size=1, max_size=8).filter(lambda name: name.strip(".") and name != "_work")


def publish(
    root: str,
    files: dict[str, bytes],
    *,
    kind: str = "thing",
    name: str = "one",
    fingerprint: str = "f" * 20,
    parents: dict[str, list[Artifact]] | None = None,
) -> Artifact:
    draft = Draft(root, kind, name, fingerprint)
    for path, content in files.items():
        storage.write_atomic(draft.path(path), content)
    storage.make_directory(draft.uri)
    draft.stats["files"] = len(files)
    return draft.publish(config={"a": 1}, parents=parents or {}, stage_version=1, duration_s=0.5)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.builds("{}/{}".format, NAMES, NAMES), st.binary(max_size=50), max_size=4), st.booleans())
def test_publish_then_open_gives_the_same(tmp_path: Path, files: dict[str, bytes], in_memory: bool) -> None:
    root = f"memory://r-{uuid.uuid4().hex}" if in_memory else str(tmp_path / uuid.uuid4().hex)
    published = publish(root, files)
    opened = Artifact.open(published.uri, "thing")
    assert opened.manifest == published.manifest
    assert opened.digest == published.digest
    assert opened.stats == {"files": len(files)}
    assert {f.path: storage.read_bytes(opened.path(f.path)) for f in opened.manifest.files} == files
    found = find(root, "thing", "one", "f" * 20)
    assert found is not None
    assert found.uri == published.uri
    assert opened.root == root
    storage.remove_tree(root)


def test_rows_of_parquet_files_are_counted(root: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": range(7)}), sink)
    artifact = publish(root, {"part-0.parquet": sink.getvalue().to_pybytes(), "other.bin": b"1"})
    assert {f.path: f.rows for f in artifact.manifest.files} == {"part-0.parquet": 7, "other.bin": None}
    assert artifact.files("part-", ".parquet") == [f"{artifact.uri}/part-0.parquet"]


def test_private_state_and_temporary_files_are_not_published(root: str) -> None:
    draft = Draft(root, "thing", "one", "e" * 20)
    storage.write_atomic(draft.work("checkpoint", "state.pt"), b"1")
    storage.write_atomic(draft.path("x.bin.12ab.tmp"), b"half")
    storage.write_atomic(draft.path("x.bin"), b"whole")
    artifact = draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
    assert [f.path for f in artifact.manifest.files] == ["x.bin"]
    assert not storage.exists(draft.work("checkpoint", "state.pt"))


def test_a_draft_is_refused(root: str) -> None:
    draft = Draft(root, "thing", "one", "d" * 20)
    storage.write_atomic(draft.path("part-0.bin"), b"all of it")
    with pytest.raises(ArtifactError, match=r"unfinished draft.*run the stage"):
        Artifact.open(draft.uri)
    assert find(root, "thing", "one", "d" * 20) is None


def test_nothing_there(root: str) -> None:
    with pytest.raises(ArtifactError, match=r"it is not there; run the stage"):
        Artifact.open(f"{root}/thing/one/nowhere")


def test_another_kind_is_refused(root: str) -> None:
    artifact = publish(root, {"a": b"1"})
    with pytest.raises(ArtifactError, match=r"kind 'thing', not of kind 'corpus'"):
        Artifact.open(artifact.uri, "corpus")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "manifest.json has manifest format 3, .* reads up to 2; upgrade"),
        ({"format_version": "one"}, "manifest format 'one'"),
        ({"format_version": None}, "manifest format None"),
        ({"files": "none"}, "manifest.json is damaged"),
        ({"surprise": 1}, "manifest.json is damaged"),
    ],
)
def test_a_strange_manifest_is_refused(root: str, change: dict[str, Any], words: str) -> None:
    artifact = publish(root, {"a": b"1"})
    raw = json.loads(storage.read_bytes(artifact.path(MANIFEST)))
    storage.write_atomic(artifact.path(MANIFEST), json.dumps({**raw, **change}).encode())
    with pytest.raises(ArtifactError, match=words):
        Artifact.open(artifact.uri)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_manifest_that_is_no_manifest_is_refused(root: str, content: bytes) -> None:
    artifact = publish(root, {"a": b"1"})
    storage.write_atomic(artifact.path(MANIFEST), content)
    with pytest.raises(ArtifactError):
        Artifact.open(artifact.uri)


@given(position=st.integers(0, 799))
@settings(max_examples=20)
def test_any_flipped_bit_is_found(position: int) -> None:
    root, content = f"memory://r-{uuid.uuid4().hex}", bytes(range(100))
    artifact = publish(root, {"a.bin": content})
    flipped = bytearray(content)
    flipped[position // 8] ^= 1 << position % 8
    storage.write_atomic(artifact.path("a.bin"), bytes(flipped))
    with pytest.raises(ArtifactError, match=r"is damaged: a.bin does not match its SHA-256; remove the folder"):
        Artifact.open(artifact.uri)
    Artifact.open(artifact.uri, check=False)
    storage.remove_tree(root)


def test_truncated_and_missing_files_are_found(root: str) -> None:
    artifact = publish(root, {"a.bin": b"12345", "b.bin": b"12345", "c.bin": b"1"})
    storage.write_atomic(artifact.path("a.bin"), b"1234")
    fs, path = storage.resolve(artifact.path("b.bin"))
    fs.rm(path)
    with pytest.raises(ArtifactError, match=r"a.bin has 4 bytes, expected 5; b.bin is missing"):
        Artifact.open(artifact.uri)
    with pytest.raises(ArtifactError, match=r"a.bin has 4 bytes"):
        artifact.verify(content=False)


def test_publishing_touches_no_other_fingerprint(root: str) -> None:
    old = publish(root, {"a": b"old"}, fingerprint="1" * 20)
    other = publish(root, {"a": b"other"}, name="two", fingerprint="1" * 20)
    draft = Draft(root, "thing", "one", "2" * 20)
    draft.clear()
    new = publish(root, {"a": b"new"}, fingerprint="2" * 20)
    texts = [storage.read_bytes(Artifact.open(x.uri).path("a")) for x in (old, other, new)]
    assert texts == [b"old", b"other", b"new"]


def test_a_moved_root_still_opens_with_its_lineage(tmp_path: Path) -> None:
    root, moved = str(tmp_path / "here"), str(tmp_path / "there")
    grandparent = publish(root, {"a": b"1"}, kind="corpus")
    parent = publish(root, {"a": b"2"}, kind="encoder", parents={"corpus": [grandparent]})
    child = publish(root, {"a": b"3"}, kind="index", parents={"encoder": [parent]})
    shutil.move(root, moved)
    opened = Artifact.open(child.uri.replace(root, moved), "index")
    line = list(lineage(opened))
    assert [(depth, name) for depth, name, _ in line] == [(1, "encoder"), (2, "corpus")]
    assert [a.uri for _, _, a in line if isinstance(a, Artifact)] == [
        x.uri.replace(root, moved) for x in (parent, grandparent)
    ]


def test_parents_under_another_root_keep_their_place(tmp_path: Path) -> None:
    parent = publish(str(tmp_path / "shared"), {"a": b"1"}, kind="corpus")
    child = publish(str(tmp_path / "own"), {"a": b"2"}, parents={"corpus": [parent]})
    assert [uri for _, _, uri in Artifact.open(child.uri).parents()] == [parent.uri]


def test_lineage_tells_a_changed_and_a_lost_ancestor(root: str) -> None:
    parents = [publish(root, {"a": b"1"}, kind="number", name=name) for name in ("x", "y")]
    child = publish(root, {"a": b"2"}, parents={"numbers": parents})
    publish(root, {"a": b"not 1"}, kind="number", name="x")
    storage.remove_tree(parents[1].uri)
    changed, lost = [ancestor for _, _, ancestor in lineage(child)]
    assert isinstance(changed, ArtifactError)
    assert "has changed since" in str(changed)
    assert isinstance(lost, ArtifactError)
    assert "not there" in str(lost)


def test_digest_depends_on_content_alone(tmp_path: Path) -> None:
    one, two = publish(str(tmp_path / "1"), {"a": b"1"}), publish(str(tmp_path / "2"), {"a": b"1"}, name="other")
    three = publish(str(tmp_path / "3"), {"a": b"2"})
    assert one.digest == two.digest != three.digest


@given(st.dictionaries(st.text(max_size=3), st.integers(), max_size=4))
def test_hash_json_does_not_see_key_order(value: dict[str, int]) -> None:
    assert hash_json(value) == hash_json(dict(reversed(value.items())))
