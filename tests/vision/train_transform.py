"""The oracle of training's pictures: augmentation and normalisation of one image after the other, by torchvision."""

import torch
from torchvision.transforms import v2

from lookalike.vision.transforms import AugmentConfig, Transform, TransformConfig, build_augmentation


def build_train_transform(config: TransformConfig, augment: AugmentConfig) -> Transform:
    """RGB image -> float32 tensor [3, size, size], randomly cropped and coloured (torch's global generator)."""
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)]
    transform: Transform = v2.Compose([build_augmentation(config, augment), *to_tensor])
    return transform
