"""Which parameters train, in which groups, by which optimizer and schedule."""

from typing import Any

import torch
from torch import nn

from lookalike.errors import UsageError
from lookalike.train.settings import TrainConfig
from lookalike.train.tasks import MultiTaskModel
from lookalike.vision.encoder import EmbeddingModel


def freeze(model: MultiTaskModel, config: TrainConfig) -> None:
    """Stop gradients of the leading backbone stages, by timm's names for them; a backbone without raises
    ``UsageError``."""
    if not config.frozen_stages:
        return
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    prefixes = ["conv_stem", "bn1", "patch_embed", "stem", "cls_token", "pos_embed", "conv1"]
    prefixes += [f"{name}.{i}" for name in ("blocks", "stages") for i in range(config.frozen_stages)]
    prefixes += [f"layer{i + 1}" for i in range(config.frozen_stages)]
    frozen = [parameter for name, parameter in backbone.named_parameters()
              if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)]  # fmt: skip
    if not frozen:
        raise UsageError(f"frozen_stages {config.frozen_stages}: a {type(backbone).__name__} has no stages that are "
                         "known; set frozen_stages=0")  # fmt: skip
    for parameter in frozen:
        parameter.requires_grad = False


def build_optimizer(
    model: MultiTaskModel, config: TrainConfig, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Groups: backbone matrices, backbone vectors (no decay), projection, heads (no decay); warm-up, then cosine."""
    encoder = model.encoder
    assert isinstance(encoder, EmbeddingModel)
    backbone = [p for p in encoder.backbone.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in backbone if p.ndim > 1], "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in backbone if p.ndim <= 1], "lr": config.lr, "weight_decay": 0.0},
        {"params": list(encoder.projection.parameters()), "lr": config.projection_lr,
         "weight_decay": config.weight_decay},
        {"params": list(model.tasks.parameters()), "lr": config.head_lr, "weight_decay": 0.0},
    ]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=config.lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    warmup = min(round(config.warmup_fraction * total_steps), total_steps - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, total_steps - warmup))
    if warmup == 0:
        return optimizer, cosine
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0 / (warmup + 1), total_iters=warmup)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, cosine], milestones=[warmup])
