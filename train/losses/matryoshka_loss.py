"""Matryoshka representation learning in a training loop of one's own (Kusupati et al. 2022, section 3, equation 1)."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lookalike.errors import UsageError
from lookalike.train.losses.classes import unit_rows
from lookalike.train.losses.matryoshka import NestedHead


class MatryoshkaLoss(nn.Module):
    """Any loss, nested, for a training loop of one's own: sum over m of c_m * loss(z[:, :m], ...) (section 3).

    Args:
        dims: nested dims, smallest first; the last is the width of the embeddings.
        loss: what is computed at each dim, from its scores [n, C] with a ``head`` and from its prefixes [n, m] without,
            and from all other arguments of the call. One per dim if it has parameters as wide as the embedding.
        head: ``NestedLinear`` or ``NestedCosine`` over the same dims: a classifier (MRL), or a weight-tied one (MRL-E).
        weights: c_m of each dim; 1 by default.
        embeddings: how many of the first arguments are cut to each dim: 2 for losses of two towers.
        normalise: scale each prefix to unit length after the cut, for losses that expect it (open_clip's).

    The parameters of ``head`` and ``loss`` are parameters of this module: give them to the optimizer.
    """

    def __init__(
        self,
        dims: Sequence[int],
        loss: Callable[..., torch.Tensor] | Sequence[Callable[..., torch.Tensor]],
        *,
        head: NestedHead | None = None,
        weights: Sequence[float] | None = None,
        embeddings: int = 1,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.dims, self.head, self.embeddings, self.normalise = tuple(dims), head, embeddings, normalise
        if not self.dims or self.dims[0] < 1 or any(b <= a for a, b in pairwise(self.dims)):
            raise UsageError(f"dims {list(dims)} must be positive and increasing, for example [8, 16, 32]")
        self.weights = (1.0,) * len(self.dims) if weights is None else tuple(weights)
        self.losses: list[Callable[..., torch.Tensor]] = (
            list(loss) if isinstance(loss, Sequence | nn.ModuleList) else [loss] * len(self.dims)
        )
        self._modules_of_losses = nn.ModuleList(each for each in self.losses if isinstance(each, nn.Module))
        for name, values in (("weights", self.weights), ("losses", self.losses)):
            if len(values) != len(self.dims):
                raise UsageError(f"{len(values)} {name} for {len(self.dims)} dims; give one each")
        if head is not None and head.dims != self.dims:
            raise UsageError(f"the head has dims {list(head.dims)}, not {list(self.dims)}; make it with the same dims")
        if head is not None and (embeddings != 1 or normalise):
            raise UsageError(
                "a head scores one embedding as it is; leave out embeddings and normalise (see NestedCosine)"
            )

    def forward(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """The weighted sum, a scalar; ``UsageError`` unless the embeddings are [n, D] with D the last dim."""
        embeddings, others = arguments[: self.embeddings], arguments[self.embeddings :]
        for embedding in embeddings:
            if embedding.ndim != 2 or embedding.shape[1] != self.dims[-1]:
                raise UsageError(
                    f"an embedding of shape {list(embedding.shape)}; dims end at {self.dims[-1]}, so give "
                    f"[n, {self.dims[-1]}], or end dims at its width"
                )
        if self.head is None:
            inputs = [tuple(self._prefix(embedding, m) for embedding in embeddings) for m in self.dims]
        else:
            inputs = [(scores,) for scores in self.head(embeddings[0])]
        terms = zip(self.weights, self.losses, inputs, strict=True)
        return torch.stack([c * loss(*each, *others, **options) for c, loss, each in terms]).sum()

    def _prefix(self, embedding: torch.Tensor, m: int) -> torch.Tensor:
        return unit_rows(embedding[:, :m]) if self.normalise else embedding[:, :m]
