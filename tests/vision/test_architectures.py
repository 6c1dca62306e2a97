"""Every architecture the papers name: it builds, gives features, trains a step, and changes its resolution."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lookalike.errors import UsageError
from lookalike.vision.backbones import create_backbone, timm
from lookalike.vision.resolution import resize_input, size_of_weights
from lookalike.vision.tuning import layer_groups

FEATURES = {
    "vit_base_patch16_224": 768,
    "vit_base_patch32_224": 768,
    "deit_small_patch16_224": 384,
    "deit_small_distilled_patch16_224": 384,
    "efficientnet_b0": 1280,
    "mobilevit_s": 640,
    "efficientformer_l1": 448,
    "efficientformer_l3": 512,
    "resnet50": 2048,
    "resnetblur50": 2048,
    "resnext101_32x8d": 2048,
    "tf_efficientnet_lite0": 1280,
    "mobilenetv3_small_100": 1024,
    "convnext_atto": 320,
    "swin_tiny_patch4_window7_224": 768,
}
"""Architecture -> width of its features, as the papers and timm's documentation give it."""
SMALL = {"swin_tiny_patch4_window7_224": (224, 256)}
"""Sizes before and after; 64 and 96 pixels where it takes them."""


def images(size: int, num: int = 2) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FEATURES)
def test_it_gives_features_trains_a_step_and_changes_its_resolution(architecture: str) -> None:
    size, larger = SMALL.get(architecture, (64, 96))
    backbone = create_backbone(architecture, size=size)
    assert backbone.num_features == FEATURES[architecture]
    features = backbone(images(size))
    assert (features.shape, features.dtype) == ((2, FEATURES[architecture]), torch.float32)
    features.square().mean().backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without  # DDP expects every parameter to take part
    before = [p.detach().clone() for p in backbone.parameters()]
    torch.optim.SGD(backbone.parameters(), lr=1.0).step()
    assert any(not torch.equal(old, new) for old, new in zip(before, backbone.parameters(), strict=True))
    resize_input(backbone.eval(), larger)
    with torch.no_grad():
        assert torch.isfinite(backbone(images(larger))).all()


def smallest_of(module: str) -> str:
    """A model of a module of timm with few weights, among those with short names."""
    names = sorted(timm.list_models(module=module), key=lambda name: (len(name), name))[:4]
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters()) for name in names}
    return min(names, key=lambda name: sizes[name])


@pytest.mark.soak
@pytest.mark.nightly
def test_every_family_of_timm_gives_features_of_the_width_it_states() -> None:
    """Without weights or memory, at its own size, given as a recipe gives it; layers in order, position sizes read."""
    wrong = {}
    for module in timm.list_modules():
        name = smallest_of(module)
        size = timm.get_pretrained_cfg(name).input_size[-1]
        try:
            with torch.device("meta"):
                backbone = create_backbone(name, size=size).eval()
                features = backbone(torch.empty(2, 3, size, size))
            size_of_weights(backbone, backbone.state_dict())
            layer_groups(backbone, 0.05, 0.7)
            if features.shape != (2, backbone.num_features):
                wrong[name] = f"{tuple(features.shape)} instead of {backbone.num_features} features"
        except Exception as error:  # noqa: BLE001  (all families are named, not the first)
            wrong[name] = f"{type(error).__name__}: {error}"
    assert not wrong


def test_a_patch_of_one_number_is_a_patch_of_two() -> None:
    backbone = create_backbone("efficientvit_m0", size=224)
    assert backbone(images(224)).shape == (2, 192)
    with pytest.raises(UsageError, match=r"transform.size 230 is not a multiple of the backbone's patches of 16 px"):
        create_backbone("efficientvit_m0", size=230)


def test_224_becomes_384_and_positions_are_interpolated_as_timm_does() -> None:
    ours = create_backbone("vit_tiny_patch16_224")
    position: Any = ours.pos_embed
    expected = timm.layers.resample_abs_pos_embed(position.data, [24, 24], num_prefix_tokens=1)
    resize_input(ours, 384)
    resized: Any = ours.pos_embed
    assert torch.equal(resized.data, expected)
    assert ours(images(384, 1)).shape == (1, 192)
    resize_input(ours, 384)
    assert ours.pos_embed is resized  # nothing to do


@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "efficientformer_l1"]
)
@pytest.mark.parametrize("size", [96, 224, 288])
def test_weights_of_any_resolution_fit_another(architecture: str, size: int, tmp_path: Any) -> None:
    """As good as resizing the model that the weights came from, whatever the native size."""
    source = create_backbone(architecture, size=size)
    with torch.no_grad():  # EfficientFormer's biases start at zero
        for name, parameter in source.named_parameters():
            if "bias" in name or name == "pos_embed":
                parameter.normal_()
    path = str(tmp_path / "weights.safetensors")
    save_file({key: value.contiguous() for key, value in source.state_dict().items()}, path)
    for target in (size, 160):
        loaded = create_backbone(architecture, path, size=target)
        resize_input(source, target)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(images(target)), source.eval()(images(target))), target


def test_attention_biases_of_an_efficientformer_keep_their_meaning_when_resized() -> None:
    """A bias that grows with the row distance still does, over the same range, and is the same for all columns."""
    backbone = create_backbone("efficientformer_l1")
    attention: Any = next(m for m in backbone.modules() if hasattr(m, "attention_bias_idxs"))
    rows = torch.arange(7.0)[:, None].expand(7, 7)
    attention.attention_biases.data = rows.reshape(1, 49).repeat(attention.num_heads, 1)
    resize_input(backbone, 384)
    table = attention.attention_biases.detach().reshape(-1, 12, 12)
    assert torch.allclose(table, torch.linspace(0, 6, 12)[None, :, None].expand_as(table), atol=0.15)
    distances = attention.attention_bias_idxs
    place = torch.arange(144)
    assert torch.equal(distances // 12, (place[:, None] // 12 - place[None] // 12).abs())
    assert torch.equal(distances % 12, (place[:, None] % 12 - place[None] % 12).abs())


def test_a_size_that_does_not_fit_is_explained() -> None:
    with pytest.raises(
        UsageError,
        match=r"transform.size 230 is not a multiple of the backbone's patches of 16 px; set "
        r"224 or 240",
    ):
        create_backbone("vit_tiny_patch16_224", size=230)
    with pytest.raises(UsageError, match=r"reads 224 px only, not 256; set transform.size=224 or take another"):
        create_backbone("levit_128s", size=256)
    create_backbone("levit_128s", size=224)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "convnext_atto", "mobilevit_xxs"])
def test_gem_is_the_generalised_mean_of_the_last_map(architecture: str) -> None:
    torch.manual_seed(1)
    plain = create_backbone(architecture).eval()
    torch.manual_seed(1)
    gem = create_backbone(architecture, pooling="gem").eval()
    extra = set(dict(gem.named_parameters())) - set(dict(plain.named_parameters()))
    assert len(extra) == 1
    with torch.no_grad():
        maps: torch.Tensor = plain.forward_features(images(96))  # type: ignore[operator]
        pooled = maps.double().clamp_min(1e-6).pow(3).mean(dim=(2, 3), keepdim=True).pow(1 / 3).float()
        after: Any = gem.get_submodule(next(iter(extra)).rpartition(".pool.")[0].rpartition(".")[0])
        assert torch.allclose(gem(images(96)), _after_pooling(after, plain, pooled), atol=1e-4)
    gem(images(96)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad) for name, p in gem.named_parameters() if name in extra)


def _after_pooling(head: Any, plain: nn.Module, pooled: torch.Tensor) -> torch.Tensor:
    """What comes between pooling and features: ConvNeXt has a norm there, the others nothing."""
    norm = getattr(head, "norm", None)
    if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) and head is not plain:
        pooled = norm(pooled)
    return pooled.flatten(1)


def test_gem_needs_an_average_pooling() -> None:
    with pytest.raises(UsageError, match=r"'test_vit' has 0 such layers, keep pooling=native"):
        create_backbone("test_vit", pooling="gem")


def test_stochastic_depth_is_for_training_alone_and_refused_where_there_is_none() -> None:
    backbone = create_backbone("test_vit", drop_path=0.5)
    size = timm.create_model("test_vit").pretrained_cfg["input_size"][-1]
    assert not torch.equal(backbone(images(size)), backbone(images(size)))
    assert torch.equal(backbone.eval()(images(size)), backbone(images(size)))
    with pytest.raises(UsageError, match=r"'vgg11' has no stochastic depth; set drop_path=0"):
        create_backbone("vgg11", drop_path=0.1)
