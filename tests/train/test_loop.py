"""The training loop's parts: what is frozen, what decays, how the learning rate moves, which settings are refused."""

from typing import Any

import pytest
import torch
from torch import nn

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.train.loop import set_train_mode
from lookalike.train.optimizer import build_optimizer, freeze
from lookalike.train.settings import TrainConfig
from lookalike.train.tasks import MultiTaskModel, TaskConfig, build_tasks
from lookalike.vision.backbones import create_backbone
from lookalike.vision.encoder import EmbeddingModel

TASKS = {"identity": TaskConfig(kind="normalized_softmax", field="group"),
         "category": TaskConfig(kind="softmax", field="category")}  # fmt: skip


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
        ("tf_efficientnet_lite0", 2, ["conv_stem", "bn1", "blocks.0", "blocks.1"],
         ["blocks.2", "blocks.6", "conv_head", "bn2"]),
        ("vit_tiny_patch16_224", 1, ["patch_embed", "cls_token", "pos_embed", "blocks.0"],
         ["blocks.1", "blocks.10", "blocks.11", "norm"]),
        ("test_resnet", 1, ["conv1", "bn1", "layer1"], ["layer2", "layer3"]),
    ],
)  # fmt: skip
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


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_trained_parameter_is_in_one_group_and_vectors_and_heads_do_not_decay(optimizer: str) -> None:
    model = make_model()
    rates = {"lr": 1e-3, "head_lr": 2e-2, "projection_lr": 3e-3}
    config = settings(frozen_stages=1, optimizer=optimizer, weight_decay=0.05, **rates)
    freeze(model, config)
    groups = build_optimizer(model, config, 100)[0].param_groups
    home = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(home)
    assert set(home) == {id(p) for p in model.parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = home[id(parameter)]
            decays = parameter.ndim > 1 and not name.startswith("tasks.")
            rate = 2e-2 if name.startswith("tasks.") else 3e-3 if ".projection." in name else 1e-3
            assert (group["weight_decay"], group["initial_lr"]) == (0.05 * decays, pytest.approx(rate)), name


@pytest.mark.parametrize(("total", "fraction"), [(40, 0.1), (40, 0.0), (1, 0.5), (2, 0.9), (3, 0.5)])
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(total: int, fraction: float) -> None:
    optimizer, schedule = build_optimizer(make_model(), settings(warmup_fraction=fraction, lr=1.0), total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    warmup = min(round(fraction * total), total - 1)
    rise = [(step + 1) / (warmup + 1) for step in range(warmup)]
    fall = [0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / (total - warmup)))))
            for step in range(total - warmup)]  # fmt: skip
    assert rates == pytest.approx(rise + fall, abs=1e-6)


def test_batch_norm_statistics_stay_when_frozen() -> None:
    model = make_model()
    for keep in (True, False):
        set_train_mode(model, settings(freeze_batch_norm=keep))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert {m.training for m in norms} == {not keep}
        assert model.training


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dims": [4, 8], "nested_weights": [1.0]}, "nested_weights has 1 values for 2 dims; give one each"),
        ({"batch_size": 9}, "batch_size 9 is no multiple of num_workers 2"),
        ({"tasks": {"a": {"kind": "softmax", "field": "groups"}}}, "'tasks.a.field' is 'groups'"),
        ({"tasks": {"a": {"kind": "softmax", "fild": "group"}}}, r"unknown key 'tasks.a.fild' \(did you mean 'field'"),
        ({"mix": {}}, "'mix' is {}"), ({"warmup_fraction": 1.0}, "'warmup_fraction' is 1.0"),
    ],
)  # fmt: skip
def test_wrong_settings_are_explained(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings(**values)


def test_nested_dims_must_fit_the_embedding() -> None:
    assert settings().resolve_dims(256) == (256,)
    assert settings(embedding_dim=64).resolve_dims(256) == (64,)
    assert settings(dims=[8, 256]).resolve_dims(256) == (8, 256)
    with pytest.raises(UsageError, match=r"dims \[8, 512\] exceed the model's 256; drop 512 or set embedding_dim=512"):
        settings(dims=[8, 512]).resolve_dims(256)
