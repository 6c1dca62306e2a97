"""Losses against dense torch and pytorch-metric-learning."""

import pytest
import torch
from torch.nn import functional

from lookalike.train.losses.classes import (
    Averaging,
    binarize,
    masked_mean,
    multilabel_sigmoid_loss,
    multilabel_softmax_loss,
    normalized_softmax_loss,
    softmax_loss,
)


def logits(n: int = 6, num_classes: int = 9) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(n, num_classes, dtype=torch.float64, requires_grad=True)


def test_multilabel_softmax_is_cross_entropy_with_one_kth_on_each_label() -> None:
    """Beal et al. 2021, section 3.4; Mahajan et al. 2018."""
    known = [[1, 4], [0], [2, 5, 8], [], [7, 3, 1, 0], []]
    labels = torch.tensor([row + [-1] * (4 - len(row)) for row in known])
    dense = torch.zeros(6, 9, dtype=torch.float64)
    for i, row in enumerate(known):
        for label in row:
            dense[i, label] = 1 / len(row)
    scores = logits()
    ours = multilabel_softmax_loss(scores, labels)
    (gradient,) = torch.autograd.grad(ours.sum(), scores)
    reference = functional.cross_entropy(scores, dense, reduction="none")  # all zeros where a row has no label
    (expected,) = torch.autograd.grad(reference.sum(), scores)
    assert torch.allclose(ours, reference, atol=1e-12)
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert ours[[3, 5]].tolist() == [0.0, 0.0]
    assert gradient[[3, 5]].abs().max() == 0.0


@pytest.mark.parametrize("averaging", ["mean", "sum"])
def test_multilabel_sigmoid_is_torch_s_binary_cross_entropy(averaging: Averaging) -> None:
    labels = torch.tensor([[1, 4, -1], [0, -1, -1], [2, 5, 8], [-1, -1, -1], [7, 3, 1], [-1, -1, -1]])
    dense = torch.zeros(6, 9, dtype=torch.float64)
    for i, row in enumerate(labels.tolist()):
        for label in row:
            if label >= 0:
                dense[i, label] = 1.0
    known = dense.any(dim=1)
    scores = logits()
    ours = multilabel_sigmoid_loss(scores, labels, averaging)
    each = functional.binary_cross_entropy_with_logits(scores, dense, reduction="none")
    reference = (each.mean(dim=1) if averaging == "mean" else each.sum(dim=1)) * known
    assert torch.allclose(ours, reference, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours.sum(), scores)
    (expected,) = torch.autograd.grad(reference.sum(), scores)
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert gradient[~known].abs().max() == 0.0


def test_codes_are_those_that_search_packs_and_pass_the_gradient_straight_through() -> None:
    """Bengio et al. 2013, section 4."""
    values = torch.tensor([-2.0, -0.0, 0.0, 1e-9, 3.0], requires_grad=True)
    codes = binarize(values)
    assert codes.tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0]
    assert (codes > 0).tolist() == (values > 0).tolist()
    slope = torch.arange(5.0)
    assert torch.equal(torch.autograd.grad(codes, values, slope)[0], slope)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_with_unknown_rows(smoothing: float) -> None:
    labels = torch.tensor([1, -1, 8, 0, -1, 3])
    known = labels >= 0
    scores = logits()
    ours = softmax_loss(scores, labels, smoothing)
    (gradient,) = torch.autograd.grad(ours.sum(), scores)
    reference = functional.cross_entropy(scores[known], labels[known], reduction="sum", label_smoothing=smoothing)
    (expected,) = torch.autograd.grad(reference, scores)
    assert torch.allclose(ours.sum(), reference)
    assert torch.allclose(gradient, expected)
    assert gradient[~known].abs().max() == 0.0


def test_normalised_softmax_against_pytorch_metric_learning() -> None:
    """Zhai and Wu 2019, equation 2."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    oracle = losses.NormalizedSoftmaxLoss(num_classes=7, embedding_size=5, temperature=0.05)
    embedding, labels = torch.randn(12, 5, requires_grad=True), torch.randint(0, 7, (12,))
    cosines = functional.normalize(embedding) @ functional.normalize(oracle.W, dim=0)
    ours, theirs = normalized_softmax_loss(cosines, labels, 0.05).mean(), oracle(embedding, labels)
    assert torch.allclose(ours, theirs, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(ours, (embedding, oracle.W)),
        torch.autograd.grad(theirs, (embedding, oracle.W)),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-5)


def test_masked_mean_counts_known_rows_and_keeps_a_gradient_path() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert masked_mean(losses, torch.tensor([True, False, True])).item() == 2.5
    none = masked_mean(losses, torch.zeros(3, dtype=torch.bool))
    assert none.item() == 0.0
    (gradient,) = torch.autograd.grad(none, losses)
    assert gradient.tolist() == [0.0, 0.0, 0.0]
