"""A new input size for a built backbone: weights that depend on the number of patches are interpolated.

Convolutional networks and MobileViT take any size. ViT, DeiT and their relatives have an embedding per position (timm
resizes it); EfficientFormer has an attention bias for every distance between two positions of its last stage.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lookalike.errors import UsageError
from lookalike.vision import operators  # noqa: F401  (before timm, which imports torchvision)

from timm.models.efficientformer import Attention  # isort: skip

EFFICIENTFORMER_STRIDE = 32


def resize_input(backbone: nn.Module, size: int) -> None:
    """Make ``backbone`` read images [n, 3, size, size], in place.

    New positions are interpolated between the old ones (Dosovitskiy et al. 2021, section 3.2). Raises ``UsageError`` if
    the size is not a multiple of the patch, or if the architecture has a fixed size.
    """
    model: Any = backbone
    if biased := [module for module in backbone.modules() if isinstance(module, Attention)]:
        for module in biased:
            _resize_biases(module, -(-size // EFFICIENTFORMER_STRIDE))
    elif hasattr(model, "set_input_size"):
        _set_input_size(model, size)
    elif getattr(model, "pretrained_cfg", {}).get("fixed_input_size") and size != _native_size(model):
        raise UsageError(
            f"a {type(backbone).__name__} reads {_native_size(model)} px only, not {size}; set "
            f"transform.size={_native_size(model)} or take another backbone"
        )


def size_of_weights(backbone: nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    """The input size in pixels that weights were trained at; None if their shapes do not tell."""
    model: Any = backbone
    for name, module in backbone.named_modules():
        if isinstance(module, Attention) and (biases := state.get(f"{name}.attention_biases")) is not None:
            return EFFICIENTFORMER_STRIDE * int(biases.shape[1] ** 0.5)
    positions, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if positions is None or own is None or positions.ndim != 3 or not hasattr(model, "set_input_size"):
        return None
    others = own.shape[1] - model.patch_embed.num_patches  # class and register tokens
    return int(_patch_size(model) * round((positions.shape[1] - others) ** 0.5))


def _native_size(model: Any) -> int:
    return int(model.pretrained_cfg["input_size"][-1])


def _patch_size(model: Any) -> int:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(patch if isinstance(patch, int) else patch[0])  # EfficientViT has one number, the others two


def _set_input_size(model: Any, size: int) -> None:
    patch = _patch_size(model)
    if size % patch:
        below = size // patch * patch
        raise UsageError(
            f"transform.size {size} is not a multiple of the backbone's patches of {patch} px; set "
            f"{below or patch} or {below + patch}"
        )
    if getattr(getattr(model, "patch_embed", None), "img_size", None) != (size, size):
        model.set_input_size(img_size=(size, size))


def _resize_biases(attention: Any, grid: int) -> None:
    """Resize EfficientFormer's attention biases, one per (row, column) distance, to a ``grid`` x ``grid`` map.

    Distance zero and the largest distance keep their biases.
    """
    heads, positions = attention.attention_biases.shape
    old = int(positions**0.5)
    if old == grid:
        return
    table = attention.attention_biases.detach().reshape(1, heads, old, old)
    resized = functional.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=True)
    attention.attention_biases = nn.Parameter(resized.reshape(heads, grid * grid).contiguous())
    place = torch.arange(grid, device=table.device)
    rows, columns = (axis.reshape(-1) for axis in torch.meshgrid(place, place, indexing="ij"))
    distance = [(axis[:, None] - axis[None, :]).abs() for axis in (rows, columns)]
    attention.attention_bias_idxs = distance[0] * grid + distance[1]
    attention.attention_bias_cache = {}
