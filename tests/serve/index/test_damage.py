"""Damage of an index: any file, any kind of it, is told by the file's name before a wrong answer can be given."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lookalike import storage
from lookalike.artifacts import MANIFEST, Artifact, Draft
from lookalike.cli import main
from lookalike.errors import ArtifactError, LookalikeError
from lookalike.retrieval.searcher import Searcher
from lookalike.serve.index.build import STAGE, IndexConfig
from lookalike.stages import execute
from tests.synthetic import make_vectors, publish_embeddings

DATA, _ = make_vectors(300, 16, num_classes=20, seed=1)


@pytest.fixture(scope="module", params=["hnsw", "graph"])
def sound(request, tmp_path_factory, in_process) -> Artifact:
    """An index with appended segments and tombstones."""
    root = str(tmp_path_factory.mktemp("root"))
    config = IndexConfig(shortlist=request.param, shortlist_dims=(8,))
    previous: list[Artifact] = []
    for number, rows in enumerate((slice(0, 280), slice(10, 300))):
        ids = [f"i{row:04d}" for row in range(300)[rows]]
        database = publish_embeddings(root, f"db{number}", DATA[rows], {"image_id": ids}, dims=[8, 16])
        inputs = {"embeddings": [database]}
        inputs |= {"previous": previous} if previous else {}
        previous = [execute(STAGE, config, inputs, root, f"i{number}")]
    assert previous[0].stats["shards_appended"] == 2
    return previous[0]


@pytest.fixture
def index(sound, tmp_path) -> Artifact:
    """A copy to be damaged."""
    uri = str(tmp_path / "index" / "copy" / "f")
    shutil.copytree(sound.uri, uri)
    return Artifact.open(uri, "index")


def names_of(index: Artifact) -> list[str]:
    return [MANIFEST, *(file.path for file in index.manifest.files)]


def checks(name: str) -> list[bool]:
    """With and without comparing contents; a searcher has no use for digests and does not open them."""
    return [True] if name.endswith("digests.npy") else [False, True]


def open_all(index: Artifact, *, check: bool) -> None:
    searcher = Searcher.open(index.uri, check=check)
    for shard in searcher.shards:
        shard.load()


def test_a_flipped_byte_in_any_file_is_named_by_opening_and_by_the_scrub(index, capsys):
    kinds = {Path(name).name.partition("-")[0] for name in names_of(index)}
    assert kinds == {
        MANIFEST,
        "meta.json",
        "shard.json",
        "rows.arrow",
        "norms.npy",
        "digests.npy",
        "tombstones.npy",
        "block",
        "shortlist",
    }
    generator = np.random.default_rng(0)
    for name in names_of(index):
        path = Path(index.path(name))
        good = path.read_bytes()
        for position in (0, len(good) - 1, int(generator.integers(len(good)))):
            bad = bytearray(good)
            bad[position] ^= 1 << int(generator.integers(8))
            path.write_bytes(bytes(bad))
            with pytest.raises(ArtifactError, match=name):
                Searcher.open(index.uri)
        assert main(["verify", index.uri]) == 3
        assert name in capsys.readouterr().out
        path.write_bytes(good)
    assert main(["verify", index.uri]) == 0
    open_all(index, check=True)


def test_a_truncated_file_is_named_even_when_contents_are_not_compared(index):
    for name in names_of(index):
        path = Path(index.path(name))
        good = path.read_bytes()
        for size in (0, len(good) // 2, len(good) - 1 - (name.endswith("json") * 1)):
            path.write_bytes(good[:size])
            for check in checks(name):
                with pytest.raises(ArtifactError, match=name):
                    open_all(index, check=check)
        path.write_bytes(good)
    open_all(index, check=False)


def test_a_missing_file_is_named_with_what_to_do(index):
    for name in names_of(index):
        path = Path(index.path(name))
        path.rename(path.with_suffix(".away"))
        for check in checks(name):
            with pytest.raises(ArtifactError, match=rf"{name}.*(again|run the stage|restore)"):
                open_all(index, check=check)
        path.with_suffix(".away").rename(path)


def test_a_missing_shard_folder_is_named(index):
    shutil.rmtree(index.path("shard-00001"))
    with pytest.raises(ArtifactError, match=r"shard-00001/shard.json is missing.*build the index again"):
        Searcher.open(index.uri, check=False)
    with pytest.raises(ArtifactError, match=r"shard-00001/block-\d+-\d+.npy is missing.*restore it from a copy"):
        Searcher.open(index.uri)


@pytest.mark.parametrize("name", ["meta.json", "shard-00001/shard.json"])
def test_a_newer_format_asks_for_a_newer_lookalike(index, name):
    values = json.loads(storage.read_bytes(index.path(name)))
    draft = Draft(index.root, "index", "copy", "f")
    draft.write_json(name, values | {"format_version": values["format_version"] + 1, "news": 1})
    draft.publish(config={}, parents={}, stage_version=2, duration_s=0.0)
    with pytest.raises(ArtifactError, match=rf"{name} has format 3, this lookalike .* reads up to 2; upgrade"):
        Searcher.open(index.uri)


def test_an_index_of_the_first_format_opens_and_answers(index):
    """Before segments: no digests, no tombstones, no hash_shards."""
    draft = Draft(index.root, "index", "copy", "f")
    old = json.loads(storage.read_bytes(index.path("meta.json")))
    whole = [place for place, name in enumerate(old["shards"]) if name.count("-") == 1]
    offset = 0
    for place in whole:
        name = old["shards"][place]
        storage.remove_file(index.path(name, "digests.npy"))
        storage.remove_file(index.path(name, "tombstones.npy"))
        shard = json.loads(storage.read_bytes(index.path(name, "shard.json")))
        del shard["num_deleted"]
        draft.write_json(f"{name}/shard.json", shard | {"format_version": 1, "row_offset": offset})
        offset += shard["num_rows"]
    for key in ("num_deleted", "hash_shards"):
        del old[key]
    chosen = {key: [old[key][place] for place in whole] for key in ("shards", "shard_rows")}
    draft.write_json("meta.json", old | chosen | {"format_version": 1, "num_rows": offset})
    draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
    searcher = Searcher.open(index.uri)
    assert searcher.find(["i0003", "i0290"]).tolist()[1] == -1
    assert searcher.ids(searcher.search(DATA[3], 1).rows[0]) == ["i0003"]


def test_a_full_disk_is_told_before_mapped_memory_is_written(sound, tmp_path, monkeypatch):
    """A write into a map for which the disk has no page would end the process with SIGBUS."""

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    database = publish_embeddings(
        str(tmp_path), "db", DATA[:50], {"image_id": [f"i{row}" for row in range(50)]}, dims=[8, 16]
    )
    with pytest.raises(LookalikeError, match=r"no space left to write .*\.npy; free some"):
        execute(STAGE, IndexConfig(shortlist_dims=(8,)), {"embeddings": [database]}, str(tmp_path), "i")
