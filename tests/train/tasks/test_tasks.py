"""Tasks share one embedding; a row without a task's label gives that task no gradient, yet DDP sees every parameter."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lookalike.config import parse_config
from lookalike.errors import UsageError
from lookalike.train.losses.classes import binarize
from lookalike.train.losses.pairs import contrastive_loss, cosine_losses
from lookalike.train.losses.regularizers import koleo_loss, relational_loss, teacher_cosine_loss
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
    return {
        "images": torch.randn(4, 6),
        "labels": torch.tensor([[0, 2], [1, -1], [-1, -1], [4, 3]]),
        "category": torch.tensor([-1, 2, 0, -1]),
        "group": torch.tensor([3, -1, -1, 0]),
    }


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


def sparse_batch(n: int = 64) -> dict[str, torch.Tensor]:
    """Rows of which one in sixteen has a category, two in three a group, half have labels; the last quarter none."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(5, (n, 1), generator=generator)
    labels[::2] = -1
    category, group = torch.randint(3, (n,), generator=generator), torch.randint(4, (n,), generator=generator)
    category[torch.arange(n) % 16 != 5], group[torch.arange(n) % 3 == 0] = -1, -1
    labels[-n // 4 :], category[-n // 4 :], group[-n // 4 :] = -1, -1, -1
    images = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return {"images": images, "labels": labels, "category": category, "group": group}


@pytest.mark.parametrize("cuts", [[64], [32, 32], [16] * 4, [4] * 16, [1, 40, 23]])
def test_a_step_is_the_mean_over_its_rows_however_they_are_cut(cuts: list[int]) -> None:
    """Losses and gradients of parts, added up, against plain cross-entropy of the labelled rows all at once."""
    model, batch = make_model().double(), sparse_batch()
    total, _ = model(batch)
    total.backward()
    whole = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    known = batch["category"] >= 0
    scores = model.tasks["category"].head(model.encoder(batch["images"][known]))
    expected = sum(functional.cross_entropy(values, batch["category"][known]) for values in scores)
    assert torch.allclose(model(batch)[1]["category"], expected)
    model.zero_grad()
    parts = [
        dict(zip(batch, rows, strict=True))
        for rows in zip(*(column.split(cuts) for column in batch.values()), strict=True)
    ]
    category = 0.0
    for part, shares in zip(parts, model.step_shares(parts), strict=True):
        loss, losses = model(part, shares=shares)
        loss.backward()
        category += float(losses["category"])
    assert category == pytest.approx(float(expected), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "triplet", "field": "group", "mining": "random"},
        {"kind": "contrastive", "field": "group"},
        {"kind": "cosine", "field": "group"},
        {"kind": "koleo", "field": "images"},
    ],
)
def test_parts_without_pairs_weigh_nothing(values: dict[str, Any]) -> None:
    """A part of two rows of one group beside parts with no pair: the step's loss is that part's own."""
    task, lone = make_task(**values), torch.tensor([[0, 0, 1], [-1, -1, -1], [-1, 2, -1]])
    model = MultiTaskModel(nn.Linear(6, 8), {"task": task}).double()
    images = torch.randn(3, 3, 6, dtype=torch.float64)
    parts = [{"images": images[i], "group": lone[i]} for i in range(3)]
    shares = [share["task"] for share in model.step_shares(parts)]
    if values["kind"] == "koleo":
        assert all(torch.allclose(share, torch.full((1,), 1 / 3, dtype=torch.float64)) for share in shares)
        return
    assert [share.tolist() for share in shares] == [
        [1.0] * len(shares[0]),
        [0.0] * len(shares[0]),
        [0.0] * len(shares[0]),
    ]


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
    assert " ".join(TASKS) == (
        "binary contrastive cosine distill embedding_norm koleo multilabel_sigmoid "
        "multilabel_softmax normalized_softmax softmax triplet"
    )


KINDS: list[dict[str, Any]] = [
    {"kind": "softmax", "field": "category", "label_smoothing": 0.1},
    {"kind": "multilabel_softmax", "field": "labels"},
    {"kind": "multilabel_softmax", "field": "group"},
    {"kind": "multilabel_sigmoid", "field": "labels", "averaging": "sum"},
    {"kind": "multilabel_sigmoid", "field": "labels"},
    {"kind": "normalized_softmax", "field": "group"},
    {"kind": "binary", "field": "category"},
    {"kind": "softmax", "field": "category", "sample_classes": 12, "label_smoothing": 0.1},
    {"kind": "normalized_softmax", "field": "group", "sample_classes": 12},
]


def make_task(num_classes: int = 29, dims: tuple[int, ...] = (2, 3, 8), **values: Any) -> Any:
    torch.manual_seed(1)
    counts = dict.fromkeys(("labels", "category", "group"), num_classes)
    steps = values.pop("dims_per_step", None)
    config = TaskConfig(**values)
    return build_tasks({"t": config}, dims, counts, (1.0, 0.5, 2.0)[: len(dims)], dims_per_step=steps)["t"].double()


def rows(num_classes: int = 29) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.stack([torch.randperm(num_classes, generator=generator)[:3] for _ in range(10)])
    labels[2, 1:], labels[5] = -1, -1
    one, two = (torch.randint(-1, 6, (10,), generator=generator) for _ in range(2))
    teacher = torch.randn(10, 5, dtype=torch.float64, generator=generator)
    batch = {
        "labels": labels,
        "category": one,
        "group": two,
        "row": torch.arange(10) % 5,
        "teacher": teacher,
        "images": torch.zeros(10, 1),
    }
    return torch.randn(10, 8, dtype=torch.float64, generator=generator).requires_grad_(), batch


def gradients(task: nn.Module, z: torch.Tensor, batch: dict[str, torch.Tensor], step: int = 0) -> list[torch.Tensor]:
    loss = task(z, batch, step)
    return [loss.detach(), *torch.autograd.grad(loss, [z, *task.parameters()])]


@pytest.mark.parametrize("nesting", ["mrl", "mrl-e"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_large_label_spaces_in_chunks_give_what_whole_scores_give(kind: dict[str, Any], nesting: str) -> None:
    z, batch = rows()
    whole = gradients(make_task(**kind, nesting=nesting), z, batch)
    for chunk in (5, 11):
        parts = gradients(make_task(**kind, nesting=nesting, class_chunk=chunk), z, batch)
        for one, other in zip(parts, whole, strict=True):
            assert torch.allclose(one, other, atol=1e-10)
            assert one.abs().max() > 0


def test_multilabel_softmax_nested_against_dense_targets() -> None:
    """Equation 1 of Kusupati et al. over section 3.4 of Beal et al., written with torch's own cross-entropy."""
    z, batch = rows()
    task = make_task(kind="multilabel_softmax", field="labels", nesting="mrl-e", class_chunk=7)
    dense = torch.zeros(10, 29, dtype=torch.float64)
    for i, row in enumerate(batch["labels"].tolist()):
        known = [label for label in row if label >= 0]
        dense[i, known] = 1.0 / max(1, len(known))
    layer = task.head.layers[0]
    naive = sum(
        c * functional.cross_entropy(z[:, :m] @ layer.weight[:, :m].T + layer.bias, dense, reduction="sum") / 9
        for m, c in ((2, 1.0), (3, 0.5), (8, 2.0))
    )
    expected = torch.autograd.grad(naive, [z, *task.parameters()])  # type: ignore[arg-type]
    for one, other in zip(gradients(task, z, batch)[1:], expected, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_a_sample_of_classes_is_the_softmax_over_them() -> None:
    z, batch = rows()
    task = make_task(kind="softmax", field="category", sample_classes=12)
    loss, _, *by_parameter = gradients(task, z, batch, step=4)
    used = by_parameter[-1].abs().nonzero()[:, 0].tolist()  # the bias of the largest dim moves where it was scored
    known = batch["category"] >= 0
    assert len(used) == 12
    assert set(batch["category"][known].tolist()) <= set(used)
    targets = torch.tensor([used.index(label) for label in batch["category"][known].tolist()])
    naive = sum(
        c * functional.cross_entropy((z[known, :m] @ layer.weight.T + layer.bias)[:, used], targets)
        for m, c, layer in zip((2, 3, 8), (1.0, 0.5, 2.0), task.head.layers, strict=True)
    )
    assert torch.allclose(loss, naive)  # type: ignore[arg-type]
    assert gradients(task, z, batch, step=5)[0] != loss


def test_binary_scores_the_codes_of_every_prefix() -> None:
    z, batch = rows()
    task = make_task(kind="binary", field="category", nesting="mrl-e", temperature=0.1)
    known, proxy = batch["category"] >= 0, task.head.proxies[0]
    naive = torch.zeros(())
    for m, c in ((2, 1.0), (3, 0.5), (8, 2.0)):
        code = torch.where(z[known, :m] > 0, 1.0, -1.0).double()
        cosines = functional.cosine_similarity(code[:, None], proxy[None, :, :m], dim=2)
        naive = naive + c * functional.cross_entropy(cosines / 0.1, batch["category"][known])
    loss = task(z, batch)
    assert torch.allclose(loss, naive)
    assert torch.equal(task(torch.sign(z) * 5, batch), loss)  # sizes do not matter
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient[known].abs().min() > 0  # straight through
    assert binarize(z).unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "loss"),
    [
        (
            {"kind": "contrastive", "field": "group", "temperature": 0.1},
            lambda z, b: contrastive_loss(z, b["group"], z, b["group"], temperature=0.1),
        ),
        (
            {"kind": "contrastive", "field": "row", "across_workers": True},
            lambda z, b: contrastive_loss(z, b["row"], z, b["row"], temperature=0.05),
        ),
        (
            {"kind": "cosine", "field": "category", "margin": 0.4},
            lambda z, b: cosine_losses(z, b["category"], 0.4).sum(),
        ),
        (
            {"kind": "distill", "field": "teacher", "temperature": 0.1},
            lambda z, b: relational_loss(z, b["teacher"], 0.1),
        ),
        (
            {"kind": "distill", "field": "teacher", "temperature": 0.1, "cosine": 2.0},
            lambda z, b: (
                relational_loss(z, b["teacher"], 0.1)
                + (2.0 * teacher_cosine_loss(z, b["teacher"]) if z.shape[1] <= 5 else 0.0)
            ),
        ),
        ({"kind": "koleo", "field": "images"}, lambda z, b: koleo_loss(z, b["row"])),
        ({"kind": "embedding_norm", "field": "images"}, lambda z, b: (z**2).sum(dim=1).mean()),
    ],
)
def test_prefix_tasks_are_the_plain_sum_over_dims(values: dict[str, Any], loss: Any) -> None:
    """sentence-transformers' MatryoshkaLoss: the sum of weight * loss(prefix), each normalised by itself."""
    z, batch = rows()
    task = make_task(**values)
    naive = sum(
        c * loss(functional.normalize(z[:, :m]) if values["kind"] != "embedding_norm" else z[:, :m], batch)
        for m, c in ((2, 1.0), (3, 0.5), (8, 2.0))
    )
    ours, ours_gradient = gradients(task, z, batch)
    assert torch.allclose(ours, naive)
    assert torch.allclose(ours_gradient, torch.autograd.grad(naive, z)[0], atol=1e-9)
    assert ours_gradient.abs().max() > 0


def test_triplets_are_mined_anew_at_every_step_and_alike_when_a_step_is_repeated() -> None:
    z, batch = rows()
    task = make_task(kind="triplet", field="group", mining="random")
    losses = [task(z, batch, step).item() for step in (0, 0, 1, 2)]
    assert losses[0] == losses[1]
    assert len(set(losses)) > 1
    assert not list(task.parameters())


def test_class_losses_are_float32_under_autocast() -> None:
    """Scores come in bfloat16; a softmax taken in it would round losses to 1/256 of their size."""
    torch.manual_seed(0)
    task = build_tasks({"c": TaskConfig(kind="softmax", field="category")}, (4, 8), CLASSES, (1.0, 1.0))["c"]
    embedding, labels = torch.randn(16, 8), torch.arange(16) % CLASSES["category"]
    with torch.autocast("cpu", torch.bfloat16):
        loss, scores = task(embedding, {"category": labels}), task.head(embedding)
    assert {score.dtype for score in scores} == {torch.bfloat16}
    expected = sum(torch.nn.functional.cross_entropy(score.float(), labels) for score in scores)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_prefix_tasks_stay_exact_under_autocast() -> None:
    z, batch = rows()
    task = make_task(kind="contrastive", field="group")
    plain = task(z.float(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(task(z.float(), batch), plain)
        assert task(z.bfloat16(), batch).dtype == torch.float32


@pytest.mark.parametrize("nesting", ["mrl", "mrl-e"])
def test_some_dims_a_step_are_the_sum_over_those_and_reach_every_parameter(nesting: str) -> None:
    z, batch = rows()
    task = make_task(kind="softmax", field="category", nesting=nesting, dims_per_step=2)
    seen = set()
    for step in range(12):
        dims, weights = task.active(step)
        seen.add(dims)
        own = make_task(kind="softmax", field="category", nesting=nesting)
        known = batch["category"] >= 0
        scores = dict(zip((2, 3, 8), own.head(z), strict=True))
        naive = sum(
            c * functional.cross_entropy(scores[m][known], batch["category"][known])
            for m, c in zip(dims, weights, strict=True)
        )
        loss, *found = gradients(task, z, batch, step)
        assert torch.allclose(loss, naive)  # type: ignore[arg-type]
        assert len(found) == 1 + len(list(task.parameters()))  # autograd.grad fails when one is not reached
    assert seen == {(2, 8), (3, 8)}


def test_a_task_of_one_dim_reads_the_first_features_of_a_wider_embedding() -> None:
    """FF-k of Kusupati et al. 2022, section 4: the classifier sees k features of the same backbone."""
    z, batch = rows()
    counts = dict.fromkeys(("labels", "category", "group"), 29)
    config = TaskConfig(kind="softmax", field="category", dims=(3,))
    task = build_tasks({"t": config}, (2, 3, 8), counts, (1.0, 0.5, 2.0))["t"].double()
    _, gradient, *_ = gradients(task, z, batch)
    assert gradient[:, :3].abs().max() > 0
    assert gradient[:, 3:].abs().max() == 0
    assert [tuple(p.shape) for p in task.parameters()] == [(29, 3), (29,)]
    assert task.weights == {3: 0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "softmax", "field": "category", "dims": [8, 4]}, r"dims \[8, 4\] must be positive and strictly incr"),
        ({"kind": "softmax", "field": "category", "dims": []}, r"dims \[\] must be positive"),
        ({"kind": "softmax", "field": "category", "dims": [0, 4]}, r"dims \[0, 4\] must be positive"),
        ({"kind": "softmax", "field": "row"}, "kind 'softmax' cannot read field 'row'; it reads category, group"),
        ({"kind": "triplet", "field": "labels"}, "kind 'triplet' cannot read field 'labels'; it reads category, group"),
        ({"kind": "distill", "field": "group"}, "kind 'distill' cannot read field 'group'; it reads teacher"),
        (
            {"kind": "triplet", "field": "row", "label_smoothing": 0.1, "shard": True},
            "kind 'triplet' does not read label_smoothing, shard; drop it",
        ),
        ({"kind": "softmax", "field": "price"}, "'field' is 'price'"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_config(TaskConfig, values, "task 't'")


def test_settings_survive_the_way_to_the_workers() -> None:
    for values in (*KINDS, {"kind": "triplet", "field": "row", "dims": (2, 4)}):
        config = TaskConfig(**values)
        assert TaskConfig.model_validate(config.model_dump(mode="json")) == config


def test_dims_that_the_embedding_lacks_are_refused() -> None:
    config = TaskConfig(kind="softmax", field="category", dims=(3, 4))
    with pytest.raises(UsageError, match=r"task 'x' has dims \[3, 4\], but .* nested at \[4, 8\]; drop 3"):
        build_tasks({"x": config}, (4, 8), CLASSES, (1.0, 1.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "normalized_softmax", "field": "group"},
        {"kind": "normalized_softmax", "field": "group", "nesting": "mrl-e"},
        {"kind": "triplet", "field": "group", "mining": "distance_weighted"},
        {"kind": "contrastive", "field": "group"},
        {"kind": "cosine", "field": "group"},
        {"kind": "distill", "field": "teacher", "cosine": 1.0},
        {"kind": "koleo", "field": "images"},
    ],
)
def test_a_row_of_zeros_has_no_direction_and_gets_no_gradient(settings: dict[str, Any]) -> None:
    """An image whose features are all zero: its gradient would be the inverse of its length, 1e9 and more."""
    z, batch = rows()
    batch = {**batch, "teacher": torch.randn(len(z), 6, dtype=z.dtype), "images": z}
    start = z.detach().clone()
    start[1], start[2, :4] = 0.0, 0.0  # the whole embedding, and its first nested dim
    start.requires_grad_()
    make_task(**settings)(start, batch).backward()
    assert start.grad is not None
    assert start.grad.isfinite().all()
    assert start.grad[1].abs().max() == 0.0
    assert 0.0 < start.grad.abs().max() < 1e3
