"""Image transforms. The evaluation transform is part of an encoder: training, embedding and serving share it."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from PIL import Image
from pydantic import Field

from lookalike.config import Config
from lookalike.vision import operators  # noqa: F401  (before torchvision)

Transform = Callable[[Image.Image], torch.Tensor]


class TransformConfig(Config):
    """How an RGB image becomes the tensor that a backbone reads."""

    size: int = Field(224, ge=32, le=1024)
    """Side of the square input in pixels."""
    fit: Literal["pad", "crop"] = "pad"
    """``pad`` keeps the whole picture on a white square (catalogue); ``crop`` cuts the centre (photographs)."""
    crop_fraction: float = Field(0.875, gt=0.0, le=1.0)
    """Centre share kept by ``crop``: the short side is resized to size / crop_fraction first."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Channel means that the backbone was trained with, of values in [0, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Channel standard deviations likewise."""


class AugmentConfig(Config):
    """Random changes of a training image; torchvision does them."""

    min_scale: float = Field(0.35, gt=0.0, le=1.0)
    """Smallest share of the area that a random resized crop keeps (Inception crop: 0.08)."""
    flip: bool = True
    """Mirror every other image."""
    color_jitter: float = Field(0.2, ge=0.0, le=1.0)
    """Strength of brightness, contrast and saturation changes."""
    rotation_deg: float = Field(0.0, ge=0.0, le=180.0)
    """Largest rotation either way in degrees; corners are filled white."""
    grayscale: float = Field(0.0, ge=0.0, le=1.0)
    """Share of images turned grey."""


def build_eval_transform(config: TransformConfig) -> Transform:
    """RGB image -> float32 tensor [3, size, size], normalised; deterministic."""
    from torchvision.transforms import v2

    if config.fit == "pad":
        resize: list[object] = [partial(pad_to_square, size=config.size)]
    else:
        resize = [v2.Resize(round(config.size / config.crop_fraction), antialias=True), v2.CenterCrop(config.size)]
    transform: Transform = v2.Compose([*resize, *_to_tensor(config)])
    return transform


def build_train_transform(config: TransformConfig, augment: AugmentConfig) -> Transform:
    """RGB image -> float32 tensor [3, size, size], randomly cropped and coloured (torch's global generator)."""
    from torchvision.transforms import v2

    transform: Transform = v2.Compose([build_augmentation(config, augment), *_to_tensor(config)])
    return transform


def build_augmentation(config: TransformConfig, augment: AugmentConfig) -> Callable[[Image.Image], Image.Image]:
    """RGB image -> RGB image of size x size, randomly cropped and coloured (torch's global generator).

    ``normalize_pixels`` makes of its pixels what ``build_train_transform`` makes of the image.
    """
    from torchvision.transforms import v2

    steps: list[object] = [v2.RandomResizedCrop(config.size, scale=(augment.min_scale, 1.0), antialias=True)]
    if config.fit == "pad":
        steps.insert(0, partial(pad_to_square, size=round(config.size * 1.15)))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.rotation_deg:
        steps.append(v2.RandomRotation(augment.rotation_deg, fill=255))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(augment.color_jitter, augment.color_jitter, augment.color_jitter))
    if augment.grayscale:
        steps.append(v2.RandomGrayscale(augment.grayscale))
    augmentation: Callable[[Image.Image], Image.Image] = v2.Compose(steps)
    return augmentation


def normalize_pixels(pixels: torch.Tensor, config: TransformConfig) -> torch.Tensor:
    """uint8 [..., 3, H, W] -> float32, scaled to [0, 1] and normalised on its device, by the same operations as one
    image."""
    from torchvision.transforms.v2 import functional

    scaled = functional.to_dtype(pixels, torch.float32, scale=True)
    normalized: torch.Tensor = functional.normalize(scaled, list(config.mean), list(config.std), inplace=True)
    return normalized


def pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """Scale so that the long side is ``size`` pixels, centred on white."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), ((size - width) // 2, (size - height) // 2))
    return canvas


def _to_tensor(config: TransformConfig) -> list[object]:
    from torchvision.transforms import v2

    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)]
