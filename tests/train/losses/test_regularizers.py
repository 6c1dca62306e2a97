"""Losses of a whole batch against loops, pytorch-metric-learning and torch's divergence (float64)."""

import math

import pytest
import torch
from torch.nn import functional

from lookalike.train.losses.regularizers import (
    embedding_norm_loss,
    koleo_loss,
    relational_loss,
    teacher_cosine_loss,
    teacher_known,
)


def rows(n: int = 8, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, z: torch.Tensor) -> None:
    assert torch.allclose(ours, theirs, rtol=1e-9)
    one, other = torch.autograd.grad(ours, z)[0], torch.autograd.grad(theirs, z)[0]
    assert torch.allclose(one, other, atol=1e-9)
    assert one.abs().max() > 0


def test_koleo_by_a_loop() -> None:
    """Sablayrolles et al. 2019, equation 2."""
    z = rows()
    unit = [row / row.norm() for row in z]
    nearest = [torch.stack([(a - b).norm() for j, b in enumerate(unit) if j != i]).min() for i, a in enumerate(unit)]
    assert_same(koleo_loss(z), -torch.stack(nearest).log().mean(), z)
    assert koleo_loss(z[:1]).item() == 0.0


def test_koleo_of_opposite_and_of_equal_rows() -> None:
    assert koleo_loss(torch.tensor([[3.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-math.log(2.0))
    z = torch.ones(2, 4, requires_grad=True)  # at distance zero there is no direction to push in
    (gradient,) = torch.autograd.grad(koleo_loss(z), z)
    assert torch.isfinite(gradient).all()


def test_koleo_spreads() -> None:
    z = (rows(12, 3) * 0.1 + 1.0).detach().requires_grad_()
    before = koleo_loss(z)
    (gradient,) = torch.autograd.grad(before, z)
    assert koleo_loss(z - 0.01 * gradient) < before


def test_embedding_norm_against_pytorch_metric_learning() -> None:
    regularizers = pytest.importorskip("pytorch_metric_learning.regularizers")
    z = rows()
    assert_same(embedding_norm_loss(z), (regularizers.LpRegularizer(p=2, power=2)(z)), z)


@pytest.mark.parametrize("teacher_dim", [3, 5, 9])
def test_relational_distillation_against_torch_s_divergence(teacher_dim: int) -> None:
    z, teacher = rows(), rows(dim=teacher_dim, seed=1).detach()
    teacher[2], teacher[5, 0] = 0.0, torch.nan
    known = [0, 1, 3, 4, 6, 7]

    def rest(vectors: torch.Tensor) -> torch.Tensor:  # cosines to the other known rows, one row each
        unit = functional.normalize(vectors[known])
        cosines = unit @ unit.T / 0.1
        return cosines[~torch.eye(6, dtype=torch.bool)].view(6, 5).log_softmax(dim=1)

    theirs = functional.kl_div(rest(z), rest(teacher), log_target=True, reduction="batchmean")
    ours = relational_loss(z, teacher, 0.1)
    assert_same(ours, theirs, z)
    assert torch.autograd.grad(relational_loss(z, teacher, 0.1), z)[0][[2, 5]].abs().max() == 0.0
    assert teacher_known(teacher).nonzero()[:, 0].tolist() == known


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    teacher = rows()
    rotation = torch.linalg.qr(rows(5, 5, seed=3).detach()).Q
    assert relational_loss(3.0 * teacher @ rotation, teacher, 0.05).item() == pytest.approx(0.0, abs=1e-12)


def test_teacher_cosine_reads_the_teacher_s_prefix() -> None:
    z, teacher = rows(dim=3), rows(dim=7, seed=2).detach()
    teacher[4] = torch.nan
    keep = [0, 1, 2, 3, 5, 6, 7]
    theirs = functional.cosine_embedding_loss(z[keep], teacher[keep, :3], torch.ones(7))
    assert_same(teacher_cosine_loss(z, teacher), theirs, z)


def test_without_a_teacher_there_is_a_gradient_path_and_no_gradient() -> None:
    z = rows()
    loss = relational_loss(z, torch.full((8, 4), torch.nan), 0.1) + teacher_cosine_loss(z, torch.zeros(8, 5))
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == 0.0
    assert gradient.abs().max() == 0.0


def test_koleo_does_not_push_the_views_of_a_picture_apart() -> None:
    """Two views of each of six pictures, against a loop over the rows of the other pictures."""
    z = functional.normalize(torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    pictures = torch.arange(12) % 6
    z[6:] = z[:6] + 0.001
    unit = functional.normalize(z)
    expected = -sum(
        math.log(min(float((unit[i] - unit[j]).norm()) for j in range(12) if i % 6 != j % 6)) for i in range(12)
    )
    assert koleo_loss(z, pictures).item() == pytest.approx(expected / 12, rel=1e-9)
    assert koleo_loss(z).item() > koleo_loss(z, pictures).item() + 1.0
    assert koleo_loss(z, torch.zeros(12)).item() == 0.0
