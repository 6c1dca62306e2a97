"""Optimizer and schedule: what is frozen, what decays, how the learning rate moves, which settings are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.train.run.optimizer import (
    build_optimizer,
    freeze,
    hasten_batch_norm,
    parameter_groups,
    set_train_mode,
)
from lookalike.train.run.settings import TrainConfig
from lookalike.train.tasks import MultiTaskModel, TaskConfig, build_tasks
from lookalike.vision.backbones import create_backbone
from lookalike.vision.encoder import EmbeddingModel

TASKS = {
    "identity": TaskConfig(kind="normalized_softmax", field="group"),
    "category": TaskConfig(kind="softmax", field="category"),
}


def settings(**values: Any) -> TrainConfig:
    return parse_config(TrainConfig, {"tasks": TASKS, "mix": {"catalogue": 1}, **values}, "step 'finetune'")


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
        ("test_resnet", 1, ["conv1", "bn1", "layer1"], ["layer2", "layer3"]),
    ],
)
def test_freezing_stops_the_leading_stages_and_nothing_else(
    architecture: str, stages: int, frozen: list[str], trained: list[str]
) -> None:
    model = make_model(architecture)
    freeze(model, settings(frozen_stages=stages))
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
    freeze(model, settings())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_backbone_without_stages_cannot_be_frozen() -> None:
    model = MultiTaskModel(EmbeddingModel(nn.Sequential(nn.Linear(3, 16)), 16, None), {})
    with pytest.raises(UsageError, match=r"frozen_stages 2: .* has no stages that are known; set frozen_stages=0"):
        freeze(model, settings(frozen_stages=2))


def test_more_stages_than_there_are_cannot_be_frozen() -> None:
    freeze(make_model("test_resnet"), settings(frozen_stages=4))
    with pytest.raises(UsageError, match=r"frozen_stages 5: this ResNet has 4 stages; set frozen_stages to 4 or less"):
        freeze(make_model("test_resnet"), settings(frozen_stages=5))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_every_trained_parameter_is_in_one_group_with_its_own_settings(
    optimizer: str, layer_decay: float | None
) -> None:
    model = make_model()
    rates = {"lr": 1e-3, "head_lr": 2e-2, "projection_lr": 3e-3, "proxy_lr": 0.5}
    decays = {"weight_decay": 0.05, "head_weight_decay": 0.02, "proxy_weight_decay": 0.01}
    config = settings(
        frozen_stages=1, optimizer=optimizer, proxy_momentum=0.4, layer_decay=layer_decay, **rates, **decays
    )
    freeze(model, config)
    groups = build_optimizer(model, config, 100)[0].param_groups
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
            assert group["initial_lr"] == pytest.approx(rate), name
        if optimizer != "adamw":
            assert group["momentum"] == (0.4 if kind == "proxies" else 0.9)


def test_layers_learn_the_slower_the_lower_they_are() -> None:
    model = make_model("test_vit")
    config = settings(layer_decay=0.5, lr=1.0)
    home = {id(p): group["lr"] for group in parameter_groups(model, config) for p in group["params"]}
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    rates = {name: home[id(p)] for name, p in backbone.named_parameters()}
    blocks = sorted({int(name.split(".")[1]) for name in rates if name.startswith("blocks.")})
    for block in blocks:
        (rate,) = {rates[name] for name in rates if name.startswith(f"blocks.{block}.")}
        assert rate == pytest.approx(0.5 ** (len(blocks) - 1 - block))  # the top one, with the norm, at lr
    assert {rates[name] for name in rates if name.startswith("patch_embed.")} == {0.5 ** len(blocks)}
    assert {rates[name] for name in rates if name.startswith(("norm.", "fc_norm."))} <= {1.0}


def test_position_embeddings_and_class_tokens_do_not_decay() -> None:
    model = make_model("test_vit")
    decay = {
        id(p): group["weight_decay"]
        for group in parameter_groups(model, settings(weight_decay=0.1))
        for p in group["params"]
    }
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    named = dict(backbone.named_parameters())
    assert named["pos_embed"].ndim == 3
    assert decay[id(named["pos_embed"])] == 0.0
    assert decay[id(named["blocks.0.attn.qkv.weight"])] == 0.1


def test_lars_scales_a_step_by_the_ratio_of_norms() -> None:
    """One step by You et al. 2017, equation 6, for matrices that decay; vectors and heads take plain SGD's."""
    model = make_model()
    config = settings(optimizer="lars", lr=0.5, head_lr=0.1, weight_decay=0.01, momentum=0.0, warmup_fraction=0.0)
    optimizer, _ = build_optimizer(model, config, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.01 * (number % 5 + 1))
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        old, gradient = before[name], parameter.grad
        if parameter.ndim > 1 and not name.startswith("tasks."):
            trust = 0.001 * old.norm() / (gradient.norm() + 0.01 * old.norm() + 1e-8) if old.norm() > 0 else 1.0
            rate = 1e-3 if ".projection." in name else 0.5
            expected = old - rate * trust * (gradient + 0.01 * old)
        else:
            expected = old - (0.1 if name.startswith("tasks.") else 0.5) * gradient
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-7)


def test_momenta_decay_rates_and_trust_reach_the_optimizer() -> None:
    model = make_model()
    adamw, _ = build_optimizer(model, settings(betas=[0.8, 0.95]), 10)
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.95)}
    for kind in ("sgd", "lars"):
        optimizer, _ = build_optimizer(model, settings(optimizer=kind, momentum=0.7, nesterov=True), 10)
        assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.7, True)}
    lars, _ = build_optimizer(model, settings(optimizer="lars", trust_coefficient=0.02), 10)
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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial", "step", "constant", "cyclic"])
@pytest.mark.parametrize("resume_at", [0, 3, 17])
def test_learning_rates_follow_their_formula_also_when_resumed(schedule: str, resume_at: int) -> None:
    total = 40
    more = {"schedule_epochs": [1.5, 3.0]} if schedule == "step" else {}
    config = settings(schedule=schedule, lr=1.0, epochs=4.0, **more)
    optimizer, plan = build_optimizer(make_model(), config, total)
    rates = []
    for step in range(total):
        if step == resume_at:
            states = optimizer.state_dict(), plan.state_dict()
            optimizer, plan = build_optimizer(make_model(), config, total)
            optimizer.load_state_dict(states[0])
            plan.load_state_dict(states[1])
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    assert rates == pytest.approx(expected_rates(schedule, total, 4.0), abs=1e-9)


@pytest.mark.parametrize(("total", "fraction"), [(40, 0.1), (40, 0.0), (1, 0.5), (2, 0.9), (3, 0.5)])
@pytest.mark.parametrize("as_steps", [False, True])
def test_the_warm_up_is_a_share_of_the_steps_or_a_number(total: int, fraction: float, as_steps: bool) -> None:
    warmup = min(round(fraction * total), total - 1)
    steps = {"warmup_steps": round(fraction * total), "warmup_fraction": 0.3}
    given = steps if as_steps else {"warmup_fraction": fraction}
    optimizer, schedule = build_optimizer(make_model(), settings(lr=1.0, schedule="constant", **given), total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([min(1.0, (step + 1) / (warmup + 1)) for step in range(total)], abs=1e-6)


def test_a_fall_within_the_warm_up_is_refused() -> None:
    config = settings(schedule="step", schedule_epochs=[0.1], epochs=4.0, warmup_fraction=0.5)
    with pytest.raises(UsageError, match=r"schedule_epochs \[0.1\] begin within the warm-up of 20 of 40 steps"):
        build_optimizer(make_model(), config, 40)


def test_a_probe_freezes_the_backbone_and_needs_something_to_train() -> None:
    model = make_model()
    freeze(model, settings(trainable="probe"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if not name.startswith("encoder.backbone.")}
    set_train_mode(model, settings(trainable="probe", freeze_batch_norm=False))
    backbone = model.encoder.backbone
    assert isinstance(backbone, nn.Module)
    assert not any(module.training for module in backbone.modules())
    bare = MultiTaskModel(EmbeddingModel(create_backbone("test_vit"), 64, None), {})
    with pytest.raises(UsageError, match=r"nothing trains: the backbone is frozen, .* set embedding_dim"):
        freeze(bare, settings(trainable="probe"))


def test_batch_norm_statistics_stay_when_frozen() -> None:
    model = make_model()
    for keep in (True, False):
        set_train_mode(model, settings(freeze_batch_norm=keep))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert {m.training for m in norms} == {not keep}
        assert model.training
    config = settings(freeze_batch_norm=False, frozen_stages=1)
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


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dims": [4, 8], "nested_weights": [1.0]}, "nested_weights has 1 values for 2 dims; give one each"),
        ({"batch_size": 9}, "batch_size 9 is no multiple of num_workers 2"),
        ({"batch_size": 12, "accumulation": 4}, r"accumulation 4 does not divide a worker's 6 rows \(batch_size 12"),
        ({"num_workers": [2, 1]}, r"num_workers \[2, 1\] is no range; give a number, or \[min, max\]"),
        ({"num_workers": [0, 2]}, r"num_workers \[0, 2\] is no range"),
        ({"num_workers": [1, 2, 3]}, "is no range"),
        ({"min_workers": 3}, "min_workers 3 is above num_workers 2"),
        ({"precision": "float16"}, "precision float16 needs a GPU; set use_gpu=true, or precision=bfloat16"),
        ({"trainable": "full", "frozen_stages": 2}, "trainable full and frozen_stages 2 exclude each other"),
        ({"trainable": "probe", "frozen_stages": 2}, "trainable probe and frozen_stages 2 exclude each other"),
        ({"trainable": "partial"}, "trainable partial needs frozen_stages of 1 or more"),
        ({"optimizer": "sgd", "nesterov": True, "momentum": 0.0}, "nesterov needs a momentum above 0"),
        ({"optimizer": "sgd", "nesterov": True, "proxy_momentum": 0.0}, "momentum above 0, for proxies"),
        ({"schedule": "step"}, r"schedule step with schedule_epochs \[\]: step needs epochs"),
        ({"schedule_epochs": [1.0]}, r"schedule cosine with schedule_epochs \[1.0\]"),
        ({"schedule": "step", "schedule_epochs": [2.0, 1.0]}, r"\[2.0, 1.0\] must be positive and incr"),
        ({"schedule": "cyclic"}, "peak_epoch 2.0 is not before the end, epochs 1.0; lower it"),
        ({"trackers": ["tensorbord"]}, r"unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\)"),
        ({"tasks": {"a": {"kind": "softmax", "field": "groups"}}}, "'tasks.a.field' is 'groups'"),
        ({"tasks": {"a": {"kind": "softmax", "fild": "group"}}}, r"unknown key 'tasks.a.fild' \(did you mean 'field'"),
        ({"schedule": "step", "schedule_epochs": [0.5, 1.0]}, r"do not all come before the end, epochs 1.0; drop 1.0"),
        ({"num_workers": [1, 2], "min_workers": 2}, r"num_workers \[1, 2\] sets min_workers, which is 2 besides"),
        ({"dims": [4, 8], "dims_per_step": 3}, "dims_per_step 3 exceeds the 2 dims; lower or drop it"),
        ({"dims": [4, 8], "nested_weights": [1.0, -1.0]}, "'nested_weights.1' is -1.0"),
        ({"dims": [4, 8], "nested_weights": [0.0, 0.0]}, r"nested_weights \[0.0, 0.0\] are all zero"),
        ({"dims": []}, r"dims \[\] must be positive"),
        ({"dims": [8, 4]}, r"dims \[8, 4\] must be positive"),
        ({"dims_per_step": 2}, "dims_per_step 2 exceeds the 1 dims"),
        ({"betas": [0.9, 1.0]}, "'betas.1' is 1.0"),
        ({"betas": [-0.1, 0.9]}, "'betas.0' is -0.1"),
        ({"tasks": {"a.b": TASKS["category"]}}, "task 'a.b' is no name"),
        ({"tasks": {"training": TASKS["category"]}}, "task 'training' is no name"),
        ({"mix": {"a": 0.0}}, "'mix.a' is 0.0"),
        ({"mix": {"a": -1.0}}, "'mix.a' is -1.0"),
        ({"mix": {}}, "'mix' is {}"),
        ({"warmup_fraction": 1.0}, "'warmup_fraction' is 1.0"),
    ],
)
def test_wrong_settings_are_explained(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings(**values)


def test_a_range_of_workers_shapes_the_result_by_its_upper_end_alone() -> None:
    ranged = settings(num_workers=[1, 2])
    assert (ranged.min_workers, ranged.num_workers, ranged.micro_batch) == (1, 2, 32)
    assert ranged.identity() == settings(num_workers=2).identity()
    assert ranged.identity() != settings(num_workers=1).identity()
    assert settings(**ranged.model_dump()) == ranged


def test_nested_dims_must_fit_the_embedding() -> None:
    assert settings().resolve_dims(256) == (256,)
    assert settings(embedding_dim=64).resolve_dims(256) == (64,)
    assert settings(dims=[8, 256]).resolve_dims(256) == (8, 256)
    with pytest.raises(UsageError, match=r"dims \[8, 512\] exceed the model's 256; drop 512 or set embedding_dim=512"):
        settings(dims=[8, 512]).resolve_dims(256)
