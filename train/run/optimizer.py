"""Which parameters train, in which groups, by which optimizer, and how the learning rate moves."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from lookalike.errors import UsageError
from lookalike.train.run.sections import BackboneConfig, OptimizerConfig, ScheduleConfig
from lookalike.train.run.settings import TrainConfig
from lookalike.train.tasks import MultiTaskModel
from lookalike.vision.encoder import EmbeddingModel
from lookalike.vision.tuning import lars, layer_groups, undecayed

CYCLIC_START = 1e-4
"""Share of the peak learning rate that ``cyclic`` begins with."""
BATCH_NORM = nn.modules.batchnorm._BatchNorm  # noqa: SLF001  # the base of torch's batch norms has no public name
_STAGE = re.compile(r"(blocks|stages|layer)\.?(\d+)\.")


def freeze(model: MultiTaskModel, config: BackboneConfig) -> None:
    """Stop gradients of the leading backbone stages, found by timm's names, or of the whole backbone for a probe.

    Raises ``UsageError`` if the backbone has fewer stages, or if nothing is left to train.
    """
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    if config.trainable == "probe":
        backbone.requires_grad_(False)
    elif config.frozen_stages:
        _freeze_stages(backbone, config.frozen_stages)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "nothing trains: the backbone is frozen, there is no projection, and no task has weights; set "
            "embedding_dim for a projection, or backbone.trainable=full"
        )


def _freeze_stages(backbone: nn.Module, stages: int) -> None:
    prefixes = ["conv_stem", "bn1", "patch_embed", "stem", "conv1", "norm_pre"]
    prefixes += ["cls_token", "reg_token", "dist_token", "pos_embed"]
    prefixes += [f"{name}.{i}" for name in ("blocks", "stages") for i in range(stages)]
    prefixes += [f"layer{i + 1}" for i in range(stages)]
    frozen = [
        parameter
        for name, parameter in backbone.named_parameters()
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
    ]
    stages_of = {match.groups() for name, _ in backbone.named_parameters() if (match := _STAGE.match(name))}
    if not frozen or not stages_of:
        raise UsageError(
            f"backbone.frozen_stages {stages}: a {type(backbone).__name__} has no known stages; set it to 0"
        )
    if stages > len(stages_of):
        raise UsageError(
            f"backbone.frozen_stages {stages}: this {type(backbone).__name__} has {len(stages_of)} stages; set "
            f"it to {len(stages_of)} or less, or backbone.trainable=probe"
        )
    for parameter in frozen:
        parameter.requires_grad = False


def set_train_mode(model: MultiTaskModel, config: BackboneConfig) -> None:
    """Set training mode, except for frozen layers, which drop nothing, and batch-norm layers whose statistics stay."""
    model.train()
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    for module in backbone.modules() if config.trainable == "probe" or config.frozen_stages else ():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    for module in model.modules():
        if isinstance(module, BATCH_NORM):
            frozen = module.weight is not None and not module.weight.requires_grad
            if config.freeze_batch_norm or frozen:
                module.eval()


def require_batch_norm_rows(model: MultiTaskModel, train: TrainConfig) -> None:
    """Raise ``UsageError`` if a batch norm that trains would see a single row, of which it can take no statistics."""
    set_train_mode(model, train.backbone)
    if train.micro_batch == 1 and any(m.training for m in model.modules() if isinstance(m, BATCH_NORM)):
        raise UsageError(
            f"a forward pass holds one row (batch_size {train.batch_size} in {train.parts} parts), and batch norm "
            "needs two; raise batch_size, lower compute.accumulation, or set backbone.freeze_batch_norm=true"
        )


def hasten_batch_norm(model: nn.Module, num_steps: int) -> None:
    """Let running statistics follow within a tenth of the run, at most as fast as torch's default of 0.1 per step.

    timm's ``tf_`` networks keep 0.99 per step: after 134 steps a quarter is still the 0 and 1 they began with.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORM) and module.momentum is not None:
            module.momentum = max(module.momentum, min(0.1, 10 / num_steps))


def parameter_groups(model: MultiTaskModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of the parameters that train: backbone (matrices, vectors, or both per layer), projection, heads, proxies.

    Each group has a ``name``; groups without parameters are left out.
    """
    encoder = model.encoder
    assert isinstance(encoder, EmbeddingModel)
    heads = [(name, p) for name, p in model.tasks.named_parameters() if p.requires_grad]
    plain = [p for name, p in heads if not is_proxy(name)]
    proxies = [p for name, p in heads if is_proxy(name)]
    projection = [p for p in encoder.projection.parameters() if p.requires_grad]
    groups = [
        *_backbone_groups(encoder.backbone, config),
        _group("projection", projection, config.projection_lr, config.weight_decay),
        *_by_decay("heads", plain, config.head_lr, config.head_weight_decay),
        _group("proxies", proxies, config.proxy_lr or config.head_lr, config.proxy_weight_decay),
    ]
    if config.kind != "adamw":
        groups[-1]["momentum"] = config.momentum if config.proxy_momentum is None else config.proxy_momentum
    if config.kind == "lars":
        groups = [part for group in groups for part in _adapt_matrices(group)]
    return [group for group in groups if group["params"]]


def _adapt_matrices(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group's matrices, which LARS adapts whatever their weight decay, and its vectors, which it leaves to SGD."""
    matrices = [p for p in group["params"] if p.ndim > 1]
    vectors = [p for p in group["params"] if p.ndim <= 1]
    return [{**group, "params": matrices, "always_adapt": True}, {**group, "params": vectors, "weight_decay": 0.0}]


def _group(name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
    return {"name": name, "params": parameters, "lr": lr, "weight_decay": weight_decay}


def is_proxy(name: str) -> bool:
    """Whether a parameter of this dotted name is a class proxy."""
    return "proxies" in name.split(".")


def _backbone_groups(backbone: nn.Module, config: OptimizerConfig) -> Iterator[dict[str, Any]]:
    if config.layer_decay is not None:
        for group in layer_groups(backbone, config.weight_decay, config.layer_decay):
            # the layer above the backbone, a classifier in BEiT and MAE, is here the projection or the heads
            yield {"name": "backbone", **group, "lr": config.lr * group["lr_scale"] * config.layer_decay}
        return
    excluded = undecayed(backbone)
    trained = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
    vectors = {name for name, p in trained if p.ndim <= 1 or name in excluded}
    yield _group("backbone", [p for name, p in trained if name not in vectors], config.lr, config.weight_decay)
    yield _group("backbone", [p for name, p in trained if name in vectors], config.lr, 0.0)


def _by_decay(name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    if weight_decay == 0.0:
        return [_group(name, parameters, lr, 0.0)]
    return [
        _group(name, [p for p in parameters if p.ndim > 1], lr, weight_decay),
        _group(name, [p for p in parameters if p.ndim <= 1], lr, 0.0),
    ]


def build_optimizer(model: MultiTaskModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over ``parameter_groups``."""
    groups = parameter_groups(model, config)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    return lars(
        groups, config.lr, momentum=config.momentum, nesterov=config.nesterov, trust_coeff=config.trust_coefficient
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, epochs: float, total_steps: int
) -> lr_scheduler.LRScheduler:
    """The learning rates of ``total_steps`` steps: a linear rise, then the schedule of the settings.

    Raises ``UsageError`` if a drop falls into the warm-up.
    """
    warmup, start_factor = _warmup(config, epochs, total_steps)
    after = _after_warmup(optimizer, config, warmup, total_steps / epochs, total_steps)
    if warmup == 0:
        return after
    rise = lr_scheduler.LinearLR(optimizer, start_factor=start_factor, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, after], milestones=[warmup])


def _warmup(config: ScheduleConfig, epochs: float, total_steps: int) -> tuple[int, float]:
    """Steps of the rise, and the share of the peak it begins with."""
    if config.kind == "cyclic":
        return min(max(1, round(config.peak_epoch * (total_steps / epochs))), total_steps - 1), CYCLIC_START
    steps = config.warmup_fraction * total_steps if config.warmup_steps is None else config.warmup_steps
    warmup = min(round(steps), total_steps - 1)
    return warmup, 1.0 / (warmup + 1)


def _after_warmup(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, warmup: int, per_epoch: float, total_steps: int
) -> lr_scheduler.LRScheduler:
    rest = max(1, total_steps - warmup)
    if config.kind == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest)
    if config.kind in ("linear", "cyclic"):
        return lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=rest)
    if config.kind == "polynomial":
        return lr_scheduler.PolynomialLR(optimizer, total_iters=rest, power=config.power)
    if config.kind == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    drops = [round(epoch * per_epoch) - warmup for epoch in config.drop_epochs]
    if drops[0] < 0:
        raise UsageError(
            f"schedule.drop_epochs {list(config.drop_epochs)} begin within the warm-up of {warmup} of "
            f"{total_steps} steps; warm up shorter (schedule.warmup_steps, schedule.warmup_fraction)"
        )
    return lr_scheduler.MultiStepLR(optimizer, milestones=drops, gamma=config.drop_factor)
