"""What a classification loss needs of its logits, without the logits: sums over classes, chunk by chunk.

Softmax, multi-label softmax and multi-label sigmoid read three things of the scores [n, C] of a nested dim: a
reduction over all classes (log-sum-exp, or the sum of softplus), the scores of the row's own labels, and, for label
smoothing, their sum. Here these are computed for all nested dims over chunks of classes and computed again in the
backward pass, so that no more than M x n x chunk scores exist at a time, whatever C.

Weight-tied (MRL-E): within a chunk the scores of a dim are those of the one before plus one block's product; in the
backward pass, what reaches a block is the sum over all dims that hold it. Each way costs one full-size matmul.

Legend: n rows, D embedding size, C classes, c those of a chunk, m a nested dim, M how many, K most labels a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

Over = Literal["logsumexp", "softplus"]


@dataclass(frozen=True)
class Factors:
    """Scores of nested dim i as factors: ``rows[i][:, None] * (z[:, :m] @ W_i[:, :m].T) * columns[i] + bias_i``."""

    dims: tuple[int, ...]
    weights: tuple[torch.Tensor, ...]
    """One [C, D] for all dims (MRL-E), or one [C, m] for each (MRL)."""
    biases: tuple[torch.Tensor, ...] = ()
    """As many [C], or none."""
    rows: torch.Tensor | None = None
    """Scales [M, n] above zero, or None for ones."""
    columns: torch.Tensor | None = None
    """Scales [M, C] above zero; given with ``rows``."""

    def scaled(self, scale: float) -> "Factors":
        """The factors of ``scale`` times the scores; for those without bias."""
        assert self.rows is not None
        return Factors(self.dims, self.weights, self.biases, self.rows * scale, self.columns)


@dataclass(frozen=True)
class Reduced:
    """What is left of the scores."""

    over: torch.Tensor
    """Reduction over classes [M, n]."""
    picked: torch.Tensor
    """Scores [M, n, K] of the row's labels; zero where the label is none of the C classes."""
    total: torch.Tensor
    """Sum over classes [M, n]; zero unless asked for."""


def reduce_scores(
    embedding: torch.Tensor, factors: Factors, labels: torch.Tensor, *, over: Over, chunk: int, total: bool = False
) -> Reduced:
    """Reduce the scores of embeddings [n, D] under ``factors``; labels [n, K] int64, those outside 0 .. C - 1 ignored.

    Gradients reach the embedding and every factor. Holds about M x n x ``chunk`` scores, forward and backward.
    """
    plan = _Plan(factors.dims, len(factors.weights), len(factors.biases), factors.rows is not None, over, chunk, total)
    scales = () if factors.rows is None else (factors.rows, factors.columns)
    outputs = _Reduce.apply(plan, labels, embedding, *factors.weights, *factors.biases, *scales)  # type: ignore[no-untyped-call]
    return Reduced(*outputs)


@dataclass(frozen=True)
class _Plan:
    dims: tuple[int, ...]
    num_weights: int
    num_biases: int
    scaled: bool
    over: Over
    chunk: int
    total: bool

    @property
    def tied(self) -> bool:
        return self.num_weights == 1

    def factors(self, tensors: Sequence[torch.Tensor]) -> Factors:
        cut = self.num_weights, self.num_weights + self.num_biases
        rows, columns = tensors[cut[1] :] if self.scaled else (None, None)
        return Factors(self.dims, tuple(tensors[: cut[0]]), tuple(tensors[cut[0] : cut[1]]), rows, columns)

    def spans(self, num_classes: int) -> Iterator[slice]:
        for start in range(0, num_classes, self.chunk):
            yield slice(start, min(start + self.chunk, num_classes))

    def blocks(self) -> list[slice]:
        """Columns of each product: what a dim adds to the one before when tied, its whole prefix when not."""
        if self.tied:
            return [slice(start, stop) for start, stop in pairwise((0, *self.dims))]
        return [slice(0, m) for m in self.dims]


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, labels: torch.Tensor, z: torch.Tensor, *tensors: torch.Tensor) -> Any:
        factors, n = plan.factors(tensors), len(z)
        ctx.plan, ctx.dtype = plan, _matmul_dtype(z)
        wide = torch.promote_types(z.dtype, torch.float32)
        shape = (len(plan.dims), n)
        over = z.new_full(shape, -torch.inf if plan.over == "logsumexp" else 0.0, dtype=wide)
        picked = z.new_zeros((*shape, labels.shape[1]), dtype=wide)
        total = z.new_zeros(shape, dtype=wide)
        with torch.autocast(z.device.type, enabled=False):
            low = z.to(ctx.dtype)
            for span in plan.spans(len(factors.weights[0])):
                inside, place = _place(labels, span)
                for i, scores in enumerate(_scores(plan, low, factors, span, wide)):
                    if plan.over == "logsumexp":
                        over[i] = torch.logaddexp(over[i], scores.logsumexp(dim=1))
                    else:
                        over[i] += functional.softplus(scores).sum(dim=1)
                    picked[i] += scores.gather(1, place) * inside
                    if plan.total:
                        total[i] += scores.sum(dim=1)
        ctx.save_for_backward(labels, z, over, *tensors)
        return over, picked, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        plan: _Plan = ctx.plan
        labels, z, over, *tensors = ctx.saved_tensors
        factors = plan.factors(tensors)
        found = [torch.zeros_like(tensor) for tensor in (z, *tensors)]
        into = plan.factors(found[1:])
        with torch.autocast(z.device.type, enabled=False):
            low = z.to(ctx.dtype)
            for span in plan.spans(len(factors.weights[0])):
                inside, place = _place(labels, span)
                # one slope matrix a dim: the scores are turned into the gradient with respect to the raw products
                slopes = [scores.clone() if plan.tied and not plan.scaled else scores
                          for scores in _scores(plan, low, factors, span, over.dtype)]  # fmt: skip
                for i, scores in enumerate(slopes):
                    slope = _slope(plan, scores, over[i], grads[0][i], keep=plan.scaled)
                    slope.scatter_add_(1, place, grads[1][i] * inside)
                    if plan.total:
                        slope += grads[2][i][:, None]
                    slopes[i] = _unscale(i, slope, scores, span=span, factors=factors, into=into)
                _multiply_back(plan, slopes, low, found[0], span=span, factors=factors, into=into)
        return None, None, *found


def _matmul_dtype(z: torch.Tensor) -> torch.dtype:
    kind = z.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else z.dtype


def _place(labels: torch.Tensor, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels [n, K] lie in the span, and where in it (anywhere for the others)."""
    inside = (labels >= span.start) & (labels < span.stop)
    return inside, (labels - span.start).clamp(0, span.stop - span.start - 1)


def _scores(
    plan: _Plan, z: torch.Tensor, factors: Factors, span: slice, wide: torch.dtype
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Scores [n, c] of each dim, smallest first. Tied and unscaled ones are one tensor that grows: use each at once."""
    product = z.new_zeros((len(z), span.stop - span.start), dtype=wide)
    for i, block in enumerate(plan.blocks()):
        if i == 0 or not plan.tied:
            bias = factors.biases[i][span] if factors.biases else 0.0
            product = product.new_zeros(product.shape) + bias if i else product + bias
        weight = factors.weights[0 if plan.tied else i][span, block].to(z.dtype)
        _add_product(product, z[:, block], weight.T)
        if factors.rows is None or factors.columns is None:
            yield product
        else:
            yield product * factors.rows[i][:, None] * factors.columns[i][span]


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == into.dtype == right.dtype:
        into.addmm_(left, right)
    else:
        into += left @ right.to(left.dtype)


def _slope(plan: _Plan, scores: torch.Tensor, over: torch.Tensor, grad: torch.Tensor, *, keep: bool) -> torch.Tensor:
    """Gradient [n, c] of the reduction with respect to the scores; in place of them unless they are to be kept."""
    if plan.over == "softplus":
        slope = scores.sigmoid() if keep else scores.sigmoid_()
    else:
        slope = scores - over[:, None] if keep else scores.sub_(over[:, None])
        slope.exp_()
    return slope.mul_(grad[:, None])


def _unscale(
    i: int, slope: torch.Tensor, scores: torch.Tensor, *, span: slice, factors: Factors, into: Factors
) -> torch.Tensor:  # fmt: skip
    """Pass ``slope`` from the scores of dim i to their raw products, leaving what belongs to bias and scales."""
    if factors.biases:
        into.biases[0 if len(factors.weights) == 1 else i][span] += slope.sum(dim=0)
    if factors.rows is None or factors.columns is None or into.rows is None or into.columns is None:
        return slope
    share = scores.mul_(slope)  # each scale multiplies the whole score: its gradient is the score's share over it
    into.rows[i] += share.sum(dim=1) / factors.rows[i]
    into.columns[i][span] += share.sum(dim=0) / factors.columns[i][span]
    return slope.mul_(factors.rows[i][:, None]).mul_(factors.columns[i][span])


def _multiply_back(
    plan: _Plan, slopes: list[torch.Tensor], z: torch.Tensor, into_z: torch.Tensor, *, span: slice, factors: Factors,
    into: Factors,
) -> None:  # fmt: skip
    """Add the products' gradients to those of embedding and weights; a tied block gets the sum over dims holding it."""
    blocks, above = plan.blocks(), None
    for i in reversed(range(len(blocks))):
        slope = slopes[i]
        if plan.tied:
            above = slope if above is None else above.add_(slope)
            slope = above
        weight, gradient = (part.weights[0 if plan.tied else i][span, blocks[i]] for part in (factors, into))
        slope = slope.to(z.dtype)
        _add_product(into_z[:, blocks[i]], slope, weight)
        _add_product(gradient, slope.T, z[:, blocks[i]])
