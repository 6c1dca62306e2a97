"""Optimizer and schedule: what is frozen, what decays, how the learning rate moves."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.train.run.optimizer import (
    build_optimizer,
    build_schedule,
    freeze,
    hasten_batch_norm,
    parameter_groups,
    set_train_mode,
)
from lookalike.train.run.sections import BackboneConfig, OptimizerConfig, ScheduleConfig
from lookalike.train.tasks import MultiTaskModel, TaskConfig, build_tasks
from lookalike.vision.backbones import create_backbone
from lookalike.vision.encoder import EmbeddingModel

import timm.optim  # isort: skip  # after lookalike.vision, which makes torchvision importable

TASKS = {
    "identity": TaskConfig(kind="normalized_softmax", field="group"),
    "category": TaskConfig(kind="softmax", field="category"),
}


def make_model(architecture: str = "test_efficientnet", projection: int | None = 16) -> MultiTaskModel:
    backbone = create_backbone(architecture)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    dims = (4, projection or width)
    tasks = build_tasks(TASKS, dims, {"group": 4, "category": 3}, (1.0, 1.0))
    return MultiTaskModel(EmbeddingModel(backbone, width, projection), tasks)


@pytest.mark.parametrize(
    ("architecture", "stages", "frozen", "trained"),
    [
        (
            "tf_efficientnet_lite0",
            2,
            ["conv_stem", "bn1", "blocks.0", "blocks.1"],
            ["blocks.2", "blocks.6", "conv_head", "bn2"],
        ),
        (
            "vit_tiny_patch16_224",
            1,
            ["patch_embed", "cls_token", "pos_embed", "blocks.0"],
            ["blocks.1", "blocks.10", "blocks.11", "norm"],
        ),
        (
            "test_vit4",
            1,
            ["patch_embed", "reg_token", "pos_embed", "blocks.0"],
            ["blocks.1"],
        ),
        ("test_resnet", 1, ["conv1", "bn1", "layer1"], ["layer2", "layer3"]),
    ],
)
def test_freezing_stops_the_leading_stages_and_nothing_else(
    architecture: str, stages: int, frozen: list[str], trained: list[str]
) -> None:
    model = make_model(architecture)
    freeze(model, BackboneConfig(frozen_stages=stages))
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    for name, parameter in backbone.named_parameters():
        below = any(name == prefix or name.startswith(prefix + ".") for prefix in frozen)
        assert parameter.requires_grad is not below, name
    names = [name for name, _ in backbone.named_parameters()]
    assert all(any(name == p or name.startswith(p + ".") for name in names) for p in [*frozen, *trained])
    assert all(parameter.requires_grad for parameter in model.tasks.parameters())


def test_nothing_is_frozen_by_default() -> None:
    model = make_model()
    freeze(model, BackboneConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_backbone_without_stages_cannot_be_frozen() -> None:
    model = MultiTaskModel(EmbeddingModel(nn.Sequential(nn.Linear(3, 16)), 16, None), {})
    with pytest.raises(UsageError, match=r"frozen_stages 2: .* has no known stages; set it to 0"):
        freeze(model, BackboneConfig(frozen_stages=2))


def test_more_stages_than_there_are_cannot_be_frozen() -> None:
    freeze(make_model("test_resnet"), BackboneConfig(frozen_stages=4))
    with pytest.raises(UsageError, match=r"frozen_stages 5: this ResNet has 4 stages; set it to 4 or less"):
        freeze(make_model("test_resnet"), BackboneConfig(frozen_stages=5))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_every_trained_parameter_is_in_one_group_with_its_own_settings(
    optimizer: str, layer_decay: float | None
) -> None:
    model = make_model()
    rates = {"lr": 1e-3, "head_lr": 2e-2, "projection_lr": 3e-3, "proxy_lr": 0.5}
    decays = {"weight_decay": 0.05, "head_weight_decay": 0.02, "proxy_weight_decay": 0.01}
    config = parse_config(
        OptimizerConfig,
        {
            "kind": optimizer,
            "proxy_momentum": None if optimizer == "adamw" else 0.4,
            "layer_decay": layer_decay,
            **rates,
            **decays,
        },
        "optimizer",
    )
    freeze(model, BackboneConfig(frozen_stages=1))
    groups = build_optimizer(model, config).param_groups
    home = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(home)
    assert set(home) == {id(p) for p in model.parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = home[id(parameter)]
        kind = (
            "proxies"
            if ".proxies." in name
            else "heads"
            if name.startswith("tasks.")
            else "projection"
            if ".projection." in name
            else "backbone"
        )
        decay = {"proxies": 0.01, "heads": 0.02, "projection": 0.05, "backbone": 0.05}[kind]
        assert group["name"] == kind, name
        assert group["weight_decay"] == (decay if parameter.ndim > 1 or kind == "proxies" else 0.0), name
        rate = {"proxies": 0.5, "heads": 2e-2, "projection": 3e-3, "backbone": 1e-3}[kind]
        if kind != "backbone" or layer_decay is None:
            assert group["lr"] == pytest.approx(rate), name
        if optimizer != "adamw":
            assert group["momentum"] == (0.4 if kind == "proxies" else 0.9)


def test_layers_learn_the_slower_the_lower_they_are() -> None:
    model = make_model("test_vit")
    config = OptimizerConfig(layer_decay=0.5, lr=1.0)
    home = {id(p): group["lr"] for group in parameter_groups(model, config) for p in group["params"]}
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    rates = {name: home[id(p)] for name, p in backbone.named_parameters()}
    blocks = sorted({int(name.split(".")[1]) for name in rates if name.startswith("blocks.")})
    for block in blocks:
        (rate,) = {rates[name] for name in rates if name.startswith(f"blocks.{block}.")}
        assert rate == pytest.approx(0.5 ** (len(blocks) - block))  # the head above them is at lr
    assert {rates[name] for name in rates if name.startswith("patch_embed.")} == {0.5 ** (len(blocks) + 1)}
    assert {rates[name] for name in rates if name.startswith(("norm.", "fc_norm."))} <= {0.5}


@pytest.mark.parametrize("architecture", ["test_vit", "test_efficientnet", "test_resnet"])
def test_layer_decay_is_timm_s_for_the_same_backbone_with_a_classifier(architecture: str) -> None:
    model = make_model(architecture, projection=None)
    home = {
        id(p): group["lr"]
        for group in parameter_groups(model, OptimizerConfig(layer_decay=0.7, lr=1.0))
        for p in group["params"]
    }
    classifier = timm.create_model(architecture, num_classes=3)
    theirs = {
        id(p): group["lr_scale"]
        for group in timm.optim.param_groups_layer_decay(classifier, layer_decay=0.7)
        for p in group["params"]
    }
    expected = {name: theirs[id(p)] for name, p in classifier.named_parameters()}
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    ours = {name: home[id(p)] for name, p in backbone.named_parameters()}
    assert ours == pytest.approx({name: expected[name] for name in ours})


def test_frozen_stages_drop_nothing() -> None:
    """Stochastic depth and dropout are off where nothing trains, and on above."""
    model = make_model("test_vit")
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    config = BackboneConfig(frozen_stages=2)
    freeze(model, config)
    set_train_mode(model, config)
    modes = {name: module.training for name, module in backbone.named_modules() if name.startswith("blocks.")}
    still = {name for name, training in modes.items() if not training}
    assert still == {name for name in modes if name.split(".")[1] in ("0", "1")}
    assert len(still) < len(modes)


def test_position_embeddings_and_class_tokens_do_not_decay() -> None:
    model = make_model("test_vit")
    decay = {
        id(p): group["weight_decay"]
        for group in parameter_groups(model, OptimizerConfig(weight_decay=0.1))
        for p in group["params"]
    }
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    named = dict(backbone.named_parameters())
    assert named["pos_embed"].ndim == 3
    assert decay[id(named["pos_embed"])] == 0.0
    assert decay[id(named["blocks.0.attn.qkv.weight"])] == 0.1


def test_lars_scales_a_step_by_the_ratio_of_norms() -> None:
    """One step by You et al. 2017, equation 6, for all matrices, with or without decay; vectors take plain SGD's."""
    model = make_model()
    optimizer = build_optimizer(
        model, OptimizerConfig(kind="lars", lr=0.5, head_lr=0.1, weight_decay=0.01, momentum=0.0)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.01 * (number % 5 + 1))
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        old, gradient = before[name], parameter.grad
        rate, decay = 0.5, 0.01
        if name.startswith("tasks."):
            rate, decay = 0.1, 0.0
        elif ".projection." in name:
            rate = 1e-3
        expected = old - rate * gradient
        if parameter.ndim > 1 and old.norm() > 0:
            trust = 0.001 * old.norm() / (gradient.norm() + decay * old.norm() + 1e-8)
            expected = old - rate * trust * (gradient + decay * old)
            moved = (parameter.detach() - old).norm() / old.norm()
            assert moved <= 0.001 * rate * 1.001  # what trust_coefficient promises
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-7)


def test_momenta_decay_rates_and_trust_reach_the_optimizer() -> None:
    model = make_model()
    nesterov: dict[str, Any] = {"momentum": 0.7, "nesterov": True}
    adamw = build_optimizer(model, OptimizerConfig(betas=(0.8, 0.95)))
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.95)}
    for config in (OptimizerConfig(kind="sgd", **nesterov), OptimizerConfig(kind="lars", **nesterov)):
        optimizer = build_optimizer(model, config)
        assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.7, True)}
    lars = build_optimizer(model, OptimizerConfig(kind="lars", trust_coefficient=0.02))
    assert {group["trust_coeff"] for group in lars.param_groups} == {0.02}


def expected_rates(schedule: str, total: int, epochs: float) -> list[float]:
    """The schedules by their formulas, at peak 1."""
    per_epoch = total / epochs
    warmup = round(0.1 * total)
    if schedule == "cyclic":
        return [float(np.interp(step, [0, 2 * per_epoch, total], [1e-4, 1.0, 0.0])) for step in range(total)]
    after = {
        "cosine": lambda t: 0.5 * (1 + np.cos(np.pi * t)),
        "linear": lambda t: 1 - t,
        "polynomial": lambda t: (1 - t) ** 2,
        "constant": lambda t: 1.0,
    }
    rates = []
    for step in range(total):
        if step < warmup:
            rates.append((step + 1) / (warmup + 1))
        elif schedule == "step":
            rates.append(0.1 ** sum(step >= round(epoch * per_epoch) for epoch in (1.5, 3.0)))
        else:
            rates.append(float(after[schedule]((step - warmup) / (total - warmup))))
    return rates


def walk(schedule: ScheduleConfig, epochs: float, total: int, resume_at: int = -1) -> list[float]:
    """Learning rates of a run at peak 1, resumed before step ``resume_at``."""

    def begin() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, build_schedule(optimizer, schedule, epochs, total)

    optimizer, plan = begin()
    rates = []
    for step in range(total):
        if step == resume_at:
            states = optimizer.state_dict(), plan.state_dict()
            optimizer, plan = begin()
            optimizer.load_state_dict(states[0])
            plan.load_state_dict(states[1])
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    return rates


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "step", "constant", "cyclic"])
@pytest.mark.parametrize("resume_at", [0, 3, 17])
def test_learning_rates_follow_their_formula_also_when_resumed(kind: str, resume_at: int) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "drop_epochs": [1.5, 3.0] if kind == "step" else []})
    assert walk(config, 4.0, 40, resume_at) == pytest.approx(expected_rates(kind, 40, 4.0), abs=1e-9)


@pytest.mark.parametrize(("total", "fraction"), [(40, 0.1), (40, 0.0), (1, 0.5), (2, 0.9), (3, 0.5)])
@pytest.mark.parametrize("as_steps", [False, True])
def test_the_warm_up_is_a_share_of_the_steps_or_a_number(total: int, fraction: float, as_steps: bool) -> None:
    warmup = min(round(fraction * total), total - 1)
    steps = round(fraction * total) if as_steps else None
    config = ScheduleConfig(kind="constant", warmup_fraction=0.3 if as_steps else fraction, warmup_steps=steps)
    assert walk(config, 1.0, total) == pytest.approx([min(1.0, (i + 1) / (warmup + 1)) for i in range(total)], abs=1e-6)


def test_a_drop_within_the_warm_up_is_refused() -> None:
    with pytest.raises(UsageError, match=r"drop_epochs \[0.1\] begin within the warm-up of 20 of 40 steps"):
        walk(ScheduleConfig(kind="step", drop_epochs=(0.1,), warmup_fraction=0.5), 4.0, 40)


def test_a_probe_freezes_the_backbone_and_needs_something_to_train() -> None:
    model = make_model()
    freeze(model, BackboneConfig(trainable="probe"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("encoder.backbone.")}
    set_train_mode(model, BackboneConfig(trainable="probe", freeze_batch_norm=False))
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    assert not any(module.training for module in backbone.modules())
    bare = MultiTaskModel(EmbeddingModel(create_backbone("test_vit"), 64, None), {})
    with pytest.raises(UsageError, match=r"nothing trains: the backbone is frozen, .* set embedding_dim"):
        freeze(bare, BackboneConfig(trainable="probe"))


def test_batch_norm_statistics_stay_when_frozen() -> None:
    model = make_model()
    for keep in (True, False):
        set_train_mode(model, BackboneConfig(freeze_batch_norm=keep))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert {m.training for m in norms} == {not keep}
        assert model.training
    config = BackboneConfig(freeze_batch_norm=False, frozen_stages=1)
    freeze(model, config)
    set_train_mode(model, config)
    assert {m.training == m.weight.requires_grad for m in norms} == {True}
    assert {m.training for m in norms} == {True, False}


@pytest.mark.parametrize(
    ("own", "steps", "momentum"),
    [(0.01, 134, 10 / 134), (0.01, 20, 0.1), (0.01, 5000, 0.01), (0.3, 20, 0.3), (None, 20, None)],
)
def test_short_runs_hasten_batch_norm(own: float | None, steps: int, momentum: float | None) -> None:
    layer = nn.BatchNorm2d(4, momentum=own)
    hasten_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), layer), steps)
    assert layer.momentum == momentum
