"""The encoder: backbone, optional projection, evaluation transform and nested dims, stored and loaded as one.

An encoder artifact holds ``model.safetensors``, ``config.json`` and a model card. Vectors come out unnormalised: every
use normalises the prefix it reads, after truncation.
"""

import io
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field, model_validator
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.config import Config, parse_config
from lookalike.errors import UsageError
from lookalike.vision.backbones import create_backbone
from lookalike.vision.images import MAX_PIXELS, decode
from lookalike.vision.transforms import TransformConfig, build_eval_transform

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class EncoderConfig(Config):
    """Everything needed to rebuild an encoder around its weights."""

    backbone: str
    """timm architecture."""
    num_features: int = Field(ge=1)
    """Width of the backbone's pooled features."""
    dims: tuple[int, ...]
    """Nested embedding sizes, smallest first; the last one is the whole embedding."""
    projection: bool = False
    """A bias-free linear layer maps the features to ``dims[-1]``; without one the features are the embedding."""
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
        raise UsageError(f"dims {list(dims)} exceed the model's {dim}; drop {', '.join(map(str, above))} "
                         f"or set embedding_dim={dims[-1]}")  # fmt: skip
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
        """See the class."""
        embedding: torch.Tensor = self.projection(self.backbone(images))
        return embedding


def build_model(config: EncoderConfig, weights: str = "random") -> EmbeddingModel:
    """The untrained module of ``config`` around a backbone with ``weights`` (see ``create_backbone``)."""
    backbone = create_backbone(config.backbone, weights)
    return EmbeddingModel(backbone, config.num_features, config.dim if config.projection else None)


def save_encoder(draft: Draft, model: EmbeddingModel, config: EncoderConfig, card: str) -> None:
    """Write weights, configuration and model card into an encoder's draft."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    storage.write_atomic(draft.path(MODEL_FILE), save_tensors(state))
    draft.write_json(CONFIG_FILE, config.model_dump(mode="json"))
    storage.write_atomic(draft.path("README.md"), card.encode())


def read_encoder(artifact: Artifact) -> tuple[EncoderConfig, EmbeddingModel]:
    """Configuration and module, weights filled, of an ``encoder`` artifact."""
    config = parse_config(EncoderConfig, artifact.read_json(CONFIG_FILE), artifact.path(CONFIG_FILE))
    model = build_model(config)
    model.load_state_dict(load_tensors(storage.read_bytes(artifact.path(MODEL_FILE))))
    return config, model


class Encoder:
    """An encoder ready to answer: image bytes in, vectors out, on CPU or the first GPU."""

    def __init__(self, config: EncoderConfig, model: EmbeddingModel, fingerprint: str) -> None:
        self.config, self.fingerprint = config, fingerprint
        self.dims, self.dim = config.dims, config.dim
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._transform = build_eval_transform(config.transform)

    @classmethod
    def load(cls, source: "Artifact | str") -> "Encoder":
        """Load from an opened artifact or its URI; raises ``ArtifactError`` when there is none."""
        artifact = Artifact.open(source, "encoder") if isinstance(source, str) else source
        config, model = read_encoder(artifact)
        return cls(config, model, artifact.manifest.fingerprint)

    def encode(
        self, images: Sequence[bytes | Image.Image], *, batch_size: int = 32, max_pixels: int = MAX_PIXELS
    ) -> npt.NDArray[np.float32]:
        """Vectors float32 [n, dim], not normalised; bad bytes raise ``ImageError`` with the reason."""
        if not images:
            return np.empty((0, self.dim), np.float32)
        parts = [self._encode_batch(images[i : i + batch_size], max_pixels) for i in range(0, len(images), batch_size)]
        return np.concatenate(parts)

    def _encode_batch(self, images: Sequence[bytes | Image.Image], max_pixels: int) -> npt.NDArray[np.float32]:
        pictures = [decode(image, max_pixels=max_pixels) if isinstance(image, bytes) else image.convert("RGB")
                    for image in images]  # fmt: skip
        batch = torch.stack([self._transform(picture) for picture in pictures]).to(self._device)
        with torch.inference_mode():
            vectors = self._model(batch.contiguous(memory_format=torch.channels_last))
        result: npt.NDArray[np.float32] = vectors.float().cpu().numpy()
        return result


def to_bytes(image: Image.Image, image_format: str = "PNG") -> bytes:
    """Encode a picture, for clients and tests."""
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def read_config(artifact: Artifact) -> EncoderConfig:
    """The configuration of an encoder artifact alone."""
    return parse_config(EncoderConfig, json.loads(storage.read_bytes(artifact.path(CONFIG_FILE))), artifact.uri)
