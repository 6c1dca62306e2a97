"""What a later step needs is checked before the first step runs."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lookalike.cli import main
from lookalike.data.corpus import CorpusConfig
from lookalike.data.sources.survey import survey_corpus, survey_sources
from lookalike.errors import UsageError
from lookalike.outlook import Outlook
from lookalike.recipe import Recipe
from tests.data.conftest import make_rows, publish_corpus

ROWS: list[dict[str, Any]] = [
    {
        "image_id": f"{number}",
        "category": ("chair", "table", None)[number % 3],
        "group": None if number % 2 else f"p{number % 6}",
        "split": "train" if number < 20 else "test",
        "view": "front",
        "attributes": {"colour": ("red", "blue")[number % 2], "maker": "one"},
    }
    for number in range(30)
]


def recipe(tmp_path: Path, changes: Mapping[str, Any] | None = None, rows: list[dict[str, Any]] = ROWS) -> Recipe:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({**row, "image_uri": "a.png"}) for row in rows))
    source = {"uri": f"{tmp_path}/rows.jsonl", "format": "jsonl", "dataset": "d"}
    evaluation = {"queries": {"split": ["test"]}, "database": {"split": ["train"]}, "label": "group"}
    tasks = {
        "category": {"kind": "softmax", "field": "category"},
        "identity": {"kind": "softmax", "field": "group"},
        "colour": {"kind": "softmax", "field": "attribute.colour"},
        "weak": {"kind": "multilabel_softmax", "field": "labels"},
    }
    steps: dict[str, Any] = {
        "corpus": {"stage": "corpus", "settings": {"sources": [source]}},
        "base": {"stage": "encoder", "settings": {"backbone": "test_efficientnet", "transform": {"size": 32}}},
        "vectors": {"stage": "embed", "inputs": {"corpus": "corpus", "encoder": "base"}, "settings": {}},
        "labels": {"stage": "labels", "inputs": {"corpus": "corpus", "embeddings": "vectors"}, "settings": {}},
        "shards": {"stage": "shards", "inputs": {"corpus": "corpus", "labels": "labels"}, "settings": {}},
        "finetune": {
            "stage": "finetune",
            "inputs": {"shards": "shards", "encoder": "base"},
            "settings": {"tasks": tasks, "mix": {"d": 1}},
        },
        "evaluate": {
            "stage": "evaluate",
            "inputs": {"embeddings": ["vectors"]},
            "settings": {"dims": [8], "tasks": {"product": evaluation}},
        },
        "index": {"stage": "index", "inputs": {"embeddings": "vectors"}, "settings": {}},
        "plan": {"stage": "plan", "inputs": {"index": "index", "queries": "vectors"}, "settings": {}},
    }
    for key, value in (changes or {}).items():
        name, *path = key.split(".")
        place = steps[name]["settings"]
        for part in path[:-1]:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[path[-1]] = value
    values = {"name": "r", "root": f"{tmp_path}/runs", "steps": steps}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return Recipe.load(f"{tmp_path}/recipe.yaml")


GOOD: list[dict[str, Any]] = [
    {},
    {"shards.categories": "grouped"},
    {"vectors.where": {"split": ["test", "train", "val"]}},
    {"evaluate.tasks.product.label": "category"},
    {"evaluate.svd_of": ["vectors"]},
    {"plan.where": {"view": ["front"]}, "index.where": {"dataset": ["d"]}},
    {"corpus.sources.0.columns": {"split": None}, "evaluate.tasks.product.queries": {"split": ["train"]}},
    {"corpus.sources.0.columns": {"split": None}, "corpus.sources.0.test_fraction": 0.2},
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"finetune.mix": {"dd": 1}}, r"step 'finetune': mix names dataset 'dd' .* shards will have 'd'; name one"),
    (
        {"finetune.tasks.x": {"kind": "softmax", "field": "attribute.color"}},
        r"step 'finetune': tasks.x.field is 'attribute.color', .*did you mean 'colour'.* there will be 'colour'; map",
    ),
    (
        {"finetune.tasks.x": {"kind": "softmax", "field": "attribute.maker"}},
        r"no attribute 'maker'; there will be 'colour'; map",
    ),
    ({"shards.categories": "none"}, r"step 'finetune': tasks.category.field is 'category', .* 0 classes .* all \(gr"),
    (
        {"shards.min_images_per_category": 11},
        r"will have 0 classes of it \(none\); .* min_images_per_category, or",
    ),
    (
        {"corpus.sources.0.columns": {"group": None}},
        r"tasks.identity.field is 'group', and .* 0 classes .* column of",
    ),
    (
        {"evaluate.tasks.product.queries": {"split": ["TRAIN"]}},
        r"step 'evaluate': tasks.product.queries.split is \['T",
    ),
    ({"evaluate.tasks.product.database": {"splt": ["train"]}}, r"database names column 'splt' \(did you mean 'sp"),
    (
        {"evaluate.tasks.product.label": "colour"},
        r"tasks.product.label names column 'colour'; there are image_id",
    ),
    (
        {"vectors.where": {"view": ["back"]}},
        r"step 'vectors': where.view is \['back'\], .* there will be 'front'",
    ),
    (
        {"vectors.where": {"split": ["train"]}},
        r"step 'evaluate': tasks.product.queries.split is \['test'\], .* there will be 'train'; name",
    ),
    ({"evaluate.svd_of": ["vector"]}, r"svd_of names \['vector'\] \(did you mean 'vectors'\?\); the embeddings are"),
    ({"evaluate.svd_of": ["vectors"], "evaluate.svd_fit": {"split": ["Train"]}}, r"svd_fit.split is \['Train'\], and"),
    ({"plan.where": {"view": ["icon"]}}, r"step 'plan': where.view is \['icon'\], and no row"),
    ({"index.where": {"colour": ["red"]}}, r"step 'index': where names column 'colour'; there are image_id"),
    (
        {"corpus.sources.0.columns": {"split": None}, "corpus.sources.0.constants": {"split": "TRAIN"}},
        r"step 'labels': labels are made from rows whose split is 'train', .* there will be 'TRAIN'; rename",
    ),
    (
        {"labels.dictionary": {"boundary_from": {"criterion": "retrieval"}}},
        r"step 'labels': dictionary.boundary_from.split is \['val'\], and no row .* 'test', 'train'; name",
    ),
]


@pytest.mark.parametrize("changes", GOOD)
def test_what_can_work_passes(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe(tmp_path, changes).foresee()


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_work_is_refused_first(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(tmp_path, changes).foresee()


def test_evaluation_of_a_label_that_no_row_has_and_rows_without_a_group(tmp_path: Path) -> None:
    rows = [{**row, "group": None} for row in ROWS]
    with pytest.raises(UsageError, match=r"tasks.identity.field is 'group', and the shards will have 0 classes"):
        recipe(tmp_path, rows=rows).foresee()
    tasks = {"category": {"kind": "softmax", "field": "category"}}
    with pytest.raises(UsageError, match=r"tasks.product.label is 'group', and no row will have a group; map the sou"):
        recipe(tmp_path, {"finetune.tasks": tasks}, rows).foresee()
    same = {"finetune.tasks": tasks, "evaluate.tasks.product.label": "category"}
    recipe(tmp_path, same, rows).foresee()
    with pytest.raises(UsageError, match=r"tasks.category.field is 'category', .* 0 classes .* set categories: all"):
        recipe(tmp_path, {**same, "shards.categories": "grouped"}, rows).foresee()


def test_a_task_that_compares_rows_needs_a_class_with_two(tmp_path: Path) -> None:
    alone = [{**row, "group": f"g{number}"} for number, row in enumerate(ROWS)]
    changes = {"finetune.tasks": {"t": {"kind": "triplet", "field": "group"}}}
    with pytest.raises(UsageError, match=r"tasks.t compares rows of one group, and each of the 30 will have one row"):
        recipe(tmp_path, changes, alone).foresee()
    recipe(tmp_path, {**changes, "finetune.loader": {"views": 2}}, alone).foresee()
    recipe(tmp_path, changes, [*alone[1:], {**alone[0], "group": "g1"}]).foresee()


RECIPES = Path(__file__).parents[1] / "deploy" / "recipes"
WITH_DATA = ["quickstart", "learning", "openclipart", "table2", *(path.stem for path in RECIPES.glob("*smoke.yaml"))]


@pytest.mark.parametrize("name", WITH_DATA)
def test_recipes_over_the_sample_corpora_pass(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parents[1])
    Recipe.load(str(RECIPES / f"{name}.yaml"), f"root={tmp_path}").foresee()


def test_a_task_on_labels_is_refused_where_words_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parents[1])
    changes = [f"root={tmp_path}", "labels.words=false"]
    with pytest.raises(UsageError, match=r"step 'pretrain': tasks.weak.field is 'labels'.*0 classes.*set words: true"):
        Recipe.load(str(RECIPES / "smoke.yaml"), changes).foresee()


def test_the_command_line_refuses_with_exit_2_in_a_dry_run_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(tmp_path, {"evaluate.tasks.product.label": "colour"})
    for verb, more in (("run", []), ("run", ["--dry-run"]), ("evaluate", ["--dry-run"]), ("variants", [])):
        assert main([verb, f"{tmp_path}/recipe.yaml", *more]) == 2
        assert "step 'evaluate': tasks.product.label names column 'colour'" in capsys.readouterr().err
    assert main(["embed", f"{tmp_path}/recipe.yaml", "--dry-run"]) == 0  # reads nothing that is wrong
    assert not (tmp_path / "runs").exists()


def count_plainly(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        for name in ("split", "view", "category", "group"):
            if row[name] is not None:
                counts.setdefault(name, {}).setdefault(row[name], 0)
                counts[name][row[name]] += 1
    return counts


def as_parquet(folder: Path) -> str:
    table = pa.Table.from_pylist([{**row, "image": b"", "attributes": list(row["attributes"].items())} for row in ROWS])
    pairs = [[{"name": k, "value": v} for k, v in row["attributes"].items()] for row in ROWS]
    table = table.drop_columns(["attributes"]).append_column("attributes", pa.array(pairs))
    pq.write_table(table, folder / "rows.parquet", row_group_size=7)
    return "rows.parquet"


def as_csv(folder: Path) -> str:
    lines = ["image_id,image_uri,category,group,split,view,attributes"]
    for row in ROWS:
        cells = [row["image_id"], "a.png", row["category"], row["group"], row["split"], row["view"]]
        quoted = json.dumps(row["attributes"]).replace('"', '""')
        lines.append(",".join(cell or "" for cell in cells) + f',"{quoted}"')
    (folder / "rows.csv").write_text("\n".join(lines))
    return "rows.csv"


def as_webdataset(folder: Path) -> str:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for row in ROWS:
            for ending, content in (("png", b"x"), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{row['image_id']}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return "rows.tar"


@pytest.mark.parametrize("write", [as_parquet, as_csv, as_webdataset])
def test_sources_of_each_format_are_surveyed_alike(tmp_path: Path, write: Callable[[Path], str]) -> None:
    name = write(tmp_path)
    kind = {"rows.tar": "webdataset"}.get(name, name.partition(".")[2])
    source = {"uri": f"{tmp_path}/{name}", "format": kind, "dataset": "d"}
    found = survey_sources([CorpusConfig.model_validate({"sources": [source]}).reader(0)])
    assert {column: dict(found[column]) for column in ("split", "view", "category", "group")} == count_plainly(ROWS)
    assert found["attribute.colour"] == {"red": 15, "blue": 15}
    assert found["attribute"] == {"colour": 30, "maker": 30}
    assert found["dataset"] == {"d": 30}


def test_a_published_corpus_tells_what_its_rows_hold(tmp_path: Path) -> None:
    rows = make_rows(60)
    corpus = publish_corpus(str(tmp_path), rows, 2)
    outlook: Outlook = survey_corpus(corpus)
    expected = count_plainly(rows)
    assert {name: dict(outlook[name]) for name in expected} == expected
