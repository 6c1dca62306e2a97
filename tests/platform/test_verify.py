"""``lookalike verify``: one flipped bit in any file of any artifact, on a disk or elsewhere, is told by its name."""

import uuid
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lookalike import storage
from lookalike.artifacts import MANIFEST, Artifact, Draft
from lookalike.cli import main
from lookalike.commands.verify import scrub
from lookalike.errors import ArtifactError


def publish(root: str, name: str = "one") -> Artifact:
    draft = Draft(root, "thing", name, "f" * 20)
    for path in ("a.bin", "deep/b.bin"):
        storage.write_atomic(draft.path(path), path.encode() * 40)
    draft.stats = {"rows": 12, "text": "\u00e9"}
    return draft.publish(config={"seed": 3}, parents={}, stage_version=1, duration_s=0.5)


def flip(uri: str, position: int, bit: int) -> None:
    content = bytearray(storage.read_bytes(uri))
    content[position % len(content)] ^= 1 << bit
    storage.write_atomic(uri, bytes(content))


@pytest.mark.parametrize("remote", [False, True])
def test_the_damaged_file_is_named_and_the_exit_code_says_so(
    tmp_path: Path, remote: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"memory://v-{uuid.uuid4().hex}" if remote else str(tmp_path)
    one, two = publish(root), publish(root, "two")
    assert main(["verify", root]) == 0
    assert capsys.readouterr().out.splitlines() == [f"ok  {one.uri}", f"ok  {two.uri}"]
    flip(two.path("deep/b.bin"), 7, 3)
    assert main(["verify", one.uri, two.uri]) == 3
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        f"ok  {one.uri}",
        f"DAMAGED  {two.uri}",
        "  deep/b.bin does not match its SHA-256",
    ]
    assert "run its stage again, or restore it from a copy" in shown.err
    storage.remove_file(two.path("a.bin"))
    flip(one.path(MANIFEST), 80, 1)
    assert main(["verify", root]) == 3
    out = capsys.readouterr().out
    assert "  a.bin is missing" in out
    assert f"  {one.path(MANIFEST)} is damaged" in out
    storage.remove_tree(root)


def test_where_there_is_no_artifact_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for uri in (str(tmp_path), str(tmp_path / "nowhere")):
        assert main(["verify", uri]) == 3
        assert "no artifact at or below" in capsys.readouterr().err


def test_an_unreadable_file_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    artifact = publish(str(tmp_path))
    Path(artifact.path("a.bin")).unlink()
    Path(artifact.path("a.bin")).mkdir()
    assert [problem.split()[0] for problem in scrub(artifact.uri)] == ["a.bin"]


@given(position=st.integers(0, 5000), bit=st.integers(0, 7))
@example(position=21, bit=1)  # of the format's version: 2 becomes 0
@settings(max_examples=300)
def test_any_bit_of_a_manifest_matters(position: int, bit: int) -> None:
    root = f"memory://v-{uuid.uuid4().hex}"
    artifact = publish(root)
    assert Artifact.open(artifact.uri).manifest == artifact.manifest
    flip(artifact.path(MANIFEST), position, bit)
    with pytest.raises(ArtifactError, match=MANIFEST):
        Artifact.open(artifact.uri, check=False)
    storage.remove_tree(root)


@pytest.mark.parametrize("version", [-1, 0, 1])
def test_no_version_gets_past_the_checksum(tmp_path: Path, version: int) -> None:
    artifact = publish(str(tmp_path))
    content = storage.read_bytes(artifact.path(MANIFEST))
    assert content[21:22] == b"2"
    storage.write_atomic(artifact.path(MANIFEST), content[:21] + str(version).encode() + content[22:])
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged: it does not match its own checksum"):
        Artifact.open(artifact.uri)


def test_a_manifest_of_the_first_format_has_no_checksum_and_opens(tmp_path: Path) -> None:
    artifact = publish(str(tmp_path))
    old = artifact.manifest.model_dump(mode="json") | {"format_version": 1}
    del old["checksum"]
    Draft(str(tmp_path), "thing", "one", "f" * 20).write_json(MANIFEST, old)
    assert Artifact.open(artifact.uri).digest == artifact.digest


@pytest.mark.parametrize("gone", ["checksum", "stats"])
def test_a_manifest_without_a_part_is_refused(tmp_path: Path, gone: str) -> None:
    artifact = publish(str(tmp_path))
    values = artifact.manifest.model_dump(mode="json")
    del values[gone]
    Draft(str(tmp_path), "thing", "one", "f" * 20).write_json(MANIFEST, values)
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged.*restore it"):
        Artifact.open(artifact.uri)
