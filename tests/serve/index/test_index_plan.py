"""Index and plan stages on published artifacts, run as the command line runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lookalike import storage
from lookalike.config import parse_config
from lookalike.errors import ArtifactError, UsageError
from lookalike.retrieval.index_meta import shard_of
from lookalike.retrieval.plan import Plan, load_plan
from lookalike.retrieval.searcher import Searcher
from lookalike.retrieval.shard_meta import ShardMeta
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.serve.index.build import STAGE as INDEX
from lookalike.serve.index.build import IndexConfig, Segment, build_shard, place_segment, place_shard
from lookalike.serve.index.plan_stage import STAGE as PLAN
from lookalike.serve.index.plan_stage import PlanConfig, check_map, choose, measure_plans, sample_queries
from lookalike.serve.index.rows import collect_rows, read_source
from lookalike.stages import execute
from tests.synthetic import make_vectors, publish_embeddings

DIMS = [4, 8, 16, 32]
NUM, QUERIES = 600, 80
DATA, CLASSES = make_vectors(NUM + QUERIES, 32, num_classes=40, seed=11)
IDS = [f"img-{n * 7919 % 10_000:05d}" for n in range(NUM + QUERIES)]
GROUPS = [f"g{label}" for label in CLASSES]


def embeddings(root, name="db", rows=slice(0, NUM), data=DATA, **more):
    num = len(IDS[rows])
    columns = {
        "image_id": IDS[rows],
        "group": GROUPS[rows],
        "view": [("icon", "front")[n % 2] for n in range(num)],
        "split": ["test"] * num,
    } | more.pop("columns", {})
    return publish_embeddings(str(root), name, data[rows], columns, dims=DIMS, **more)


def query_embeddings(root, **more):
    return embeddings(root, "queries", slice(NUM, NUM + QUERIES), **more)


@pytest.fixture(scope="module")
def served(tmp_path_factory, ray_session):
    """(root, index artifact, plan artifact)."""
    root = tmp_path_factory.mktemp("root")
    index = execute(INDEX, IndexConfig(), {"embeddings": [embeddings(root)]}, str(root), "index")
    config = PlanConfig(target=0.95, shortlist_ks=(10, 40, 150), allow_single_stage=False, max_map_loss=1.0)
    plan = execute(PLAN, config, {"index": [index], "queries": [query_embeddings(root)]}, str(root), "plan")
    return root, index, plan


@pytest.mark.ray
def test_an_index_answers_exactly_by_brute_force(served):
    searcher = Searcher.open(served[1].uri)
    queries = DATA[NUM:]
    hits = searcher.search(queries, 10)
    unit = DATA[:NUM] / np.linalg.norm(DATA[:NUM], axis=1, keepdims=True)
    truth = np.argsort(-(queries @ unit.T), axis=1, kind="stable")[:, :10]
    assert [searcher.ids(row) for row in hits.rows] == [[IDS[n] for n in row] for row in truth]
    assert searcher.meta.model_fingerprint == "synthetic"
    assert searcher.meta.generation == served[1].manifest.fingerprint
    assert sum(searcher.meta.shard_rows) == searcher.meta.num_rows == NUM
    assert min(searcher.meta.shard_rows) > NUM / 4


@pytest.mark.ray
def test_rows_lie_in_the_shard_of_their_hash_sorted_and_can_be_found(served):
    searcher = Searcher.open(served[1].uri)
    assert [searcher.ids([row])[0] for row in searcher.find(IDS[:50])] == IDS[:50]
    assert searcher.find(["nobody"]).tolist() == [-1]
    for number, shard in enumerate(searcher.shards):
        ids = shard.store.table["image_id"].to_pylist()
        assert ids == sorted(ids)
        assert {shard_of(image_id, 2) for image_id in ids} == {number}
    facts = searcher.metadata(searcher.find(IDS[:1]))[0]
    assert facts == {"image_id": IDS[0], "group": GROUPS[0], "view": "icon", "split": "test"}
    unit = DATA[0] / np.linalg.norm(DATA[0])
    np.testing.assert_allclose(searcher.vectors(searcher.find(IDS[:1]))[0], unit, atol=1e-6)


@pytest.mark.ray
def test_the_plan_keeps_recall_and_map_and_is_among_the_candidates(served):
    facts = served[2].read_json("plan.json")
    chosen = facts["candidates"][facts["chosen"]]
    assert chosen["recall_low"] >= 0.95
    assert Plan.model_validate(facts["plan"]) == load_plan(served[2].uri)
    assert not load_plan(served[2].uri).is_exact
    assert facts["index"]["generation"] == served[1].manifest.fingerprint
    assert facts["candidates"][0]["recall"] == 1
    check = facts["map_check"]
    gap = 100 * (check["plan_map_at_10_by_k"] - check["exact_map_at_10_by_k"])
    assert check["difference_points"] == pytest.approx(gap)
    assert abs(gap) <= 1.0
    assert check["num_queries"] == QUERIES
    hits = Searcher.open(served[1].uri).search(DATA[NUM:], 10)
    labels = np.array([row["group"] for row in Searcher.open(served[1].uri).metadata(hits.rows)]).reshape(-1, 10)
    relevant = labels == np.array(GROUPS[NUM:])[:, None]
    truth = np.mean((relevant * np.cumsum(relevant, axis=1) / np.arange(1, 11)).sum(axis=1) / 10)
    assert check["exact_map_at_10_by_k"] == pytest.approx(truth)
    assert storage.read_bytes(served[2].path("plan.png")).startswith(b"\x89PNG")
    assert all(
        candidate["ram_mb"] > 0 and candidate["p99_us"] > 0 and candidate["breaks"] == []
        for candidate in facts["candidates"]
    )
    assert served[2].manifest.stats["ram_mb"] == chosen["ram_mb"]


@pytest.mark.ray
def test_a_cheaper_plan_of_several_stages_loses_recall_or_map(served):
    facts, searcher = served[2].read_json("plan.json"), Searcher.open(served[1].uri)
    records = [{"image_id": image_id, "group": group} for image_id, group in zip(IDS[NUM:], GROUPS[NUM:], strict=True)]
    candidates = [(row["model_us"], place, row) for place, row in enumerate(facts["candidates"])]
    good = [row for row in candidates if row[2]["recall_low"] >= 0.95 and not row[2]["plan"]["scan"]]
    assert facts["stages"]["several_stages"] == min(good)[1]
    for cost, place, row in good:
        if (cost, place) < (facts["candidates"][facts["chosen"]]["model_us"], facts["chosen"]):
            check = check_map(searcher, DATA[NUM:], records, Plan.model_validate(row["plan"]), label="group", k=10)
            assert abs(check["difference_points"]) > 1.0


@pytest.mark.ray
def test_a_target_that_no_two_stage_plan_reaches_is_said_and_answered_exactly(served, caplog):
    searcher = Searcher.open(served[1].uri)
    config = PlanConfig(target=1.0, shortlist_ks=(1,), k=1, funnels=False, label=None, allow_single_stage=False)
    own = np.full(QUERIES, -1)
    measured = measure_plans(searcher, DATA[NUM:], own, config)
    assert max(candidate.recall_low for candidate in measured[1:]) < 1.0
    place, checked = choose(searcher, DATA[NUM:], [], measured, config)
    assert (place, checked) == (0, None)
    assert "no two-stage plan" in caplog.text
    assert "scan_dims" in caplog.text


@pytest.mark.ray
def test_limits_of_memory_and_time_leave_plans_out_or_are_said_to_be_too_tight(served, caplog):
    searcher, own = Searcher.open(served[1].uri), np.full(QUERIES, -1)
    free = PlanConfig(target=0.9, shortlist_ks=(40, 150), label=None, funnels=False, time_repeats=1)
    measured = measure_plans(searcher, DATA[NUM:], own, free)
    place, _ = choose(searcher, DATA[NUM:], [], measured, free)
    sizes = sorted({candidate.ram_mb for candidate in measured})
    tight = free.model_copy(update={"max_ram_mb": sizes[1]})
    fitting = measure_plans(searcher, DATA[NUM:], own, tight)
    assert [bool(candidate.breaks) for candidate in fitting] == [candidate.ram_mb > sizes[1] for candidate in fitting]
    chosen, _ = choose(searcher, DATA[NUM:], [], fitting, tight)
    assert fitting[chosen].ram_mb <= sizes[1]
    assert measured[place].model_us <= fitting[chosen].model_us
    hopeless = free.model_copy(update={"max_p99_ms": 1e-6, "max_ram_mb": 1e-6})
    with pytest.raises(UsageError, match=r"comes nearest.*p99 .* limit 1e-06 ms.*what helps: .*more shards"):
        choose(searcher, DATA[NUM:], [], measure_plans(searcher, DATA[NUM:], own, hopeless), hopeless)
    assert "few queries for a 99th percentile" in caplog.text


@pytest.mark.ray
def test_the_same_inputs_give_the_same_files_and_the_same_plan(served, tmp_path):
    root, index, plan = served
    inputs = {"embeddings": [embeddings(root, num_parts=5)]}
    again = execute(INDEX, IndexConfig(batch_rows=37), inputs, str(tmp_path), "i")
    assert {f.path: f.sha256 for f in again.manifest.files} == {f.path: f.sha256 for f in index.manifest.files}
    config = PlanConfig(**plan.manifest.config)
    inputs = {"index": [index], "queries": [query_embeddings(root)]}
    second = execute(PLAN, config, inputs, str(tmp_path), "plan").read_json("plan.json")
    first = plan.read_json("plan.json")
    timed = {"query_us", "p99_us", "batch_us", "exact_ratio"}
    for before, after in zip(first["candidates"], second["candidates"], strict=True):
        assert {k: v for k, v in before.items() if k not in timed} == {k: v for k, v in after.items() if k not in timed}
    assert first["plan"] == second["plan"]


@pytest.mark.ray
def test_a_filter_keeps_only_its_rows_and_a_plan_takes_only_its_queries(served, tmp_path):
    root = served[0]
    inputs = {"embeddings": [embeddings(root)]}
    index = execute(INDEX, IndexConfig(where={"view": ["icon"]}, num_shards=3), inputs, str(tmp_path), "i")
    searcher = Searcher.open(index.uri)
    assert searcher.meta.num_rows == NUM // 2
    assert set(searcher.column("view")) == {"icon"}
    config = PlanConfig(where={"view": ["front"]}, shortlist_ks=(20,), funnels=False, label=None)
    plan = execute(PLAN, config, {"index": [index], "queries": [query_embeddings(root)]}, str(tmp_path), "p")
    assert plan.read_json("plan.json")["num_queries"] == QUERIES // 2


@pytest.mark.ray
def test_finished_shards_are_kept_and_half_ones_built_again(served, tmp_path):
    index = served[1]
    source = read_source(embeddings(served[0]), {})
    config, meta = IndexConfig(), Searcher.open(index.uri).shards[0].meta
    folder, scratch = str(tmp_path / "shard"), str(tmp_path / "scratch")
    os.makedirs(folder)
    Path(folder, "block-00000-00004.npy").write_bytes(b"half")
    os.makedirs(f"{scratch}/00000-dead")
    segment = Segment("shard-00000", 0, meta)
    place_segment(source, config, None, segment, (folder, scratch))
    names = sorted(os.listdir(folder))
    wanted = {f.path.removeprefix("shard-00000/"): f.sha256 for f in index.manifest.files if "shard-00000/" in f.path}
    assert {name: storage.sha256(f"{folder}/{name}") for name in names} == wanted
    before = os.stat(f"{folder}/norms.npy").st_mtime_ns
    assert place_segment(source, config, None, segment, (folder, scratch)) == meta
    assert os.stat(f"{folder}/norms.npy").st_mtime_ns == before


KILLED = """
import os, sys
from lookalike.artifacts import Artifact
from lookalike.serve.index import build as module
from lookalike.stages import execute
original = module.build_shard
module.map_tasks = lambda function, arguments, _: [function(*values) for values in arguments]
def build(source, config, meta, shard, folder, *, only):
    if shard == 1:
        open(folder + "/block-00000-00004.npy", "wb").write(b"half")
        os.kill(os.getpid(), 9)
    return original(source, config, meta, shard, folder, only=only)
module.build_shard = build
execute(module.STAGE, module.IndexConfig(), {"embeddings": [Artifact.open(sys.argv[1])]}, sys.argv[2], "index")
"""


@pytest.mark.ray
def test_kill_9_in_the_middle_and_run_again_gives_the_same_index(served, tmp_path):
    parent = embeddings(served[0])
    run = subprocess.run([sys.executable, "-c", KILLED, parent.uri, str(tmp_path)], check=False, capture_output=True)
    assert run.returncode == -9, run.stderr.decode()
    draft = next((tmp_path / "index" / "index").iterdir())
    assert (draft / "shard-00000" / "shard.json").exists()
    assert not (draft / "manifest.json").exists()
    stamp = (draft / "shard-00000" / "norms.npy").stat().st_mtime_ns
    again = execute(INDEX, IndexConfig(), {"embeddings": [parent]}, str(tmp_path), "index")
    assert again.digest == served[1].digest
    assert (draft / "shard-00000" / "norms.npy").stat().st_mtime_ns == stamp
    assert not (draft / "_work").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortlist_dims": (8, 2048)}, r"shortlist_dims \[8, 2048\] exceed the model's 32; drop \[2048\]"),
        ({"dims": (8, 64)}, r"dims \[8, 64\] exceed the model's 32"),
        ({"shortlist_dims": (12,)}, r"\[12\] are not among the index's dims"),
        ({"shortlist": "hsnw"}, "did you mean 'hnsw'"),
        ({"where": {"colour": ["red"]}}, "columns \\['colour'\\]"),
        ({"where": {"view": ["Icon"]}}, "keeps none of the 600"),
    ],
)
def test_wrong_settings_are_refused_and_publish_nothing(served, tmp_path, settings, message):
    def build() -> None:
        config = parse_config(IndexConfig, settings, "index")
        execute(INDEX, config, {"embeddings": [embeddings(served[0])]}, str(tmp_path), "index")

    with pytest.raises(UsageError, match=message):
        build()
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.ray
def test_bad_vectors_and_duplicate_ids_are_refused_by_name(served, tmp_path):
    broken = DATA[:NUM].copy()
    broken[17, 3] = np.nan
    with pytest.raises(ArtifactError, match=f"{IDS[17]!r}.*NaN"):
        execute(INDEX, IndexConfig(), {"embeddings": [embeddings(tmp_path, data=broken)]}, str(tmp_path), "index")
    twice = embeddings(tmp_path, "twice", columns={"image_id": [*IDS[: NUM - 1], IDS[0]]})
    with pytest.raises(ArtifactError, match=f"{IDS[0]!r} occurs twice"):
        execute(INDEX, IndexConfig(), {"embeddings": [twice]}, str(tmp_path), "index2")


@pytest.mark.ray
def test_queries_of_another_model_are_refused(served, tmp_path):
    other = query_embeddings(tmp_path, encoder="another")
    with pytest.raises(UsageError, match=r"another .*synthetic"):
        execute(PLAN, PlanConfig(), {"index": [served[1]], "queries": [other]}, str(tmp_path), "plan")


def test_float16_embeddings_are_read_like_float32_ones(tmp_path):
    half = DATA.astype(np.float16)
    sources = [
        read_source(embeddings(tmp_path, name, data=data), {})
        for name, data in (("half", half), ("full", half.astype(np.float32)))
    ]
    places = np.array([0, 5, 299])
    read = [np.vstack([values for _, values in source.vectors(source.parts[0], places, 64)]) for source in sources]
    np.testing.assert_array_equal(read[0], read[1])
    np.testing.assert_array_equal(read[0], half[places].astype(np.float32))


def test_a_shard_can_be_built_for_a_remote_root_and_read_from_it(tmp_path):
    source = read_source(embeddings(tmp_path), {})
    table = collect_rows(source, 0, 2)[0]
    meta = ShardMeta(num_rows=len(table), row_offset=0, dims=DIMS, shortlist="flat", shortlist_dims=(8,))
    uri = "memory://lookalike-test/shard"
    place_shard(source, IndexConfig(), meta, 0, (uri, "memory://lookalike-test/scratch"))
    local = tmp_path / "local"
    local.mkdir()
    build_shard(source, IndexConfig(), meta, 0, str(local))
    plan = Plan(shortlist_dim=8, shortlist_k=30, rerank_dim=32)
    answers = [ShardSearcher.open(place).search(DATA[NUM:], 5, plan) for place in (uri, str(local))]
    np.testing.assert_array_equal(answers[0].rows, answers[1].rows)


def test_sampled_queries_do_not_depend_on_parts_and_carry_their_vectors(tmp_path):
    samples = [sample_queries(read_source(embeddings(tmp_path, f"p{n}", num_parts=n), {}), 25, 3) for n in (1, 4)]
    np.testing.assert_array_equal(samples[0][0], samples[1][0])
    assert samples[0][1] == samples[1][1]
    ids = [record["image_id"] for record in samples[0][1]]
    assert len(set(ids)) == 25
    np.testing.assert_array_equal(samples[0][0], DATA[[IDS.index(image_id) for image_id in ids]])
