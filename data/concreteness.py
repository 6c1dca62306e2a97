"""Thousands of small classifiers trained at once, as batched matrix products on CPU or GPU.

Each model is one hidden layer on frozen features and answers one question: does the term apply to this picture? Its
accuracy on pictures it has not seen is the term's visual concreteness (Pinterest section 3.2.1). Every picture is held
out once: with F folds, F models a term. Suffix legend: M models, S samples, D features, H hidden units.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from lookalike.data.dictionary import ProbeConfig, Questions
from lookalike.seeds import derive_seed


def train_probes(features: NDArray[np.float32], questions: Questions, config: ProbeConfig, seed: int) -> NDArray[Any]:
    """Held-out hits [T] of the terms' classifiers over ``features`` [n, d] (standardised by the caller).

    All models start from the same weights, so a term's result depends on its own samples only.
    """
    torch.set_num_threads(1)  # results must not depend on how a machine splits its sums
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index = torch.from_numpy(np.maximum(questions.rows, 0)).to(device)
    valid = torch.from_numpy(questions.rows >= 0).to(device)
    folds = torch.arange(config.folds, device=device)
    held_out_MS = (torch.from_numpy(questions.fold).to(device)[:, None] == folds[:, None]).flatten(0, 1)
    valid_MS = valid.repeat_interleave(config.folds, dim=0)
    target_MS = torch.from_numpy(questions.target).to(device).repeat_interleave(config.folds, dim=0)
    x_MSD = torch.from_numpy(features).to(device)[index].repeat_interleave(config.folds, dim=0)
    weight_MS = (valid_MS & ~held_out_MS).float()
    weight_MS /= weight_MS.sum(dim=1, keepdim=True).clamp(min=1)
    parameters = _initial(len(x_MSD), features.shape[1], config.hidden, seed, device)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    for _ in range(config.steps):
        loss = binary_cross_entropy_with_logits(_logits(x_MSD, parameters), target_MS, reduction="none")
        optimizer.zero_grad(set_to_none=True)
        (loss * weight_MS).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        right_MS = (_logits(x_MSD, parameters) > 0) == (target_MS > 0.5)
    hits = (right_MS & held_out_MS & valid_MS).sum(dim=1).view(-1, config.folds).sum(dim=1)
    return hits.cpu().numpy()


def _initial(models: int, dim: int, hidden: int, seed: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "probe"))
    first = torch.randn(dim, hidden, generator=generator) / dim**0.5
    second = torch.randn(hidden, 1, generator=generator) / hidden**0.5
    starts = [first, torch.zeros(1, hidden), second, torch.zeros(1, 1)]
    return [start.expand(models, *start.shape).contiguous().to(device).requires_grad_() for start in starts]


def _logits(x_MSD: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    first_MDH, bias_M1H, second_MH1, bias_M11 = parameters
    hidden_MSH = torch.relu(torch.baddbmm(bias_M1H, x_MSD, first_MDH))
    return torch.baddbmm(bias_M11, hidden_MSH, second_MH1).squeeze(-1)
