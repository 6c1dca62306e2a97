"""Losses against dense torch and pytorch-metric-learning."""

import pytest
import torch
from torch.nn import functional

from lookalike.train.losses import masked_mean, multilabel_softmax_loss, normalized_softmax_loss, softmax_loss


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
    embedding, labels = torch.randn(12, 5), torch.randint(0, 7, (12,))
    cosines = functional.normalize(embedding) @ functional.normalize(oracle.W.detach(), dim=0)
    ours = normalized_softmax_loss(cosines, labels, 0.05).mean()
    assert torch.allclose(ours, oracle(embedding, labels), atol=1e-5)


def test_masked_mean_counts_known_rows_and_keeps_a_gradient_path() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert masked_mean(losses, torch.tensor([True, False, True])).item() == 2.5
    none = masked_mean(losses, torch.zeros(3, dtype=torch.bool))
    assert none.item() == 0.0
    (gradient,) = torch.autograd.grad(none, losses)
    assert gradient.tolist() == [0.0, 0.0, 0.0]
