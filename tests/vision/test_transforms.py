"""Transforms: shapes, aspect ratio, determinism of evaluation and of seeded training."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lookalike.vision.transforms import (
    AugmentConfig,
    TransformConfig,
    build_augmentation,
    build_eval_transform,
    build_train_transform,
    normalize_pixels,
    pad_to_square,
)


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


@settings(max_examples=50, deadline=None)
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
    augment = AugmentConfig(rotation_deg=10.0, grayscale=0.5)
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
