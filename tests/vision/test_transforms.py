"""Transforms: shapes, aspect ratio, determinism of evaluation and of seeded training."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lookalike.vision.backbones import create_backbone  # before timm
from lookalike.vision.images import decode
from lookalike.vision.transforms import (
    AugmentConfig,
    TransformConfig,
    build_augmentation,
    build_eval_transform,
    crop_to_square,
    normalize_pixels,
    pad_to_square,
    to_pixels,
)
from lookalike.vision.weights import own_transform
from tests.vision.train_transform import build_train_transform

from timm.data import create_transform, resolve_model_data_config  # isort: skip

SAMPLES = Path(__file__).parents[2] / "data/samples"


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [(300, 20), (33, 200), (64, 64), (1, 1)])
def test_evaluation_is_deterministic_and_square(fit: str, size: tuple[int, int]) -> None:
    transform = build_eval_transform(TransformConfig(size=48, fit=fit))  # type: ignore[arg-type]
    first = transform(picture(*size))
    torch.manual_seed(99)
    assert torch.equal(first, transform(picture(*size)))
    assert (first.shape, first.dtype) == ((3, 48, 48), torch.float32)
    assert first.min() >= -1.0
    assert first.max() <= 1.0


def test_values_are_normalised_by_mean_and_deviation() -> None:
    config = TransformConfig(size=32, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = build_eval_transform(config)(Image.new("RGB", (10, 10), (255, 0, 51)))
    assert torch.allclose(pixels[:, 16, 16], torch.tensor([1.0, -1.0, 0.2]))


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_pixels_normalised_as_a_batch_are_what_torchvision_makes_of_each_picture(fit: str) -> None:
    from torchvision.transforms import v2

    config = TransformConfig(size=32, fit=fit, mean=(0.48, 0.45, 0.4), std=(0.22, 0.23, 0.24))  # type: ignore[arg-type]
    images = [picture(50, 40), picture(20, 90)]
    batch = normalize_pixels(torch.from_numpy(np.stack([to_pixels(image, config) for image in images])), config)
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)]
    for image, normalised in zip(images, batch, strict=True):
        square = pad_to_square(image, 32) if fit == "pad" else crop_to_square(image, 32, config.crop_fraction)
        assert torch.equal(normalised, v2.Compose(steps)(square))
        assert torch.equal(normalised, build_eval_transform(config)(image))


def smooth(width: int, height: int) -> Image.Image:
    return picture(max(2, width // 12), max(2, height // 12)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256), (640, 150), (131, 97), (61, 803)])
@pytest.mark.parametrize(("side", "share"), [(224, 0.875), (240, 0.882), (224, 0.9), (160, 0.95), (112, 1.0)])
def test_the_centre_is_cut_as_timm_cuts_it(size: tuple[int, int], side: int, share: float, interpolation: str) -> None:
    """timm resizes the whole picture first: the same pixels but for rounding (noise is the hardest)."""
    image = picture(*size)
    plain: dict[str, Any] = {"crop_pct": share, "interpolation": interpolation, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    theirs = create_transform((3, side, side), **plain)(image) * 255
    ours = np.asarray(crop_to_square(image, side, share, interpolation)).transpose(2, 0, 1)
    apart = np.abs(ours - theirs.numpy())
    assert np.quantile(apart, 0.99) <= (1 if interpolation == "bilinear" else 4)  # bicubic overshoots and is clipped
    assert apart.mean() < 0.5


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 1.0))
def test_the_centre_of_any_picture_lies_within_it(width: int, height: int, share: float) -> None:
    assert crop_to_square(Image.new("RGB", (width, height)), 32, share).size == (32, 32)


@pytest.mark.parametrize("size", [(300, 20), (33, 200), (64, 64)])
def test_a_padded_picture_is_scaled_by_the_filter_that_is_set(size: tuple[int, int]) -> None:
    image, scale = picture(*size), 48 / max(size)
    scaled = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    square = pad_to_square(image, 48, "bicubic")
    left, top = (48 - scaled.width) // 2, (48 - scaled.height) // 2
    assert square.crop((left, top, left + scaled.width, top + scaled.height)).tobytes() == scaled.tobytes()


def test_a_strip_is_cut_without_being_blown_up() -> None:
    strip = Image.new("RGB", (200_000, 2), (10, 20, 30))  # resized whole to 256 rows it would take 20 GB
    assert np.unique(np.asarray(crop_to_square(strip, 224, 0.875)).reshape(-1, 3), axis=0).tolist() == [[10, 20, 30]]


@settings(max_examples=50)
@given(st.integers(1, 400), st.integers(1, 400))
def test_padding_keeps_the_aspect_ratio(width: int, height: int) -> None:
    square = np.asarray(pad_to_square(Image.new("RGB", (width, height), (0, 0, 0)), 64))
    assert square.shape == (64, 64, 3)
    dark = np.argwhere(square[..., 0] < 128)
    (top, left), (bottom, right) = dark.min(axis=0), dark.max(axis=0) + 1
    scale = 64 / max(width, height)
    assert abs((right - left) - max(1, width * scale)) <= 1
    assert abs((bottom - top) - max(1, height * scale)) <= 1
    assert abs(top - (64 - bottom)) <= 1
    assert abs(left - (64 - right)) <= 1


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_training_depends_on_the_seed_alone(fit: str) -> None:
    augment = AugmentConfig(rotation_deg=10.0, grayscale=0.5, rand_augment=2)
    transform = build_train_transform(TransformConfig(size=40, fit=fit), augment)  # type: ignore[arg-type]
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(transform(picture(90, 70)))
    assert views[0].shape == (3, 40, 40)
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_without_augmentation_every_view_is_the_same() -> None:
    still = AugmentConfig(min_scale=1.0, flip=False, color_jitter=0.0)
    transform = build_train_transform(TransformConfig(size=40), still)
    image = picture(80, 80)  # a square: the full crop has one aspect ratio only
    views = [transform(image) for _ in range(8)]
    middles = torch.stack([view[:, 10:30, 10:30].mean() for view in views])
    assert middles.std() < 0.05


def test_the_inception_crop_keeps_down_to_a_twelfth_of_the_area() -> None:
    """min_scale 0.08: the share of a gradient that a crop spans is the share of the side it kept."""
    gradient = Image.fromarray(np.tile(np.arange(240, dtype=np.uint8)[None, :, None], (240, 1, 3)))
    config = TransformConfig(size=48, fit="crop", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    transform = build_train_transform(config, AugmentConfig(min_scale=0.08, flip=False, color_jitter=0.0))
    torch.manual_seed(3)
    spans = [float(view.max() - view.min()) * 255 / 239 for view in (transform(gradient) for _ in range(200))]
    assert 0.2 < min(spans) < 0.35  # sqrt(0.08) = 0.28, times the aspect ratio's root
    assert max(spans) > 0.9


def test_rand_augment_changes_pictures_more_the_stronger_it_is() -> None:
    image = smooth(64, 64)
    changes = []
    for operations, magnitude in ((0, 9), (2, 3), (2, 20)):
        augment = AugmentConfig(
            min_scale=1.0, flip=False, color_jitter=0.0, rand_augment=operations, rand_augment_magnitude=magnitude
        )
        transform = build_train_transform(TransformConfig(size=64, fit="crop"), augment)
        torch.manual_seed(0)
        views = torch.stack([transform(image) for _ in range(40)])
        changes.append(float((views - views.median(dim=0).values).abs().mean()))
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_pixels_normalised_as_a_batch_are_those_of_one_picture_after_the_other(fit: str) -> None:
    config = TransformConfig(size=40, fit=fit, mean=(0.1, 0.2, 0.7), std=(0.3, 0.6, 0.2))  # type: ignore[arg-type]
    augment = AugmentConfig(rotation_deg=20.0, grayscale=0.5)
    whole, cut = build_train_transform(config, augment), build_augmentation(config, augment)
    pictures = [picture(90, 70), picture(41, 200), picture(12, 12)]
    torch.manual_seed(1)
    expected = torch.stack([whole(image) for image in pictures])
    torch.manual_seed(1)
    pixels = torch.from_numpy(np.stack([np.asarray(cut(image)) for image in pictures])).permute(0, 3, 1, 2)
    assert pixels.dtype == torch.uint8
    assert torch.equal(normalize_pixels(pixels, config), expected)


def test_training_scales_as_the_evaluation_does() -> None:
    image = picture(90, 90)
    augment = AugmentConfig(min_scale=1.0, flip=False, color_jitter=0.0)
    config = TransformConfig(size=40, fit="crop", interpolation="bicubic")
    torch.manual_seed(3)  # a crop of the whole picture: all other shapes would be larger
    whole = np.asarray(build_augmentation(config, augment)(image), int)
    assert np.abs(whole - np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC), int)).mean() < 1.0


def sample_pictures(num: int) -> list[Image.Image]:
    """Pictures of the sample corpora, cut to different shapes."""
    pictures = []
    for name in ("furniture", "openclipart"):
        rows = next(pq.ParquetFile(SAMPLES / name / "part-000.parquet").iter_batches(num, columns=["image"]))
        for number, data in enumerate(rows["image"]):
            image = decode(data.as_py())
            pictures.append(image.crop((0, 0, image.width - 13 * (number % 4), image.height - 17 * (number % 3))))
    return pictures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "weights", "known"),
    [
        ("tf_efficientnet_lite0", "efficientnet-lite0", (224, 0.875, "bicubic", 0.5)),
        ("vit_tiny_patch16_224", "random", (224, 0.9, "bicubic", 0.5)),
        ("resnet18", "random", (224, 0.95, "bicubic", 0.485)),
        ("test_resnet", "random", (160, 0.95, "bilinear", 0.5)),
    ],
)
def test_features_are_those_of_timms_own_transform(
    architecture: str, weights: str, known: tuple[int, float, str, float]
) -> None:
    """Scaled bilinearly, as all weights were before, the packaged backbone's are down to a cosine of .98."""
    torch.manual_seed(0)
    backbone = create_backbone(architecture, weights).eval()
    own = own_transform(architecture, weights)
    assert (own.size, own.crop_fraction, own.interpolation, own.mean[0]) == known
    pictures = sample_pictures(6)
    features = []
    for transform in (
        create_transform(**resolve_model_data_config(backbone)),
        build_eval_transform(own.model_copy(update={"fit": "crop"})),
        build_eval_transform(own.model_copy(update={"fit": "crop", "interpolation": "bilinear"})),
    ):
        with torch.no_grad():
            features.append(backbone(torch.stack([transform(image) for image in pictures])))
    assert torch.cosine_similarity(features[0], features[1]).min() > 0.999
    if weights == "efficientnet-lite0":
        assert torch.cosine_similarity(features[0], features[2]).min() < 0.995
