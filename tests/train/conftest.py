"""Tiny training shards: coloured pictures with labels, published by hand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.schemas import SHARD
from lookalike.stages import StageRun
from lookalike.train.run.initialise import build_multitask_model
from lookalike.train.run.loop import Place, run_steps
from lookalike.train.run.resolve import resolve
from lookalike.train.run.settings import LoopConfig, TrainConfig
from lookalike.train.run.state import Training
from lookalike.vision.encoder import EncoderConfig, build_model, save_encoder, to_bytes
from lookalike.vision.transforms import TransformConfig

NUM_CLASSES = {"labels": 5, "category": 3, "group": 4}


def shard_rows(dataset: str, num: int, seed: int, repeat: float = 1.0) -> list[dict[str, Any]]:
    """``num`` rows: the colour follows the group, every third row has no category, every fourth no group."""
    random, rows = np.random.default_rng(seed), []
    for i in range(num):
        group = i % NUM_CLASSES["group"]
        pixels = np.clip(random.normal(40 + 50 * group, 30, (24, 20, 3)), 0, 255).astype(np.uint8)
        rows.append(
            {
                "image_id": f"{dataset}-{i:03d}",
                "image": to_bytes(Image.fromarray(pixels)),
                "dataset": dataset,
                "labels": sorted(
                    random.choice(NUM_CLASSES["labels"], int(random.integers(0, 4)), replace=False).tolist()
                ),
                "category": -1 if i % 3 == 2 else i % 3,
                "group": -1 if i % 4 == 3 else group,
                "repeat": repeat,
            }
        )
    return rows


def write_shard(path: str, rows: list[dict[str, Any]], rows_per_group: int) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SHARD), path, row_group_size=rows_per_group)
    return path


def publish_shards(root: str, num: int = 40) -> Artifact:
    """A ``shards`` artifact of two data sets, four row groups each."""
    draft = Draft(root, "shards", "shards", "5" * 20)
    for i, dataset in enumerate(("catalogue", "clipart")):
        write_shard(storage.join(draft.uri, dataset, "part-00000.parquet"), shard_rows(dataset, num, seed=i), num // 4)
    draft.write_json("classes.json", {name: [str(i) for i in range(n)] for name, n in NUM_CLASSES.items()})
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


@pytest.fixture
def shards(tmp_path: Path) -> Artifact:
    return publish_shards(str(tmp_path / "root"))


def publish_encoder(root: str, backbone: str = "test_efficientnet", size: int = 32) -> Artifact:
    """An ``encoder`` artifact with random weights."""
    torch.manual_seed(0)
    config = EncoderConfig(
        backbone=backbone, num_features=WIDTHS[backbone], dims=(WIDTHS[backbone],), transform=TransformConfig(size=size)
    )
    draft = Draft(root, "encoder", "encoder", "5" * 20)
    save_encoder(draft, build_model(config), config, "# tiny\n")
    return draft.publish(config={}, parents={}, stage_version=1, duration_s=0.0)


INPUTS = ("shards", "encoder")
WIDTHS = {"test_efficientnet": 256, "test_vit": 64, "test_resnet": 256}
TASKS = {
    "weak": {"kind": "multilabel_softmax", "field": "labels"},
    "category": {"kind": "softmax", "field": "category", "nesting": "mrl-e"},
    "identity": {"kind": "normalized_softmax", "field": "group"},
}


@dataclass
class Bench:
    """A root with shards and an encoder, on which training runs in this process, without Ray."""

    root: str

    def config(self, **settings: Any) -> LoopConfig:
        """A resolved run: 12 steps of 8 images unless ``settings`` say otherwise."""
        values = {
            "tasks": TASKS,
            "mix": {"catalogue": 3, "clipart": 1},
            "embedding_dim": 8,
            "dims": [2, 4, 8],
            "epochs": 1.8,
            "batch_size": 8,
            "workers": {"num": 1},
            "initialise": {"method": "random"},
            "checkpoint_every": 4,
            **settings,
        }
        return resolve(self.run(TrainConfig.model_validate(values)))

    def run(self, train: TrainConfig, **more: Artifact) -> StageRun[TrainConfig]:
        """What a stage's function gets; ``more`` are inputs besides the two."""
        inputs = {kind: [Artifact.open(f"{self.root}/{kind}/{kind}/{'5' * 20}", kind)] for kind in INPUTS}
        inputs.update({name: [artifact] for name, artifact in more.items()})
        return StageRun(train, inputs, Draft(self.root, "encoder", "tiny", "6" * 20))

    def begin(self, config: LoopConfig) -> Training:
        """A model before its first step."""
        torch.manual_seed(1)
        return Training.begin(build_multitask_model(config, initialise=True), config.train, config.total_steps)

    def train(self, config: LoopConfig, folder: Path, training: Training | None = None) -> Training:
        """Run all steps that are left."""
        training = training or self.begin(config)
        run_steps(training, training.model, Place(config, 0, 1, torch.device("cpu"), str(folder)))
        return training


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    root = str(tmp_path / "root")
    publish_shards(root)
    publish_encoder(root)
    return Bench(root)
