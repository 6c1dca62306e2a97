"""Image transforms. The evaluation transform is part of the encoder, shared by training, embedding and serving."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field

from lookalike.config import Config
from lookalike.vision import operators  # noqa: F401  (before torchvision)
from lookalike.vision.squares import Square, crop_to_square, pad_to_square  # noqa: F401  (transforms of this module too)

Transform = Callable[[Image.Image], torch.Tensor]


Side = Annotated[int, Field(ge=32, le=1024)]
Fit = Literal["pad", "crop"]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Interpolation = Literal["bilinear", "bicubic"]
Channels = tuple[float, float, float]
_Deviation = Annotated[float, Field(gt=0.0)]
Deviations = tuple[_Deviation, _Deviation, _Deviation]


class TransformConfig(Config):
    """From an RGB image to the tensor that a backbone reads."""

    size: Side = 224
    """Side of the square input in pixels."""
    fit: Fit = "pad"
    """``pad`` keeps the whole picture on a white square (catalogue); ``crop`` cuts the centre (photographs)."""
    crop_fraction: Share = 0.875
    """Share of the short side that ``crop`` keeps."""
    interpolation: Interpolation = "bilinear"
    """How pictures are scaled, in training too. Encoders made before there was this setting are bilinear."""
    mean: Channels = (0.5, 0.5, 0.5)
    """Channel means in the backbone's training, of values in [0, 1]."""
    std: Deviations = (0.5, 0.5, 0.5)
    """Channel standard deviations in the backbone's training."""

    @property
    def square(self) -> Square:
        """The part of the transform before normalisation."""
        return Square(self.fit, self.size, self.crop_fraction, self.interpolation)


class AugmentConfig(Config):
    """Random changes of a training image, by torchvision."""

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
    rand_augment: int = Field(0, ge=0, le=8)
    """Changes that RandAugment picks for each image (Cubuk et al. 2020: 2); 0: no RandAugment."""
    rand_augment_magnitude: int = Field(9, ge=0, le=30)
    """Strength of each change, 0 to 30."""


def build_eval_transform(config: TransformConfig) -> Transform:
    """RGB image -> float32 tensor [3, size, size], normalised; deterministic."""
    return partial(_to_input, config=config)


def _to_input(image: Image.Image, config: TransformConfig) -> torch.Tensor:
    return normalize_pixels(torch.from_numpy(to_pixels(image, config)), config)


def to_pixels(image: Image.Image, config: TransformConfig) -> npt.NDArray[np.uint8]:
    """RGB image -> uint8 [3, size, size]: the evaluation transform without normalisation."""
    return config.square.pixels(image).transpose(2, 0, 1).copy()


def build_augmentation(config: TransformConfig, augment: AugmentConfig) -> Callable[[Image.Image], Image.Image]:
    """RGB image -> RGB image of size x size, randomly cropped and coloured (torch's global generator)."""
    from torchvision.transforms import v2

    way = v2.InterpolationMode(config.interpolation)
    steps: list[object] = [v2.RandomResizedCrop(config.size, scale=(augment.min_scale, 1.0), interpolation=way)]
    if config.fit == "pad":
        side = round(config.size * 1.15)
        steps.insert(0, partial(pad_to_square, size=side, interpolation=config.interpolation))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.rand_augment:
        steps.append(v2.RandAugment(augment.rand_augment, augment.rand_augment_magnitude, fill=255))
    if augment.rotation_deg:
        steps.append(v2.RandomRotation(augment.rotation_deg, fill=255))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(augment.color_jitter, augment.color_jitter, augment.color_jitter))
    if augment.grayscale:
        steps.append(v2.RandomGrayscale(augment.grayscale))
    augmentation: Callable[[Image.Image], Image.Image] = v2.Compose(steps)
    return augmentation


def normalize_pixels(pixels: torch.Tensor, config: TransformConfig) -> torch.Tensor:
    """uint8 [..., 3, size, size] -> float32 of the same shape and device: scaled to [0, 1], minus mean, over deviation.

    A batch gives the same as its images one by one.
    """
    from torchvision.transforms.v2 import functional

    scaled = functional.to_dtype(pixels, torch.float32, scale=True)
    normalized: torch.Tensor = functional.normalize(scaled, list(config.mean), list(config.std), inplace=True)
    return normalized
