"""Classification losses as pure functions: one value per row, so that the caller masks, weights and averages.

Legend: n rows, C classes, K most labels a row. Labels below zero mean "not known" or padding; the labels of a row are
distinct. Losses of pairs of rows are in ``pairs``, losses of whole batches in ``regularizers``.
"""

from typing import Literal

import torch
from torch.nn import functional

Averaging = Literal["mean", "sum"]


SHORTEST = 1e-6
"""Length below which a vector counts as zero."""


def unit_rows(vectors: torch.Tensor) -> torch.Tensor:
    """Rows [n, m] scaled to length 1.

    A row that counts as zero (all features of an image are zero) has no direction: it stays zero and gets no gradient,
    which would otherwise be as large as the inverse of its length.
    """
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(length > SHORTEST, length, torch.inf)


def softmax_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy per row [n] of logits [n, C] and labels [n]; rows with label < 0 give zero."""
    safe = labels.clamp_min(0)
    loss = functional.cross_entropy(logits, safe, reduction="none", label_smoothing=label_smoothing)
    return loss * (labels >= 0)


def multilabel_softmax_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per row [n] against a target of 1/k on each of the row's k labels.

    logits [n, C]; labels [n, K] padded with -1. Equals ``logsumexp(logits) - mean(logits[labels])``, so large label
    spaces need no dense target. Rows without labels give zero.
    (Mahajan et al. 2018; Beal et al. 2021, section 3.4.)
    """
    labelled = labels >= 0
    mean = _sum_of_labels(logits, labels) / labelled.sum(dim=1).clamp_min(1)
    return (logits.logsumexp(dim=1) - mean) * labelled.any(dim=1)


def multilabel_sigmoid_loss(logits: torch.Tensor, labels: torch.Tensor, averaging: Averaging = "mean") -> torch.Tensor:
    """Binary cross-entropy per row [n], over all classes, of logits [n, C]; labels [n, K], padded with -1, have target
    1.

    Equals ``sum(softplus(logits)) - sum(logits[labels])``, divided by C for the mean, as torch and timm average;
    the sum is the negative log-likelihood of independent labels. Rows without labels give zero.
    """
    total = functional.softplus(logits).sum(dim=1) - _sum_of_labels(logits, labels)
    scale = 1.0 if averaging == "sum" else 1.0 / logits.shape[1]
    return total * scale * (labels >= 0).any(dim=1)


def _sum_of_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, labels.clamp_min(0)).masked_fill(labels < 0, 0.0).sum(dim=1)


def normalized_softmax_loss(cosines: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Normalised softmax per row [n]: cross-entropy of cosines [n, C] between embedding and class proxies over T.

    (Zhai and Wu 2019, equation 2; T = 0.05 there.)
    """
    return softmax_loss(cosines / temperature, labels)


def masked_mean(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of losses [n] over rows where mask [n] is true; zero, with a gradient path, if there are none.

    With the gradient path every parameter of every task takes part in every step, as DDP expects.
    """
    return (losses * mask).sum() / mask.sum().clamp_min(1)


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: torch.Tensor) -> torch.Tensor:
        return torch.where(values > 0, 1.0, -1.0).to(values.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def binarize(values: torch.Tensor) -> torch.Tensor:
    """The codes -1 and +1 (``x > 0``, as the shortlist ``binary-signs`` packs them), with the gradient passed straight
    through (Bengio et al. 2013, section 4)."""
    codes: torch.Tensor = _Binarize.apply(values)  # type: ignore[no-untyped-call]
    return codes
