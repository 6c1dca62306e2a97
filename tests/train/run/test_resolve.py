"""What the driver checks of a run's tasks before any worker starts."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lookalike.artifacts import Artifact, Draft
from lookalike.config import parse_config
from lookalike.errors import ArtifactError, UsageError
from lookalike.stages import StageRun
from lookalike.train.run.resolve import expected_rows, resolve
from lookalike.train.run.settings import LoopConfig, TrainConfig
from lookalike.train.run.trainer import training_card
from lookalike.vision.encoder import EncoderConfig, build_model, save_encoder
from lookalike.vision.transforms import TransformConfig
from tests.train.conftest import shard_rows, write_shard


@pytest.fixture
def encoder(tmp_path: Path) -> Artifact:
    config = EncoderConfig(
        backbone="test_efficientnet", num_features=256, dims=(256,), transform=TransformConfig(size=32)
    )
    torch.manual_seed(0)
    draft = Draft(str(tmp_path / "root"), "encoder", "encoder", "5" * 20)
    save_encoder(draft, build_model(config), config, "# tiny\n")
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


def settle(shards: Artifact, encoder: Artifact, tasks: dict[str, Any], **values: Any) -> LoopConfig:
    config = {"tasks": tasks, "mix": {"catalogue": 1}, "embedding_dim": 8, "dims": [4, 8], "batch_size": 8, **values}
    train = parse_config(TrainConfig, config, "step 'finetune'")
    out = Draft(encoder.uri, "encoder", "tiny", "6" * 20)
    return resolve(StageRun(train, {"shards": [shards], "encoder": [encoder]}, out))


def test_tasks_without_classes_are_let_through_and_described(shards: Artifact, encoder: Artifact) -> None:
    tasks = {
        "views": {"kind": "contrastive", "field": "row"},
        "spread": {"kind": "koleo", "field": "images"},
        "category": {"kind": "softmax", "field": "category", "dims": [4]},
    }
    config = settle(shards, encoder, tasks, dims_per_step=1, loader={"views": 2})
    card = training_card("tiny", config, {})
    assert "- `views`: contrastive over `row`, mrl, weight 1.0" in card
    assert f"- `category`: softmax over {config.num_classes['category']} classes of `category`" in card
    assert LoopConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_task_s_dims_must_be_the_embedding_s(shards: Artifact, encoder: Artifact) -> None:
    with pytest.raises(UsageError, match=r"task 'c' has dims \[3\], but the embedding is nested at .*; drop 3 or"):
        settle(shards, encoder, {"c": {"kind": "softmax", "field": "category", "dims": [3]}})
    with pytest.raises(UsageError, match=r"dims \[8, 4\] must be positive and strictly increasing"):
        settle(shards, encoder, {"c": {"kind": "softmax", "field": "category", "dims": [8, 4]}})


def test_tasks_above_the_memory_given_are_refused(shards: Artifact, encoder: Artifact) -> None:
    tasks = {"c": {"kind": "normalized_softmax", "field": "group"}}
    settle(shards, encoder, tasks, compute={"task_memory_gib": 1.0})
    with pytest.raises(
        UsageError, match=r"need .* GiB a worker, more than compute.task_memory_gib 1e-06; the largest is 'c'"
    ):
        settle(shards, encoder, tasks, compute={"task_memory_gib": 1e-6})


@pytest.mark.parametrize(("field", "none"), [("category", -1), ("group", -1), ("labels", [])])
def test_a_task_without_a_label_in_the_mix_is_refused(tmp_path: Path, encoder: Artifact, field: str, none: Any) -> None:
    rows = shard_rows("catalogue", 16, 0)
    draft = Draft(str(tmp_path / "root"), "shards", "bare", "7" * 20)
    write_shard(draft.path("catalogue", "part-0.parquet"), [{**row, field: none} for row in rows], 4)
    write_shard(draft.path("full", "part-0.parquet"), rows, 4)
    draft.write_json("classes.json", {name: ["a", "b", "c", "d", "e"] for name in ("labels", "category", "group")})
    bare = draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)
    tasks = {"t": {"kind": "multilabel_softmax" if field == "labels" else "softmax", "field": field}}
    with pytest.raises(UsageError, match=rf"task 't' reads '{field}', and no row of catalogue has one; .*; or drop"):
        settle(bare, encoder, tasks)
    assert set(settle(bare, encoder, tasks, mix={"catalogue": 1, "full": 1}).files) == {"catalogue", "full"}


def test_repeat_factors_that_cannot_be_added_up_name_their_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "part-0.parquet")
    for column, words in (({"repeat": [1.0, float("nan")]}, "adds up to nan"), ({"image_id": ["a"]}, "cannot be read")):
        pq.write_table(pa.table(column), uri)
        with pytest.raises(ArtifactError, match=rf"part-0.parquet.*{words}.*run its stage again"):
            expected_rows([uri], resample=True)
