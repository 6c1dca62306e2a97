"""Sums over classes that a classification loss needs, computed chunk by chunk without holding the logits.

Softmax, multi-label softmax and multi-label sigmoid read three things from the scores [n, C] of a nested dim: a
reduction over all classes (log-sum-exp, or the sum of softplus), the scores of the row's own labels, and, for label
smoothing, the sum of all scores. They are computed here for all nested dims over chunks of classes and, if there are
several chunks, computed again in the backward pass, so that at most M x n x chunk scores exist at a time.

Weight-tied (MRL-E): within a chunk the scores of a dim are those of the dim before plus one block's product; in the
backward pass a block gets the sum over all dims that hold it. Each direction costs one full-size matmul.

Legend: n rows, D embedding size, C classes, c classes of a chunk, m a nested dim, M nested dims, K most labels of a
row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lookalike.train.losses.classes import SHORTEST

Over = Literal["logsumexp", "softplus"]
NARROW = 16
"""Products of at most this many columns are computed transposed: otherwise BLAS on CPUs takes up to 8 times longer."""


@dataclass(frozen=True)
class Factors:
    """Scores of nested dim i as factors: ``z[:, :m] @ W_i[:, :m].T + bias_i``, or ``scale`` times their cosine."""

    dims: tuple[int, ...]
    weights: tuple[torch.Tensor, ...]
    """One [C, D] for all dims (MRL-E), or one [C, m] for each (MRL)."""
    biases: tuple[torch.Tensor, ...] = ()
    """One [C] for each weight, or none."""
    scale: float | None = None
    """None for products; a number for cosines, which have no bias."""

    @property
    def tied(self) -> bool:
        """Whether all dims share one matrix."""
        return len(self.weights) == 1

    @property
    def blocks(self) -> list[slice]:
        """Columns of each dim's product: if tied, what it adds to the dim before; otherwise its whole prefix."""
        starts = (0, *self.dims[:-1]) if self.tied else (0,) * len(self.dims)
        return [slice(start, m) for start, m in zip(starts, self.dims, strict=True)]

    def rows(self, span: slice) -> "Factors":
        """Factors of some of the classes (views)."""
        return replace(self, weights=tuple(w[span] for w in self.weights), biases=tuple(b[span] for b in self.biases))

    def lengths(self) -> torch.Tensor:
        """Norms [M, C] of the classes' prefixes."""
        if self.tied:
            return prefix_norms(self.weights[0], self.dims)
        return torch.cat([prefix_norms(weight, (m,)) for m, weight in zip(self.dims, self.weights, strict=True)])


@dataclass(frozen=True)
class Reduced:
    """Sums over the classes' scores."""

    over: torch.Tensor
    """Reduction over classes [M, n]."""
    picked: torch.Tensor
    """Scores [M, n, K] of the row's labels; zero for a label outside the C classes."""
    total: torch.Tensor
    """Sum over classes [M, n]; zero unless requested."""


def split_prefixes(values: torch.Tensor, dims: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Columns between successive dims; one split makes the gradient one concatenation instead of a sum of M."""
    return torch.split(values[:, : dims[-1]], [stop - start for start, stop in pairwise((0, *dims))], dim=1)


def prefix_norms(vectors: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Euclidean norms [M, n] of the first m values of each row.

    A row that counts as zero has an infinite norm, so that its cosines and gradients are zero (see
    ``classes.unit_rows``).
    """
    squares = torch.stack([block.square().sum(dim=1) for block in split_prefixes(vectors, dims)]).cumsum(dim=0)
    long = squares > SHORTEST**2
    return torch.where(long, torch.where(long, squares, 1.0).sqrt(), torch.inf)


def reduce_scores(
    embedding: torch.Tensor, factors: Factors, labels: torch.Tensor, *, over: Over, chunk: int, total: bool = False
) -> Reduced:
    """Reduce the scores of embeddings [n, D] under ``factors``; labels [n, K] int64, those outside 0 .. C - 1 ignored.

    Gradients reach embedding, weights and biases. Holds about M x n x ``chunk`` scores, forward and backward.
    """
    plan = _Plan(factors.dims, len(factors.weights), factors.scale, over, chunk, total)
    return Reduced(*_Reduce.apply(plan, labels, embedding, *factors.weights, *factors.biases))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Plan:
    dims: tuple[int, ...]
    num_weights: int
    scale: float | None
    over: Over
    chunk: int
    total: bool

    def factors(self, tensors: Sequence[torch.Tensor]) -> Factors:
        return Factors(self.dims, tuple(tensors[: self.num_weights]), tuple(tensors[self.num_weights :]), self.scale)

    def settle(self, scores: torch.Tensor) -> torch.Tensor:
        """A tensor of ``_scores`` that may be kept: a tied product is overwritten later, so it is copied."""
        return scores.clone() if self.num_weights == 1 and self.scale is None else scores

    def spans(self, num_classes: int) -> Iterator[slice]:
        for start in range(0, num_classes, self.chunk):
            yield slice(start, min(start + self.chunk, num_classes))


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, labels: torch.Tensor, z: torch.Tensor, *tensors: torch.Tensor) -> Any:
        factors, shape = plan.factors(tensors), (len(plan.dims), len(z))
        ctx.plan, ctx.dtype, ctx.scores = plan, _matmul_dtype(z), []
        over = z.new_full(shape, -torch.inf if plan.over == "logsumexp" else 0.0)
        picked, total = z.new_zeros((*shape, labels.shape[1])), z.new_zeros(shape)
        with torch.autocast(z.device.type, enabled=False):
            lengths = prefix_norms(z, plan.dims)
            for span in plan.spans(len(factors.weights[0])):
                inside, place = _place(labels, span)
                for i, scores in enumerate(_scores(z, factors.rows(span), lengths, ctx.dtype)):
                    if plan.over == "logsumexp":
                        largest = scores.amax(dim=1)
                        total_exp = (scores - largest[:, None]).exp_().sum(dim=1)
                        over[i] = torch.logaddexp(over[i], total_exp.log_() + largest)
                    else:
                        over[i] += functional.softplus(scores).sum(dim=1)
                    picked[i] += scores.gather(1, place) * inside
                    if plan.total:
                        total[i] += scores.sum(dim=1)
                    if len(factors.weights[0]) <= plan.chunk:  # one chunk is not computed twice
                        ctx.scores.append(plan.settle(scores))
        ctx.save_for_backward(labels, z, over, lengths, *tensors)
        return over, picked, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        plan: _Plan = ctx.plan
        labels, z, over, lengths, *tensors = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor) for tensor in (z, *tensors)]
        factors, into = plan.factors(tensors), plan.factors(gradients[1:])
        with torch.autocast(z.device.type, enabled=False):
            for span in plan.spans(len(factors.weights[0])):
                part, gradient = factors.rows(span), into.rows(span)
                scores = ctx.scores or [plan.settle(s) for s in _scores(z, part, lengths, ctx.dtype)]
                ctx.scores = []  # overwritten below; another backward pass computes them again
                slopes = _slopes(plan, scores, over, grads, _place(labels, span))
                if plan.scale is not None:
                    _back_through_lengths(scores, slopes, z, lengths, into_z=gradients[0], part=part, gradient=gradient)
                _back_through_products(slopes, z, ctx.dtype, into_z=gradients[0], part=part, gradient=gradient)
                scores, slopes = [], []  # freed before the next chunk's are made
        return None, None, *gradients


def _matmul_dtype(z: torch.Tensor) -> torch.dtype:
    kind = z.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else z.dtype


def _place(labels: torch.Tensor, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask [n, K] of the labels within the span, and their position in it (any position for the others)."""
    inside = (labels >= span.start) & (labels < span.stop)
    return inside, (labels - span.start).clamp(0, span.stop - span.start - 1)


def _scores(z: torch.Tensor, part: Factors, lengths: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Scores [n, c] of each dim, smallest first. Tied products share one growing tensor: use each at once."""
    scales = None if part.scale is None else (part.scale / lengths, 1.0 / part.lengths())
    product = z.new_empty(())
    for i, block in enumerate(part.blocks):
        weight = part.weights[0 if part.tied else i][:, block]
        if i == 0 or not part.tied:
            bias = part.biases[i][None] if part.biases else z.new_zeros((1, len(weight)))
            product = bias.repeat(len(z), 1)
        _add_product(product, z[:, block], weight.T, dtype)
        yield product if scales is None else product * scales[0][i][:, None] * scales[1][i]


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    """Add ``left @ right``, multiplied in ``dtype``."""
    if right.shape[1] <= NARROW:
        into += (right.T.to(dtype) @ left.T.to(dtype)).T
    elif dtype == into.dtype:
        into.addmm_(left, right)
    else:
        into += left.to(dtype) @ right.to(dtype)


def _slopes(
    plan: _Plan,
    scores: list[torch.Tensor],
    over: torch.Tensor,
    grads: tuple[torch.Tensor, ...],
    place: tuple[torch.Tensor, torch.Tensor],
) -> list[torch.Tensor]:
    """Gradient [n, c] with respect to each dim's scores; it overwrites them unless cosines need them again."""
    slopes = []
    for i, score in enumerate(scores):
        slope = score if plan.scale is None else score.clone()
        slope = slope.sigmoid_() if plan.over == "softplus" else slope.sub_(over[i][:, None]).exp_()
        slope.mul_(grads[0][i][:, None]).scatter_add_(1, place[1], grads[1][i] * place[0])
        slopes.append(slope.add_(grads[2][i][:, None]) if plan.total else slope)
    return slopes


def _back_through_lengths(
    scores: list[torch.Tensor],
    slopes: list[torch.Tensor],
    z: torch.Tensor,
    lengths: torch.Tensor,
    *,
    into_z: torch.Tensor,
    part: Factors,
    gradient: Factors,
) -> None:
    """Turn slopes of cosines into slopes of products, in place, and add what flows through the norms: with share =
    slope x score, a vector v of norm |v| gets ``-sum(share) v / |v|^2``."""
    assert part.scale is not None
    own = part.lengths()
    for i, (score, slope, m) in enumerate(zip(scores, slopes, part.dims, strict=True)):
        share = score.mul_(slope)
        into_z[:, :m] -= (share.sum(dim=1) / lengths[i].square())[:, None] * z[:, :m]
        k = 0 if part.tied else i
        gradient.weights[k][:, :m] -= (share.sum(dim=0) / own[i].square())[:, None] * part.weights[k][:, :m]
        slope.mul_(part.scale / lengths[i][:, None]).div_(own[i])


def _back_through_products(
    slopes: list[torch.Tensor],
    z: torch.Tensor,
    dtype: torch.dtype,
    *,
    into_z: torch.Tensor,
    part: Factors,
    gradient: Factors,
) -> None:
    """Add the products' gradients to those of embedding and weights; a tied block gets the sum over dims that hold
    it."""
    above: torch.Tensor | None = None
    for i, block in reversed(list(enumerate(part.blocks))):
        above = slopes[i] if above is None or not part.tied else above.add_(slopes[i])
        k = 0 if part.tied else i
        _add_product(into_z[:, block], above, part.weights[k][:, block], dtype)
        _add_product(gradient.weights[k][:, block], above.T, z[:, block], dtype)
        if gradient.biases and (i == 0 or not part.tied):  # the first block's sum is over all dims, as is the bias
            gradient.biases[k].add_(above.sum(dim=0))
