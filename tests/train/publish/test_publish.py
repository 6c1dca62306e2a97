"""The encoder stage: it publishes backbones, and takes exported encoders back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from lookalike.artifacts import Artifact
from lookalike.cli import main
from lookalike.config import parse_config
from lookalike.errors import ArtifactError, UsageError
from lookalike.stages import execute
from lookalike.train.publish.encoder import STAGE, PublishConfig, is_exported
from lookalike.vision.backbones import timm
from lookalike.vision.encoder import Encoder, read_config
from tests.train.encoders import draw, publish_encoder

IMAGES = [draw(n) for n in range(3)]


def publish(root: Path, **values: Any) -> Artifact:
    settings = {"backbone": "test_efficientnet", **values}
    return execute(STAGE, parse_config(PublishConfig, settings, "step"), {}, str(root), "base")


@pytest.fixture
def exported(tmp_path: Path) -> str:
    artifact = publish_encoder(str(tmp_path / "root"))
    assert main(["export", artifact.uri, "--to", str(tmp_path / "out")]) == 0
    return str(tmp_path / "out")


def test_an_exported_encoder_comes_back_with_projection_dims_and_transform(exported: str, tmp_path: Path) -> None:
    artifact = publish(tmp_path / "new", weights=exported)
    assert np.array_equal(Encoder.load(artifact).encode(IMAGES), Encoder.load(exported).encode(IMAGES))
    assert read_config(artifact) == read_config(Artifact.open(exported))
    card = Path(artifact.path("README.md")).read_text()
    assert f"Imported from `{exported}`, fingerprint `{'e' * 20}`." in card
    assert "Trained on nothing at all." in card
    assert publish(tmp_path / "new", weights=exported).manifest == artifact.manifest  # skipped


def test_other_content_at_the_same_place_is_published_anew(exported: str, tmp_path: Path) -> None:
    first = publish(tmp_path / "new", weights=exported)
    again = publish_encoder(str(tmp_path / "root2"), dims=(8, 16))
    assert main(["export", again.uri, "--to", exported]) == 0
    second = publish(tmp_path / "new", weights=exported)
    assert second.manifest.fingerprint != first.manifest.fingerprint
    assert read_config(second).dims == (8, 16)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backbone": "test_vit"}, r"has backbone=test_efficientnet, not test_vit; give its own"),
        ({"transform": {"size": 64}}, r"has transform=.*'size': 32.*give its own transform or none"),
        ({"pooling": "gem"}, r"has pooling=native, not gem"),
    ],
)
def test_settings_that_contradict_an_exported_encoder_are_refused(
    exported: str, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        publish(tmp_path / "new", **{"weights": exported, **values})


def test_a_folder_that_is_no_encoder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/file.txt").write_text("x")
    with pytest.raises(ArtifactError, match="no artifact at"):
        publish(tmp_path / "new", weights=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("random", False),
        ("timm:a1_in1k", False),
        ("efficientnet-lite0", False),
        ("/a/model.safetensors", False),
        ("model.pth", False),
        ("/a/folder", True),
        ("hf://owner/name", True),
        ("hf://owner/name@main", True),
    ],
)
def test_what_counts_as_an_exported_encoder(weights: str, expected: bool) -> None:
    assert is_exported(weights) is expected


def transform_of(artifact: Artifact) -> tuple[int, str, float, str, float]:
    own = read_config(artifact).transform
    return own.size, own.fit, own.crop_fraction, own.interpolation, own.mean[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"backbone": "test_efficientnet"}, (160, "pad", 0.95, "bicubic", 0.485)),
        ({"backbone": "test_resnet"}, (160, "pad", 0.95, "bilinear", 0.5)),
        (
            {"backbone": "test_resnet", "transform": {"size": 64, "interpolation": "bicubic", "fit": "crop"}},
            (64, "crop", 0.95, "bicubic", 0.5),
        ),
        (
            {"backbone": "test_resnet", "transform": {"mean": [0.1, 0.2, 0.3], "crop_fraction": 0.8}},
            (160, "pad", 0.8, "bilinear", 0.1),
        ),
    ],
)
def test_the_transform_is_the_weights_own_but_for_what_is_set(
    tmp_path: Path, values: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    """Expected: timm's configuration of these models, by hand."""
    assert transform_of(publish(tmp_path, **values)) == expected


def test_a_file_of_weights_brings_the_transform_beside_it(tmp_path: Path) -> None:
    """timm pushes ``model.safetensors`` with a ``config.json``; our export writes one in a form of its own."""
    (tmp_path / "a").mkdir()
    file = str(tmp_path / "a/model.safetensors")
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), file)
    alone = publish(tmp_path, backbone="test_resnet", weights=file)
    assert transform_of(alone) == (160, "pad", 0.95, "bilinear", 0.5)
    trained = {"input_size": [3, 96, 96], "crop_pct": 1.15, "interpolation": "bicubic", "mean": [0.4, 0.4, 0.4]}
    (tmp_path / "a/config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": trained}))
    beside = publish(tmp_path, backbone="test_resnet", weights=file)
    assert transform_of(beside) == (96, "pad", 1.0, "bicubic", 0.4)  # more than the whole picture is the whole
    (tmp_path / "a/config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config.json is no JSON .*; mend or remove it"):
        publish(tmp_path, backbone="test_resnet", weights=file)


def test_a_backbone_out_of_an_exported_encoder_keeps_its_transform(exported: str, tmp_path: Path) -> None:
    artifact = publish(tmp_path / "new", weights=f"{exported}/model.safetensors")
    assert read_config(artifact).transform == read_config(Artifact.open(exported)).transform


def test_weights_for_pictures_that_are_no_squares_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'vit_base_patch16_sapiens2' was trained on 768 x 1024 px, and encoders"):
        publish(tmp_path, backbone="vit_base_patch16_sapiens2")


def test_size_and_pooling_shape_the_encoder(tmp_path: Path) -> None:
    vit = publish(tmp_path, backbone="vit_tiny_patch16_224", transform={"size": 64})
    assert Encoder.load(vit).encode(IMAGES).shape == (3, 192)
    gem = publish(tmp_path, backbone="test_resnet", pooling="gem", transform={"size": 64})
    assert read_config(gem).pooling == "gem"
    assert np.isfinite(Encoder.load(gem).encode(IMAGES)).all()


def test_a_dry_run_says_what_the_backbone_is_and_refuses_one_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nsteps: {base: {stage: encoder, settings: {backbone: test_efficientnet}}}\n")
    made = publish(tmp_path)
    assert main(["encoder", str(recipe), "--dry-run", f"root={tmp_path}/other"]) == 0
    assert f"{made.stats['parameters']:,} parameters, {made.stats['dim']}-d features" in capsys.readouterr().out
    assert main(["encoder", str(recipe), "--dry-run", "root=x", "base.backbone=resnet5000"]) == 2
    assert "unknown backbone 'resnet5000'" in capsys.readouterr().err


def test_a_configuration_written_before_there_was_pooling_still_loads(tmp_path: Path) -> None:
    transform = {"size": 32, "fit": "pad", "crop_fraction": 0.875, "mean": [0.5] * 3, "std": [0.5] * 3}
    old = {
        "backbone": "test_efficientnet",
        "num_features": 256,
        "dims": [256],
        "projection": False,
        "transform": transform,
    }
    from lookalike.vision.encoder import EncoderConfig

    assert parse_config(EncoderConfig, old, "config.json").pooling == "native"
