"""Backbones: names, weights that fit or do not, and the packaged weights against timm's whole model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lookalike.errors import UsageError
from lookalike.vision.backbones import WEIGHTS, create_backbone, is_weight_file, timm


def test_an_unknown_backbone_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown backbone 'resnet5O' \(did you mean 'resnet50'\?\); timm knows"):
        create_backbone("resnet5O")


def test_unknown_weights_list_the_valid_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown weights 'eficientnet-lite0' \(did you mean 'efficientnet-lite0'"):
        create_backbone("test_efficientnet", "eficientnet-lite0")


def test_named_weights_of_another_architecture_are_refused() -> None:
    with pytest.raises(UsageError, match=r"fit 'tf_efficientnet_lite0', not 'test_vit'; set backbone=tf_efficientnet"):
        create_backbone("test_vit", "efficientnet-lite0")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    source = timm.create_model("test_efficientnet", pretrained=False)  # with its classifier
    path = str(tmp_path / f"w.{suffix}")
    if suffix == "pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    backbone = create_backbone("test_efficientnet", path).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(images), source.eval().forward_head(source.forward_features(images), True))
    with pytest.raises(UsageError, match=r"do not fit 'test_vit': .* tensors are missing or of another shape, first"):
        create_backbone("test_vit", path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_efficientnet", pretrained=False).state_dict()
    state["conv_stem.weight"] = state["conv_stem.weight"][:, :1]
    torch.save(state, tmp_path / "grey.pth")
    with pytest.raises(UsageError, match=r"first 'conv_stem.weight'"):
        create_backbone("test_efficientnet", str(tmp_path / "grey.pth"))


def test_a_missing_file_is_explained() -> None:
    assert is_weight_file("weights.pth")
    assert not is_weight_file("efficientnet-lite0")
    with pytest.raises(UsageError, match=r"no weights at /no/such.pth"):
        create_backbone("test_efficientnet", "/no/such.pth")


def test_packaged_weights_fill_the_whole_timm_model() -> None:
    architecture, state = WEIGHTS.get("efficientnet-lite0")()
    whole = timm.create_model(architecture, pretrained=False).eval()
    untouched = whole.load_state_dict(state, strict=False)
    assert not untouched.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in untouched.missing_keys)
    backbone = create_backbone(architecture, "efficientnet-lite0").eval()
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        features = backbone(images)
        assert features.shape == (2, 1280)
        assert torch.allclose(whole.classifier(features), whole(images), atol=1e-5)
