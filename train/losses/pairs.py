"""Metric losses of pairs of rows at one nested dim, as pure functions; rows of equal value are positives.

Legend: n rows, m their dims, N candidate rows (the same n, or those of all workers). ``values`` int64 [n] say which
rows belong together; a value below zero is not known, and its row neither pulls nor pushes. Vectors are normalised
here, so a prefix is normalised after its truncation (Kusupati et al. 2022, section 3). A batch without a pair gives
zero with a gradient path.
"""

import math
from typing import Literal, NamedTuple

import torch

from lookalike.train.losses.classes import masked_mean, unit_rows

Mining = Literal["random", "semi_hard", "distance_weighted"]
NEAREST, FARTHEST = 0.5, 1.4


class PairMasks(NamedTuple):
    """Masks [n, N] of pairs; pairs with an unknown value are in neither."""

    positives: torch.Tensor
    negatives: torch.Tensor


def relate(values: torch.Tensor, candidates: torch.Tensor, offset: int = 0) -> PairMasks:
    """Masks [n, N] of positive and of negative pairs; row i is candidate ``offset + i`` and makes no pair with
    itself."""
    known = (values >= 0)[:, None] & (candidates >= 0)[None]
    same = values[:, None] == candidates[None]
    apart = torch.ones_like(same)
    rows = torch.arange(len(values), device=values.device)
    apart[rows, rows + offset] = False
    return PairMasks(known & same & apart, known & ~same)


def unit_distances(vectors: torch.Tensor) -> torch.Tensor:
    """Euclidean distances [n, n] of the normalised rows [n, m]; the gradient at distance zero is zero."""
    unit = unit_rows(vectors)
    squared = 2.0 - 2.0 * unit @ unit.T
    return squared.clamp_min(1e-12).sqrt()


def distance_log_weights(distances: torch.Tensor, negatives: torch.Tensor, dim: int) -> torch.Tensor:
    """Log of the sampling weight [n, n] of each negative: the inverse density of distances on the unit sphere in
    ``dim`` dimensions, ``(2 - d) log D - (d - 3)/2 log(1 - D^2/4)`` (Wu et al. 2017, section 4); -inf for all others.

    D is clipped at 0.5 from below. Only D < 1.4 is drawn, or any negative if none is that near (it gives no loss). Each
    row's largest weight is subtracted, because raw values overflow from a few hundred dimensions on.
    """
    near = negatives & (distances < FARTHEST)
    clipped = distances.clamp(NEAREST, FARTHEST)
    weights = (2.0 - dim) * clipped.log() - (dim - 3.0) / 2.0 * (1.0 - clipped.square() / 4.0).log()
    weights = weights.masked_fill(~near, -math.inf)
    weights = weights - weights.amax(dim=1, keepdim=True).clamp_min(-1e30)
    everywhere = torch.where(negatives, 0.0, -math.inf).to(weights.dtype)
    return torch.where(near.any(dim=1, keepdim=True), weights, everywhere)


def draw_negatives(log_weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One negative [n, n] for each pair (anchor, positive), drawn by the anchor's row of ``log_weights`` [n, n].

    ``uniform`` [n, n] in [0, 1) is looked up in the cumulative weights. Rows without negatives give any index.
    """
    cumulative = log_weights.double().exp().cumsum(dim=1)
    picked = torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)
    return picked.clamp_max(log_weights.shape[1] - 1)


def semi_hard_negatives(distances: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """For each pair (anchor, positive) the nearest negative [n, n] beyond the positive, or else the farthest negative
    (Schroff et al. 2015, section 3.2)."""
    order = distances.masked_fill(~negatives, math.inf).sort(dim=1)
    rank = torch.searchsorted(order.values, distances.contiguous(), right=True)
    rank = torch.minimum(rank, (negatives.sum(dim=1, keepdim=True) - 1).clamp_min(0))
    return order.indices.gather(1, rank)


def triplet_loss(
    vectors: torch.Tensor, values: torch.Tensor, uniform: torch.Tensor, *, mining: Mining, margin: float, beta: float
) -> torch.Tensor:
    """Scalar loss of all pairs (anchor, positive) of [n, m] vectors, each with one mined negative.

    ``random`` and ``semi_hard``: mean of ``max(0, D_ap - D_an + margin)`` over the pairs (Schroff et al. 2015,
    equation 2, but with the distance itself where they square it). ``distance_weighted``: the margin loss
    ``max(0, D_ap - beta + margin) + max(0, beta - D_an + margin)`` over the number of terms above zero (Wu et al. 2017,
    section 4). ``uniform`` [n, n] in [0, 1) draws negatives.
    """
    positives, negatives = relate(values, values)
    pairs = positives & negatives.any(dim=1, keepdim=True)
    distances = unit_distances(vectors)
    detached = distances.detach()
    if mining == "semi_hard":
        picked = semi_hard_negatives(detached, negatives)
    else:
        equal = torch.where(negatives, 0.0, -math.inf)
        weights = equal if mining == "random" else distance_log_weights(detached, negatives, vectors.shape[1])
        picked = draw_negatives(weights, uniform)
    to_negative = distances.gather(1, picked)
    if mining != "distance_weighted":
        return masked_mean((distances - to_negative + margin).relu(), pairs)
    pull, push = (distances - beta + margin).relu() * pairs, (beta - to_negative + margin).relu() * pairs
    return (pull + push).sum() / ((pull > 0).sum() + (push > 0).sum()).clamp_min(1)


def contrastive_loss(
    vectors: torch.Tensor,
    values: torch.Tensor,
    candidates: torch.Tensor,
    candidate_values: torch.Tensor,
    *,
    temperature: float,
    offset: int = 0,
) -> torch.Tensor:
    """InfoNCE with several positives: the mean of ``logsumexp(s) - mean(s of positives)``, s = cosine / T.

    The mean is over the anchors [n, m] that have a positive, s over the other candidates [N, m].

    With two views of a picture as equal values it is SimCLR's loss (Chen et al. 2020, equation 1), with classes the
    supervised one (Khosla et al. 2020, equation 2). Row i is candidate ``offset + i``.
    """
    positives, negatives = relate(values, candidate_values, offset)
    cosines = unit_rows(vectors) @ unit_rows(candidates).T / temperature
    others = torch.where(positives | negatives, cosines, -1e30)
    mean = (cosines * positives).sum(dim=1) / positives.sum(dim=1).clamp_min(1)
    return masked_mean(others.logsumexp(dim=1) - mean, positives.any(dim=1))


def cosine_losses(vectors: torch.Tensor, values: torch.Tensor, margin: float) -> torch.Tensor:
    """Two losses [2]: the mean of ``1 - cos`` over positive pairs, and of ``max(0, cos - margin)`` over negative ones.

    Their sum is torch's cosine embedding loss, with the two kinds averaged separately so that the many negatives do not
    drown the pull.
    """
    positives, negatives = relate(values, values)
    unit = unit_rows(vectors)
    cosines = unit @ unit.T
    return torch.stack([masked_mean(1.0 - cosines, positives), masked_mean((cosines - margin).relu(), negatives)])


def two_tower_loss(left: torch.Tensor, right: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric InfoNCE of two towers' vectors [n, m], row i of one belonging to row i of the other (Radford et al.
    2021, figure 3); nest it with ``matryoshka.nested_pair_loss``."""
    cosines = unit_rows(left) @ unit_rows(right).T / temperature
    diagonal = cosines.diagonal()
    return (cosines.logsumexp(dim=1) - diagonal + cosines.logsumexp(dim=0) - diagonal).mean() / 2
