"""timm's help in training a backbone: its layers in order, recomputed activations, LARS, averaged weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lookalike.errors import UsageError
from lookalike.vision import operators  # noqa: F401  (before timm, which imports torchvision)

import timm.optim  # isort: skip
import timm.utils  # isort: skip


def layer_groups(backbone: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: for each layer one with weight decay, one without.

    A group's ``lr_scale`` is ``layer_decay`` to the power of the number of layers above it (BEiT's layer-wise decay;
    layers by timm's ``group_matcher``). Vectors, and parameters that the backbone excludes, do not decay.
    """
    groups: list[dict[str, Any]] = timm.optim.param_groups_layer_decay(  # type: ignore[attr-defined]
        backbone, weight_decay, no_weight_decay_list=undecayed(backbone), layer_decay=layer_decay
    )
    return groups


def undecayed(backbone: nn.Module) -> set[str]:
    """Parameters in the backbone's ``no_weight_decay``, such as position embeddings and class tokens."""
    names = getattr(backbone, "no_weight_decay", None)
    return set(names()) if callable(names) else set()


def lars(groups: Sequence[dict[str, Any]], lr: float, **options: Any) -> torch.optim.Optimizer:
    """Layer-wise adaptive SGD (You et al. 2017); groups without weight decay get plain SGD, as is usual for vectors.

    ``options``: momentum, nesterov, trust_coeff.
    """
    optimizer: torch.optim.Optimizer = timm.optim.Lars(list(groups), lr=lr, **options)  # type: ignore[attr-defined]
    return optimizer


def recompute_activations(backbone: nn.Module) -> None:
    """Keep only each block's input for the backward pass; ``UsageError`` if the backbone does not support it."""
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise UsageError(
            f"a {type(backbone).__name__} cannot recompute its activations; set "
            "compute.activation_checkpointing=false, or raise compute.accumulation to save memory"
        ) from None


def averaged(model: nn.Module, decay: float) -> Any:
    """A moving average of ``model``, with warm-up (timm's ``ModelEmaV3``): call ``update(model, step)``, read
    ``.module``."""
    return timm.utils.ModelEmaV3(model, decay=decay, use_warmup=True)  # type: ignore[attr-defined]


def is_convolutional(backbone: nn.Module) -> bool:
    """Whether channels-last memory pays: more 2-d convolutions than the one that makes a transformer's patches."""
    return sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 1
