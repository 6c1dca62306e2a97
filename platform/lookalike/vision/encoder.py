"""The encoder: backbone, optional projection, evaluation transform and nested dims, stored and loaded together.

An encoder artifact holds ``model.safetensors``, ``config.json`` and a model card; a folder or hub repository written by
``lookalike export`` is an encoder artifact too. Vectors are not normalised: each use normalises the prefix that it
reads, after truncation.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field, model_validator
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from lookalike import hub, storage
from lookalike.arguments import check_image, list_items, show
from lookalike.artifacts import Artifact, Draft
from lookalike.config import Config, parse_config
from lookalike.errors import ArgumentError, UsageError
from lookalike.vision.backbones import Pooling, create_backbone, require_architecture
from lookalike.vision.images import MAX_PIXELS, decode, normalize
from lookalike.vision.resolution import resize_input
from lookalike.vision.transforms import TransformConfig, normalize_pixels, to_pixels
from lookalike.vision.weights import own_transform

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image
"""The path of a file, its content, or a decoded picture."""
Precision = Literal["float32", "bfloat16", "float16"]
"""Precision of an encoder's matrix products; weights and vectors stay float32."""


class EncoderConfig(Config):
    """All settings that rebuild an encoder around its weights."""

    backbone: str
    """timm architecture."""
    num_features: int = Field(ge=1)
    """Width of the backbone's pooled features."""
    dims: tuple[int, ...]
    """Nested embedding sizes, smallest first; the last is the whole embedding."""
    projection: bool = False
    """A bias-free linear layer maps the features to ``dims[-1]``; without one the features are the embedding."""
    pooling: Pooling = "native"
    """How the backbone pools its feature map."""
    transform: TransformConfig = TransformConfig()

    @model_validator(mode="after")
    def _check_dims(self) -> "EncoderConfig":
        check_dims(self.dims, self.num_features if not self.projection else self.dims[-1])
        return self

    @property
    def dim(self) -> int:
        """Size of the whole embedding."""
        return self.dims[-1]


def check_dims(dims: Sequence[int], dim: int) -> None:
    """Raise ``UsageError`` unless ``dims`` are positive, increasing and end at the model's ``dim``."""
    if not dims or list(dims) != sorted(set(dims)) or dims[0] < 1:
        raise UsageError(f"dims {list(dims)} must be positive and strictly increasing, for example [8, 16, 32]")
    if dims[-1] > dim:
        above = [d for d in dims if d > dim]
        raise UsageError(
            f"dims {list(dims)} exceed the model's {dim}; drop {', '.join(map(str, above))} "
            f"or set embedding_dim={dims[-1]}"
        )
    if dims[-1] < dim:
        raise UsageError(f"dims {list(dims)} must end at the whole embedding, {dim}; append it")


class EmbeddingModel(nn.Module):
    """Images [n, 3, H, W] float32 -> embeddings [n, dim] float32, not normalised."""

    def __init__(self, backbone: nn.Module, num_features: int, projection_dim: int | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection: nn.Module = (
            nn.Identity() if projection_dim is None else nn.Linear(num_features, projection_dim, bias=False)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings float32 [n, dim] of ``images``."""
        embedding: torch.Tensor = self.projection(self.backbone(images))
        return embedding


def build_model(config: EncoderConfig, weights: str = "random", *, drop_path: float = 0.0) -> EmbeddingModel:
    """The untrained module of ``config`` around a backbone with ``weights`` (see ``create_backbone``)."""
    backbone = create_backbone(
        config.backbone, weights, size=config.transform.size, pooling=config.pooling, drop_path=drop_path
    )
    return EmbeddingModel(backbone, config.num_features, config.dim if config.projection else None)


def wrap_backbone(
    architecture: str, weights: str, transform: TransformConfig, pooling: Pooling = "native"
) -> tuple[EncoderConfig, EmbeddingModel]:
    """A backbone as it is (see ``create_backbone``), whose pooled features are the embedding."""
    backbone = create_backbone(architecture, weights, size=transform.size, pooling=pooling)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    config = EncoderConfig(
        backbone=architecture, num_features=width, dims=(width,), pooling=pooling, transform=transform
    )
    return config, EmbeddingModel(backbone, width, None)


def save_encoder(draft: Draft, model: EmbeddingModel, config: EncoderConfig, card: str) -> None:
    """Write weights, configuration and model card into an encoder's draft."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    storage.write_atomic(draft.path(MODEL_FILE), save_tensors(state))
    draft.write_json(CONFIG_FILE, config.model_dump(mode="json"))
    storage.write_atomic(draft.path(CARD_FILE), card.encode())


def read_encoder(
    artifact: Artifact, *, size: int | None = None, drop_path: float = 0.0
) -> tuple[EncoderConfig, EmbeddingModel]:
    """Configuration of an ``encoder`` artifact and its module with the weights loaded.

    ``size``: a new side of the images in pixels (position embeddings are interpolated); ``drop_path``: rate of
    stochastic depth during training.
    """
    config = read_config(artifact)
    model = build_model(config, drop_path=drop_path)
    model.load_state_dict(load_tensors(storage.read_bytes(artifact.path(MODEL_FILE))))
    if size is not None:
        resize_input(model.backbone, size)
        config = config.model_copy(update={"transform": config.transform.model_copy(update={"size": size})})
    return config, model


class Encoder:
    """An encoder ready for use, on a CPU or the first GPU: image bytes in, vectors out.

    Args:
        config: architecture, transform and dims.
        model: the module with its weights loaded.
        fingerprint: of the artifact it came from; the vectors are stamped with it.
        precision: of matrix products and convolutions; half precision moves vectors by about 1%, and ``float16`` is
            refused without a GPU.
    """

    def __init__(
        self, config: EncoderConfig, model: EmbeddingModel, fingerprint: str, *, precision: Precision = "float32"
    ) -> None:
        self.config, self.fingerprint, self.precision = config, fingerprint, precision
        self.dims, self.dim = config.dims, config.dim
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if precision == "float16" and self._device.type == "cpu":
            raise UsageError("precision 'float16' needs a GPU; on a CPU set precision=bfloat16 or float32")
        self._model = model.eval().to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(cls, source: "Artifact | str", *, precision: Precision = "float32") -> "Encoder":
        """Load an opened artifact, or the URI of an artifact, an exported folder, or ``hf://owner/name[@revision]``.

        Raises ``ArtifactError`` if it is missing or damaged.
        """
        artifact = Artifact.open(hub.fetch(source), "encoder") if isinstance(source, str) else source
        config, model = read_encoder(artifact)
        return cls(config, model, artifact.manifest.fingerprint, precision=precision)

    @classmethod
    def of_backbone(cls, architecture: str, weights: str = "random", *, precision: Precision = "float32") -> "Encoder":
        """A backbone of timm that was not trained further, with the evaluation transform of its ``weights``.

        ``weights`` are as in the ``encoder`` step: ``efficientnet-lite0`` (packaged), ``timm``, ``timm:<tag>``, the
        path of a file, or ``random``. Raises ``UsageError`` for an unknown name, or weights of another backbone.
        """
        require_architecture(architecture)
        config, model = wrap_backbone(architecture, weights, own_transform(architecture, weights))
        return cls(config, model, f"{architecture}/{weights}", precision=precision)

    def encode(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 32,
        max_pixels: int = MAX_PIXELS,
    ) -> npt.NDArray[np.float32]:
        """Vectors float32 [n, dim] of one or many images, not normalised.

        An image is the path of a file, a file's content, or a picture of Pillow's. Raises ``ImageError`` for one that
        cannot be decoded, and ``ArgumentError`` for what is none.
        """
        single = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
        items = list_items("images", images, single, "a list of paths, of files' contents or of Pillow's pictures")
        if not items:
            return np.empty((0, self.dim), np.float32)
        named = [(f"images[{place}]", item) for place, item in enumerate(items)]
        vectors = []
        for start in range(0, len(named), batch_size):
            batch = [_read_image(name, item) for name, item in named[start : start + batch_size]]
            vectors.append(self.encode_pixels(read_pixels(batch, self.config.transform, max_pixels=max_pixels)))
        return np.concatenate(vectors)

    def encode_pixels(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Vectors float32 [n, dim] of a batch of pixels, uint8 [n, 3, size, size]."""
        batch = normalize_pixels(torch.from_numpy(pixels).to(self._device), self.config.transform)
        half = self.precision != "float32"
        with torch.inference_mode(), torch.autocast(self._device.type, getattr(torch, self.precision), enabled=half):
            vectors = self._model(batch.contiguous(memory_format=torch.channels_last))
        result: npt.NDArray[np.float32] = vectors.float().cpu().numpy()
        return result


def _read_image(name: str, image: ImageLike) -> bytes | Image.Image:
    """The content of a file, or the picture; paths are read."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, os.PathLike)):
        return check_image(name, image)
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArgumentError(f"{name} is {show(image)}, no file that can be read ({reason}); give its path") from None


def read_pixels(
    images: Sequence[bytes | Image.Image], transform: TransformConfig, *, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """Images decoded and scaled to the transform's size, uint8 [n, 3, size, size]; ``ImageError`` for bad bytes."""
    pictures = (
        decode(image, max_pixels=max_pixels, square=transform.square) if isinstance(image, bytes) else normalize(image)
        for image in images
    )
    return np.stack([to_pixels(picture, transform) for picture in pictures])


def to_bytes(image: Image.Image, image_format: str = "PNG") -> bytes:
    """``image`` as the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def read_config(artifact: Artifact) -> EncoderConfig:
    """The configuration of an encoder artifact, without its weights."""
    return parse_config(EncoderConfig, artifact.read_json(CONFIG_FILE), artifact.path(CONFIG_FILE))
