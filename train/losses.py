"""Losses as pure functions: one value per row, so that the caller masks, weights and averages.

Legend: n rows, C classes, K most labels a row. Labels below zero mean "not known" or padding.
"""

import torch
from torch.nn import functional


def softmax_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy per row [n] of logits [n, C] and labels [n]; rows with label < 0 give zero."""
    safe = labels.clamp_min(0)
    loss = functional.cross_entropy(logits, safe, reduction="none", label_smoothing=label_smoothing)
    return loss * (labels >= 0)


def multilabel_softmax_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per row [n] against the target that puts 1/k on each of the row's k labels.

    logits [n, C]; labels [n, K] padded with -1. Equals ``logsumexp(logits) - mean(logits[labels])``, so no dense target
    is built for large label spaces. Rows without labels give zero.
    (Mahajan et al. 2018; Beal et al. 2021, section 3.4.)
    """
    known = labels >= 0
    count = known.sum(dim=1)
    picked = logits.gather(1, labels.clamp_min(0)).masked_fill(~known, 0.0)
    mean = picked.sum(dim=1) / count.clamp_min(1)
    return (logits.logsumexp(dim=1) - mean) * (count > 0)


def normalized_softmax_loss(cosines: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Normalised softmax per row [n]: cross-entropy of cosines [n, C] between embedding and class proxies over T.

    (Zhai and Wu 2019, equation 2; T = 0.05 there.)
    """
    return softmax_loss(cosines / temperature, labels)


def masked_mean(losses: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Mean of losses [n] over rows where known [n] is true; zero with a gradient path when there are none.

    The gradient path matters: every parameter of every task then takes part in every step, as DDP expects.
    """
    return (losses * known).sum() / known.sum().clamp_min(1)
