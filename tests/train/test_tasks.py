"""Tasks share one embedding; a row without a task's label gives that task no gradient, yet DDP sees every parameter."""

import pytest
import torch
from torch import nn

from lookalike.errors import UsageError
from lookalike.train.tasks import TASKS, MultiTaskModel, TaskConfig, build_tasks

DIMS, CLASSES = (4, 8), {"labels": 5, "category": 3, "group": 4}
CONFIGS = {
    "weak": TaskConfig(kind="multilabel_softmax", field="labels", weight=0.5),
    "category": TaskConfig(kind="softmax", field="category", nesting="mrl-e"),
    "identity": TaskConfig(kind="normalized_softmax", field="group", weight=2.0),
}


def make_model() -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel(nn.Linear(6, 8), build_tasks(CONFIGS, DIMS, CLASSES, (1.0, 1.0)))


def make_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"images": torch.randn(4, 6), "labels": torch.tensor([[0, 2], [1, -1], [-1, -1], [4, 3]]),
            "category": torch.tensor([-1, 2, 0, -1]), "group": torch.tensor([3, -1, -1, 0])}  # fmt: skip


def test_the_total_is_the_weighted_sum() -> None:
    total, losses = make_model()(make_batch())
    assert torch.allclose(total, 0.5 * losses["weak"] + losses["category"] + 2.0 * losses["identity"])
    assert not any(loss.requires_grad for loss in losses.values())


def test_rows_without_a_label_give_their_task_no_gradient() -> None:
    model, batch = make_model(), make_batch()
    for name, known in {"weak": [0, 1, 3], "category": [1, 2], "identity": [0, 3]}.items():
        embedding = model.encoder(batch["images"]).detach().requires_grad_()
        model.tasks[name](embedding, batch).backward()
        assert embedding.grad is not None
        assert embedding.grad.abs().sum(dim=1).nonzero()[:, 0].tolist() == known


def test_the_loss_of_a_task_is_the_mean_over_its_rows() -> None:
    model, batch = make_model(), make_batch()
    few = {name: tensor[[1, 2]] for name, tensor in batch.items()}
    task = model.tasks["category"]
    assert torch.allclose(task(model.encoder(batch["images"]), batch), task(model.encoder(few["images"]), few))


def test_a_batch_without_any_label_still_reaches_every_parameter() -> None:
    """DDP waits for a gradient of every parameter on every worker."""
    model, batch = make_model(), make_batch()
    for name in CLASSES:
        batch[name] = torch.full_like(batch[name], -1)
    total, _ = model(batch)
    total.backward()
    assert total.item() == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0.0, name


def test_unknown_kinds_are_explained() -> None:
    with pytest.raises(UsageError, match=r"unknown task 'sofmax' \(did you mean 'softmax'\?\)"):
        TASKS.get("sofmax")
    assert list(TASKS) == ["multilabel_softmax", "normalized_softmax", "softmax"]
