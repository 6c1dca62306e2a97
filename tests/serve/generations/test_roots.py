"""Administrators name artifacts and backups below the service's roots, and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from lookalike.serve.generations.generation import read_generation
from lookalike.serve.generations.roots import artifact_roots, backup_roots, check_below
from lookalike.serve.settings.config import ServeConfig, Writes
from lookalike.serve.wire.errors import RetrievalError

if TYPE_CHECKING:
    from tests.serve.conftest import World


def test_roots_of_a_service(world: "World", tmp_path: Path) -> None:
    config = ServeConfig(index=world.index, writes=Writes(state=str(tmp_path), roots=("s3://bucket/run",)))
    generation = read_generation(world.index, world.plan, world.encoder_uri, check=False)
    assert backup_roots(config) == [str(tmp_path), "s3://bucket/run"]
    assert set(artifact_roots(config, generation)) == {world.root, str(tmp_path), "s3://bucket/run"}
    check_below(
        "artifact", [world.index, world.plan, None, f"{tmp_path}/artifacts/x"], artifact_roots(config, generation)
    )


@pytest.mark.parametrize(
    ("index", "root"),
    [("/data/run/index/index/f00", "/data/run"), ("/index/index/f00", "/index"), ("s3://b/index/index/f/", "s3://b")],
)
def test_the_root_of_an_artifact_is_never_everything(index: str, root: str, world: "World") -> None:
    generation = read_generation(world.index, None, "none", check=False)
    moved = generation.__class__(index, None, None, generation.meta, generation.plans)
    assert artifact_roots(ServeConfig(index=index), moved) == [root]


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd",
        "{root}/../elsewhere/x",
        "{root}-other/x",
        "{root}/link/x",
        "file:///etc/passwd",
        "http://127.0.0.1/x",
        "s3://bucket/run/../other",
        "s3://bucket/runner/x",
        "s3://other/run/x",
        "simplecache::s3://bucket/run/x",
        "",
    ],
)
def test_what_lies_elsewhere_is_refused(uri: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with pytest.raises(RetrievalError, match=r"it looks only below .*writes\.roots") as caught:
        check_below("backup", [uri.format(root=root)], [str(root), "s3://bucket/run"])
    assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION


def test_what_lies_below_is_allowed(tmp_path: Path) -> None:
    roots = [f"{tmp_path}/", "s3://bucket/run/"]
    check_below("backup", [f"{tmp_path}/x", f"file://{tmp_path}/a/b", "s3://bucket/run/a/b/"], roots)


@pytest.mark.parametrize("root", ["", "/", "s3://", "file:///"])
def test_everything_is_no_root(root: str) -> None:
    with pytest.raises(ValueError, match="which is everything"):
        Writes(roots=(root,))
