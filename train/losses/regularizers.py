"""Losses of a whole batch at one nested dim: spread, size, and similarity to a teacher's batch.

Legend: n rows, m dims of the prefix, Dt of the teacher.
"""

import torch

from lookalike.train.losses.classes import masked_mean, unit_rows


def koleo_loss(vectors: torch.Tensor, pictures: torch.Tensor | None = None) -> torch.Tensor:
    """Spread of the normalised rows [n, m]: minus the mean log distance to the nearest row of another picture
    (Sablayrolles et al. 2019, equation 2, the Kozachenko-Leonenko estimate of entropy).

    ``pictures`` int64 [n]: rows of equal value show the same picture; None: all differ. Rows without another picture
    are left out; none at all gives zero.
    """
    unit = unit_rows(vectors)
    pictures = torch.arange(len(vectors), device=vectors.device) if pictures is None else pictures
    others = pictures[:, None] != pictures[None]
    with torch.no_grad():
        nearest = torch.where(others, unit @ unit.T, -2.0).argmax(dim=1)
    distances = (unit - unit[nearest]).square().sum(dim=1).clamp_min(1e-12).sqrt()
    return masked_mean(-distances.log(), others.any(dim=1))


def embedding_norm_loss(vectors: torch.Tensor) -> torch.Tensor:
    """Mean squared Euclidean norm of the rows [n, m] (Sohn 2016, section 3.2.2)."""
    return vectors.square().sum(dim=1).mean()


def relational_loss(vectors: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over rows of KL(teacher || student) between the distributions that softmax of cosines over T puts on the
    other rows of the batch (Passalis and Tefas 2018, section 3). It compares only similarities, so
    vectors [n, m] and teacher [n, Dt] may differ in size. Rows whose teacher is not finite or all zero are left out.
    """
    known = teacher_known(teacher)
    pairs = known[:, None] & known[None] & ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    student = _log_similarities(vectors, pairs, temperature)
    target = _log_similarities(teacher.nan_to_num().to(vectors.dtype), pairs, temperature).detach()
    divergence = (target.exp() * (target - student) * pairs).sum(dim=1)
    return masked_mean(divergence, pairs.any(dim=1))


def _log_similarities(vectors: torch.Tensor, pairs: torch.Tensor, temperature: float) -> torch.Tensor:
    unit = unit_rows(vectors)
    return torch.where(pairs, unit @ unit.T / temperature, -1e30).log_softmax(dim=1)


def teacher_cosine_loss(vectors: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean of ``1 - cos`` between vectors [n, m] and the teacher's prefix of the same size, for a nested teacher."""
    prefix = teacher[:, : vectors.shape[1]].nan_to_num().to(vectors.dtype)
    return masked_mean(1.0 - (unit_rows(vectors) * unit_rows(prefix)).sum(dim=1), teacher_known(teacher))


def teacher_known(teacher: torch.Tensor) -> torch.Tensor:
    """Mask [n] of the teacher's vectors [n, Dt] that are finite and not all zero."""
    return teacher.isfinite().all(dim=1) & (teacher != 0).any(dim=1)
