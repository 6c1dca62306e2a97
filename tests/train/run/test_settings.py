"""Settings of a training stage: what is refused and how the refusal reads; where a setting that moved is found."""

from typing import Any

import pytest

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.train.run.settings import TrainConfig

TASKS = {
    "identity": {"kind": "normalized_softmax", "field": "group"},
    "category": {"kind": "softmax", "field": "category"},
}


def settings(**values: Any) -> TrainConfig:
    return parse_config(TrainConfig, {"tasks": TASKS, "mix": {"catalogue": 1}, **values}, "step 'finetune'")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dims": [4, 8], "nested_weights": [1.0]}, "nested_weights has 1 values for 2 dims; give one each"),
        ({"dims": [4, 8], "nested_weights": [1.0, -1.0]}, "'nested_weights.1' is -1.0"),
        ({"dims": [4, 8], "nested_weights": [0.0, 0.0]}, r"nested_weights \[0.0, 0.0\] are all zero"),
        ({"dims": [4, 8], "dims_per_step": 3}, "dims_per_step 3 exceeds the 2 dims; lower or drop it"),
        ({"dims_per_step": 2}, "dims_per_step 2 exceeds the 1 dims"),
        ({"dims": []}, r"dims \[\] must be positive"),
        ({"dims": [8, 4]}, r"dims \[8, 4\] must be positive"),
        ({"mix": {"a": -1.0}}, "'mix.a' is -1.0"),
        ({"mix": {}}, "'mix' is {}"),
        ({"tasks": {"a.b": TASKS["category"]}}, "task 'a.b' is not a name"),
        ({"tasks": {"training": TASKS["category"]}}, "task 'training' is not a name"),
        ({"tasks": {"a": {"kind": "softmax", "field": "groups"}}}, "'tasks.a.field' is 'groups'"),
        ({"tasks": {"a": {"kind": "softmax", "fild": "group"}}}, r"unknown key 'tasks.a.fild' \(did you mean 'field'"),
        ({"trackers": ["tensorbord"]}, r"unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\)"),
        ({"batch_size": 9}, r"batch_size 9 is not a multiple of workers.num 2"),
        (
            {"batch_size": 12, "compute": {"accumulation": 4}},
            r"compute.accumulation 4 does not divide a worker's 6 rows \(batch_size 12",
        ),
        (
            {"compute": {"precision": "float16"}},
            r"precision float16 needs a GPU; set workers.use_gpu=true, or compute.precision=bfloat16",
        ),
        (
            {
                "tasks": {"pairs": {"kind": "triplet", "field": "group"}},
                "batch_size": 4,
                "compute": {"accumulation": 2},
            },
            r"task 'pairs' compares rows, and a forward pass holds one \(batch_size 4 in 4 parts\)",
        ),
        ({"workers": {"min": 3}}, "workers: min 3 is above num 2"),
        (
            {"backbone": {"trainable": "full", "frozen_stages": 2}},
            "backbone: trainable full and frozen_stages 2 exclude each other",
        ),
        (
            {"backbone": {"trainable": "probe", "frozen_stages": 2}},
            "trainable probe and frozen_stages 2 exclude each other",
        ),
        ({"backbone": {"trainable": "partial"}}, "trainable partial needs frozen_stages of 1 or more"),
        (
            {"optimizer": {"kind": "sgd", "nesterov": True, "momentum": 0.0}},
            "optimizer: nesterov needs a momentum above 0",
        ),
        ({"optimizer": {"kind": "lars", "nesterov": True, "proxy_momentum": 0.0}}, "momentum above 0, for proxies"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"'optimizer.betas.1' is 1.0"),
        ({"optimizer": {"betas": [-0.1, 0.9]}}, r"'optimizer.betas.0' is -0.1"),
        ({"schedule": {"kind": "step"}}, r"schedule: kind step with drop_epochs \[\]: step needs epochs"),
        ({"schedule": {"drop_epochs": [1.0]}}, r"schedule: kind cosine does not read drop_epochs \(step does\)"),
        ({"optimizer": {"nesterov": True}}, r"optimizer: kind adamw does not read nesterov \(sgd, lars does\)"),
        ({"optimizer": {"kind": "sgd", "trust_coefficient": 0.1}}, r"kind sgd does not read trust_coefficient"),
        ({"schedule": {"power": 3.0}}, r"schedule: kind cosine does not read power \(polynomial does\)"),
        ({"schedule": {"kind": "cyclic", "warmup_steps": 5, "peak_epoch": 0.5}}, r"cyclic does not read warmup_steps"),
        ({"schedule": {"kind": "step", "drop_epochs": [2.0, 1.0]}}, r"\[2.0, 1.0\] must be positive and increasing"),
        ({"schedule": {"kind": "step", "drop_epochs": [0.5, 1.0]}}, r"before the end, epochs 1.0; drop 1.0"),
        ({"schedule": {"kind": "cyclic"}}, r"schedule.peak_epoch 2.0 is not before the end, epochs 1.0; lower it"),
        ({"schedule": {"warmup_fraction": 1.0}}, r"'schedule.warmup_fraction' is 1.0"),
    ],
)
def test_wrong_settings_are_explained(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"lr": 1e-3},
            r"unknown key 'lr' \(did you mean 'optimizer.lr'\?\); valid keys: augment, backbone, batch_size",
        ),
        ({"frozen_stages": 2}, r"did you mean 'backbone.frozen_stages'"),
        ({"loader_processes": 2}, r"did you mean 'loader.processes'"),
        ({"schedule_epochs": [2]}, r"did you mean 'schedule.drop_epochs'"),
        ({"num_workers": 2}, "did you mean 'workers'"),
        ({"optimizer": "sgd"}, "'optimizer' is 'sgd': Input should be a valid dictionary"),
    ],
)
def test_a_setting_outside_its_group_is_refused_with_its_place(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings(**values)


def test_fewer_workers_than_streams_do_not_change_the_result() -> None:
    elastic = settings(workers={"num": 2, "min": 1})
    assert elastic.micro_batch == 32
    assert elastic.identity() == settings().identity()
    assert elastic.identity() != settings(workers={"num": 1}).identity()
    assert settings(**elastic.model_dump()) == elastic


def test_nested_dims_must_fit_the_embedding() -> None:
    assert settings().resolve_dims(256) == (256,)
    assert settings(embedding_dim=64).resolve_dims(256) == (64,)
    assert settings(dims=[8, 256]).resolve_dims(256) == (8, 256)
    with pytest.raises(UsageError, match=r"dims \[8, 512\] exceed the model's 256; drop 512 or set embedding_dim=512"):
        settings(dims=[8, 512]).resolve_dims(256)
