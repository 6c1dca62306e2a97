"""An index built from a previous one: what is kept, what is appended, and the answers of one built whole."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.errors import ArtifactError
from lookalike.retrieval.index_meta import shard_of
from lookalike.retrieval.plan import Plan
from lookalike.retrieval.searcher import Searcher
from lookalike.serve.generations.generation import read_generation
from lookalike.serve.index import build as module
from lookalike.serve.index.build import IndexConfig
from lookalike.serve.index.rows import EmbeddingRows
from lookalike.serve.local import LocalClient
from lookalike.serve.search.router import Router
from lookalike.serve.search.workers import RerankWorker, ShardWorker
from lookalike.serve.settings.config import ServeConfig
from lookalike.serve.wire.ask import Ask
from lookalike.serve.wire.errors import RetrievalError
from lookalike.stages import execute
from tests.synthetic import embeddings_table, make_vectors, publish_embeddings, publish_tables

pytestmark = pytest.mark.usefixtures("in_process")
DIMS = [4, 8, 16]
DATA, _ = make_vectors(2000, 16, num_classes=40, seed=5)
QUERIES, _ = make_vectors(20, 16, num_classes=40, seed=6)
EXACT = Plan.exact(16)
NARROW = Plan(shortlist_dim=4, shortlist_k=600, rerank_dim=16)  # more than a shard has: nothing is lost
World = dict[str, tuple[int, str]]
"""id -> (row of DATA, view)."""


def image(n: int) -> str:
    return f"img-{n * 7919 % 10_000:05d}"


BASE: World = {image(n): (n, ("icon", "front")[n % 2]) for n in range(400)}


@pytest.fixture(scope="module")
def first(in_process, tmp_path_factory) -> Artifact:
    """The index of ``BASE``."""
    return build(tmp_path_factory.mktemp("first"), BASE)


@pytest.fixture(scope="module")
def appended(first, tmp_path_factory) -> Artifact:
    """The index of ``edit(BASE)``, appended to ``first``."""
    return build(tmp_path_factory.mktemp("appended"), edit(BASE), first)


def publish(root, world: World, name="db", **more) -> Artifact:
    rows = [row for row, _ in world.values()]
    columns = {"image_id": list(world), "view": [view for _, view in world.values()]}
    return publish_embeddings(str(root), name, DATA[rows], columns, dims=DIMS, **more)


def build(root, world: World, previous=None, name="index", encoder="synthetic", **config) -> Artifact:
    inputs = {"embeddings": [publish(root, world, f"db-{name}", encoder=encoder)]}
    inputs |= {"previous": [previous]} if previous else {}
    return execute(module.STAGE, IndexConfig(**{"shortlist": "hnsw", **config}), inputs, str(root), name)


def answers(index: Artifact, plan=EXACT, allowed=None):
    searcher = Searcher.open(index.uri)
    hits = searcher.search(QUERIES, 10, plan, allowed)
    return [searcher.ids(row) for row in hits.rows], hits.scores


def assert_same_answers(index, whole):
    for plan in (EXACT, NARROW):
        for allowed in (None, {"view": ["icon"]}):
            (ids, scores), (wanted, truth) = answers(index, plan, allowed), answers(whole, plan, allowed)
            assert ids == wanted
            np.testing.assert_allclose(scores, truth, atol=1e-6)


def digests(index: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in index.manifest.files}


def counts(index: Artifact) -> tuple[int, int, int]:
    return tuple(index.stats[f"shards_{kind}"] for kind in ("reused", "appended", "rebuilt"))


def edit(world: World) -> World:
    """Ten new, six gone, eight with another vector, four with other metadata."""
    ids = sorted(world)
    changed = {name: row for name, row in world.items() if name not in ids[:6]}
    changed |= {image(n): (n, "icon") for n in range(400, 410)}
    changed |= {name: (900 + n, "front") for n, name in enumerate(ids[10:18])}
    return changed | {name: (world[name][0], "other") for name in ids[20:24]}


def test_a_build_without_changes_keeps_all_and_outlives_the_previous_index(tmp_path):
    first = build(tmp_path, BASE)
    assert counts(first) == (0, 0, 2)
    again = build(tmp_path, BASE, first, "again")
    assert counts(again) == (2, 0, 0)
    kept = digests(first)
    assert digests(again) == kept
    linked = [name for name in kept if os.stat(again.path(name)).st_ino == os.stat(first.path(name)).st_ino]
    assert set(kept) - set(linked) == {"meta.json", "shard-00000/shard.json", "shard-00001/shard.json"}
    wanted = answers(first)[0]
    shutil.rmtree(first.uri)
    Artifact.open(again.uri).verify(content=True)
    assert answers(again)[0] == wanted


@pytest.mark.parametrize("shortlist", ["flat", "hnsw", "graph", "ivf", "binary"])
def test_few_changes_are_appended_and_answered_as_if_built_whole(tmp_path, shortlist):
    first = build(tmp_path, BASE, shortlist=shortlist)
    world = edit(BASE)
    index = build(tmp_path, world, first, "next", shortlist=shortlist)
    whole = build(tmp_path, world, None, "whole", shortlist=shortlist)
    assert counts(index) == (0, 2, 0)
    assert (index.stats["rows"], index.stats["deleted_rows"]) == (len(world), 18)
    assert index.digest != whole.digest
    assert_same_answers(index, whole)


def test_rows_are_found_under_their_id_once_and_deleted_ones_never(appended):
    world = edit(BASE)
    searcher = Searcher.open(appended.uri)
    assert searcher.meta.shards == ("shard-00000", "shard-00000-001", "shard-00001", "shard-00001-001")
    assert searcher.meta.hash_shards == (0, 0, 1, 1)
    assert (searcher.meta.num_hash_shards, searcher.meta.num_live) == (2, len(world))
    gone = sorted(set(BASE) - set(world))
    assert searcher.find(gone).tolist() == [-1] * 6
    rows = searcher.find(list(world))
    assert searcher.ids(rows) == list(world)
    unit = DATA[[row for row, _ in world.values()]]
    np.testing.assert_allclose(searcher.vectors(rows), unit / np.linalg.norm(unit, axis=1, keepdims=True), atol=1e-6)
    assert [facts["view"] for facts in searcher.metadata(rows)] == [view for _, view in world.values()]
    live = [
        np.ones(shard.meta.num_rows, bool) if shard.store.live is None else shard.store.live
        for shard in searcher.shards
    ]
    dead = np.flatnonzero(~np.concatenate(live))
    assert len(dead) == 18
    plans = [
        EXACT,
        NARROW,
        Plan(shortlist_dim=8, shortlist_k=30, ef_search=40, rerank_dim=16),
        Plan(shortlist_dim=8, shortlist_k=500, scan=True, rerank_dim=16),
    ]
    queries = searcher.vectors(dead)  # the deleted vectors themselves
    for plan in plans:
        for allowed in (None, {"view": ["icon", "front"]}, np.ones(searcher.meta.num_rows, bool)):
            rows_found = searcher.search(queries, 400, plan, allowed).rows
            assert not np.isin(rows_found, dead).any()
            assert (rows_found[:, :30] >= 0).all()


@pytest.mark.parametrize("plan", [EXACT, NARROW], ids=["exact", "narrow"])
def test_a_re_ranker_takes_the_segments_of_all_shards(appended, plan):
    searcher = Searcher.open(appended.uri)
    generation = read_generation(appended.uri, None, "none")
    router = Router([ShardWorker(group, 2, [generation]) for group in range(2)], RerankWorker([generation]))

    async def search():
        deadline = asyncio.get_running_loop().time() + 30
        ask = Ask(generation.name, QUERIES, 10, plan, {"view": ["icon"]})
        return await router.search(ask, deadline=deadline, allow_partial=False)

    outcome = asyncio.run(search())
    assert outcome.shards_answered == 2
    hits = searcher.search(QUERIES, 10, plan, {"view": ["icon"]})
    np.testing.assert_array_equal(outcome.answer.hits.rows, hits.rows)
    np.testing.assert_array_equal(outcome.answer.hits.scores, hits.scores)


def test_segments_are_served_as_shards_are(appended):
    with LocalClient(ServeConfig(index=appended.uri, encoder="none")) as client:
        facts = client.describe()
        assert (facts.num_rows, facts.num_shards) == (len(edit(BASE)), 2)
        assert [client.search(vector=query, k=10).ids for query in QUERIES] == answers(appended)[0]
        changed = sorted(BASE)[12]
        assert client.search(image_id=changed, k=1).ids == [changed]
        with pytest.raises(RetrievalError, match="no image"):
            client.search(image_id=sorted(BASE)[0], k=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_generation_after_generation_answers_as_if_built_whole(first, tmp_path, seed):
    generator = np.random.default_rng(seed)
    world, index, seen = dict(BASE), first, set()
    unused = iter(generator.permutation(np.arange(1000, 2000)).tolist())  # equal scores would come in any order
    for number, size in enumerate(generator.permutation([0, 8, 8, 25, 25, 120])):
        ids = sorted(world)
        for name in generator.choice(ids, size, replace=False):
            match generator.integers(3):
                case 0:
                    del world[name]
                case 1:
                    world[name] = (next(unused), "front")
                case _:
                    world[image(int(generator.integers(400, 1000)))] = (next(unused), "icon")
        index = build(tmp_path, world, index, f"g{number}", max_segments=3)
        whole = build(tmp_path, world, None, f"w{number}")
        assert sum(counts(index)) == 2
        assert index.stats["rows"] == len(world)
        searcher = Searcher.open(index.uri)
        assert max(np.bincount(searcher.meta.hash_shards)) <= 3
        assert searcher.meta.num_deleted <= 0.2 * searcher.meta.num_rows
        assert searcher.ids(searcher.find(sorted(world))) == sorted(world)
        assert_same_answers(index, whole)
        seen |= {kind for kind, count in zip("rab", counts(index), strict=True) if count}
    assert seen >= {"a", "b"}


def test_many_changes_compact_a_shard_to_the_bytes_of_one_built_whole(appended, tmp_path):
    world = {
        name: ((row + 500) % 1000 if shard_of(name, 2) == 0 else row, view) for name, (row, view) in edit(BASE).items()
    }
    index, whole = build(tmp_path, world, appended, "next"), build(tmp_path, world, None, "whole")
    assert counts(index) == (1, 0, 1)
    assert Searcher.open(index.uri).meta.shards == ("shard-00000", "shard-00001", "shard-00001-001")
    rebuilt, wanted = (
        {path: sha256 for path, sha256 in digests(artifact).items() if path.startswith("shard-00000/")}
        for artifact in (index, whole)
    )
    assert rebuilt == wanted
    assert_same_answers(index, whole)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"encoder": "other"}, "encoder was 'synthetic', is 'other'"),
        ({"num_shards": 3}, "num_shards was 2, is 3"),
        ({"dims": (8, 16)}, r"dims was \(4, 8, 16\), is \(8, 16\)"),
        ({"dtype": "float16"}, "dtype was 'float32', is 'float16'"),
        ({"shortlist": "flat"}, "shortlist was 'hnsw', is 'flat'"),
        ({"shortlist_dims": (8,)}, r"shortlist_dims was \(4, 8\), is \(8,\)"),
        ({"hnsw_m": 8}, "hnsw_m was None, is 8"),
    ],
)
def test_what_differs_from_the_previous_index_is_said_and_all_is_built(first, tmp_path, caplog, settings, reason):
    index = build(tmp_path, BASE, first, "next", **settings)
    assert counts(index) == (0, 0, settings.get("num_shards", 2))
    assert re.search(reason, index.stats["nothing_kept_because"])
    assert "nothing is kept" in caplog.text


def test_damage_of_the_previous_index_does_not_pass_into_the_next(tmp_path):
    first = build(tmp_path, BASE)
    block = next(Path(file.path).name for file in first.manifest.files if "/block-" in file.path)
    for name in (block, "shortlist-00004.faiss", "digests.npy", "rows.arrow"):
        path = Path(first.path("shard-00001", name))
        good = path.read_bytes()
        path.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
        with pytest.raises(ArtifactError, match=rf"shard-00001/{name} is damaged.*restore it"):
            build(tmp_path, edit(BASE), first, "next")
        assert not list(tmp_path.glob("index/next/*/manifest.json"))
        shutil.rmtree(tmp_path / "index" / "next")
        path.write_bytes(good)
    assert counts(build(tmp_path, edit(BASE), first, "next")) == (0, 2, 0)


def test_a_remote_index_is_kept_from_and_appended_to(appended, tmp_path):
    root = "memory://lookalike-incremental"
    base = build(root, BASE)
    index = build(root, edit(BASE), base, "next")
    assert counts(index) == (0, 2, 0)
    assert digests(index) == digests(appended)
    storage.remove_tree(base.uri)
    assert answers(index)[0] == answers(appended)[0]
    local = build(tmp_path, edit(BASE), index, "from-remote")  # another store: copied through this machine
    assert counts(local) == (2, 0, 0)
    assert answers(local)[0] == answers(appended)[0]
    storage.remove_tree(root)


def test_parts_that_were_indexed_before_are_not_read_again(tmp_path, monkeypatch):
    """The same files and two more: only the vectors of the new ones are read, and the bytes do not depend on it."""
    ids = sorted(BASE)
    batches = [DATA[:200], DATA[200:400], DATA[400:420], DATA[420:430]]
    names = [ids[:200], ids[200:], [f"new-{n}" for n in range(20)], [f"newer-{n}" for n in range(10)]]
    tables = [embeddings_table(data, {"image_id": own}) for data, own in zip(batches, names, strict=True)]

    def database(name, count):
        draft = Draft(str(tmp_path), "embeddings", name, "f" * 20)
        return publish_tables(draft, iter(tables[:count]), dims=DIMS, encoder="synthetic")

    read = []
    original = EmbeddingRows.vectors
    monkeypatch.setattr(
        EmbeddingRows,
        "vectors",
        lambda self, part, places, rows: (
            read.extend([Path(part).name] if len(places) else []),
            original(self, part, places, rows),
        )[1],
    )

    def run(root, name, count, previous=None):
        inputs = {"embeddings": [database(name, count)]} | ({"previous": [previous]} if previous else {})
        return execute(module.STAGE, IndexConfig(shortlist="flat"), inputs, str(root), name)

    first = run(tmp_path, "two", 2)
    assert set(read) == {"part-00000.parquet", "part-00001.parquet"}
    read.clear()
    grown = run(tmp_path, "four", 4, first)
    assert set(read) == {"part-00002.parquet", "part-00003.parquet"}
    assert counts(grown) == (0, 2, 0)
    read.clear()
    storage.remove_tree(str(tmp_path / "embeddings" / "two"))  # pruned: rows are compared by their digests
    again = run(tmp_path / "again", "four", 4, first)
    assert set(read) == {f"part-0000{n}.parquet" for n in range(4)}
    assert again.digest == grown.digest
    assert Searcher.open(grown.uri).ids(Searcher.open(grown.uri).find(["new-3", "newer-9"])) == ["new-3", "newer-9"]


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def die_after(monkeypatch, steps: int) -> None:
    """The process ends at the ``steps``-th file written, linked or renamed (a file is then half there)."""
    left = [steps]

    def dying(original, half):
        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                half(*args)
                raise Killed
            return original(*args, **kwargs)

        return call

    def half_file(target, *_):
        if isinstance(target, str):
            Path(target).write_bytes(b"half")

    def nothing(*_):
        pass

    monkeypatch.setattr(np, "save", dying(np.save, half_file))
    monkeypatch.setattr(os, "link", dying(os.link, lambda _, target: half_file(target)))
    for owner, name in ((os, "rename"), (os, "replace"), (storage, "write_atomic"), (module, "build_shortlist")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name), nothing))


def test_killed_at_any_step_nothing_opens_and_the_next_run_gives_the_same_bytes(tmp_path, monkeypatch):
    small = dict(list(BASE.items())[:120])
    world = edit(small)
    first, database = build(tmp_path, small), publish(tmp_path, world, "db-next")
    config = IndexConfig(shortlist="hnsw", append_share=0.5)

    def run(root):
        return execute(module.STAGE, config, {"embeddings": [database], "previous": [first]}, str(root), "next")

    calm = run(tmp_path / "calm")
    assert counts(calm) == (0, 2, 0)
    steps = 0
    while True:
        steps += 1
        root = tmp_path / f"killed-{steps}"
        with monkeypatch.context() as patch:
            die_after(patch, steps)
            try:
                done = run(root)
            except Killed:
                done = None
        if done is not None:
            break
        for folder in root.glob("index/next/*"):
            with pytest.raises(ArtifactError, match=r"no artifact|unfinished"):
                Searcher.open(str(folder))
        again = run(root)
        assert again.digest == calm.digest
        assert storage.list_files(again.uri) == storage.list_files(calm.uri)
        shutil.rmtree(root)
    assert steps > 40  # each kept file, each built one, and the marks


SUBPROCESS = """
import sys
from lookalike.artifacts import Artifact, Draft
from lookalike.serve.index import build as module
from lookalike.stages import execute
module.map_tasks = lambda function, arguments, _: [function(*values) for values in arguments]
database, first, root = sys.argv[1:]
inputs = {"embeddings": [Artifact.open(database)], "previous": [Artifact.open(first)]}
print("ready", flush=True)
execute(module.STAGE, module.IndexConfig(shortlist="hnsw"), inputs, root, "next")
"""


@pytest.mark.soak
def test_kill_9_at_random_times_leaves_no_index_that_opens(first, tmp_path):
    database = publish(tmp_path, edit(BASE), "db-next")
    command = [sys.executable, "-c", SUBPROCESS, database.uri, first.uri]
    start = time.monotonic()
    calm = tmp_path / "calm"
    subprocess.run([*command, str(calm)], check=True)
    whole_s = time.monotonic() - start
    wanted = Artifact.open(str(next(calm.glob("index/next/*"))))
    generator, killed = np.random.default_rng(3), 0
    for number in range(15):
        root = tmp_path / f"killed-{number}"
        with subprocess.Popen([*command, str(root)], stdout=subprocess.PIPE) as run:
            run.stdout.readline()
            time.sleep(generator.uniform(0, whole_s / 4))
            run.kill()
        for folder in root.glob("index/next/*"):
            if not (folder / "manifest.json").exists():
                killed += 1
                with pytest.raises(ArtifactError):
                    Searcher.open(str(folder))
        subprocess.run([*command, str(root)], check=True)
        assert Artifact.open(str(next(root.glob("index/next/*")))).digest == wanted.digest
    assert killed
