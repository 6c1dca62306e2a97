"""Matryoshka heads: class scores at every nested dim of one embedding (Kusupati et al. 2022, section 3).

Legend: n rows, D embedding size, C classes (of this worker, when a head is sharded), m a nested dim, M how many.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lookalike.seeds import derive_seed
from lookalike.train.losses.classes import unit_rows
from lookalike.train.losses.proxies import Shard, random_rows
from lookalike.train.losses.reduction import Factors, prefix_norms, split_prefixes

Nesting = Literal["mrl", "mrl-e"]


class NestedHead(nn.Module):
    """Class scores of every prefix z[:, :m] of an embedding, in two forms.

    ``forward`` returns the scores themselves; ``factors`` returns their factors, for ``reduction``, where scores would
    not fit. A call may pick some of the head's ``dims`` and of its ``classes``, int64 [c]. With a ``shard`` the head
    holds that part of the classes.
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, nesting: Nesting = "mrl", *, shard: Shard | None = None
    ) -> None:
        super().__init__()
        self.dims, self.nesting = tuple(dims), nesting
        self.shard = shard or Shard(0, num_classes, num_classes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Width of each weight matrix: every nested dim (``mrl``), or the largest alone (``mrl-e``)."""
        return self.dims if self.nesting == "mrl" else self.dims[-1:]

    def forward(
        self, embedding: torch.Tensor, dims: tuple[int, ...] | None = None, classes: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Embeddings [n, D] -> scores [n, C] of each dim."""
        raise AssertionError(f"{type(self).__name__} must define forward")

    def factors(self, dims: tuple[int, ...] | None = None, classes: torch.Tensor | None = None) -> Factors:
        raise AssertionError(f"{type(self).__name__} must define factors")

    def _select(
        self, tensors: Sequence[torch.Tensor], dims: tuple[int, ...], classes: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """The tensors of ``dims`` (a tied head has one), with the rows of ``classes``."""
        selected = [tensors[self.dims.index(m)] for m in dims] if self.nesting == "mrl" else list(tensors)
        return selected if classes is None else [tensor.index_select(0, classes) for tensor in selected]


class NestedLinear(NestedHead):
    """Linear class scores.

    ``mrl``: a weight matrix W^(m) and a bias per nested dim. ``mrl-e``: all dims share one matrix, W[:, :m], and one
    bias; scores accumulate block by block, so that all dims cost one full-size matmul.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        nesting: Nesting = "mrl",
        *,
        bias: bool = True,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(dims, num_classes, nesting, shard=shard)
        if self.shard.whole:
            self.layers = nn.ModuleList(nn.Linear(m, num_classes, bias=bias) for m in self.sizes)
            return
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, m, len(self.shard), bias=bias) for m in self.sizes)  # type: ignore[no-untyped-call]
        for layer in self._layers():
            bound = layer.in_features**-0.5  # the start torch gives a whole layer
            for parameter in layer.parameters():
                parameter.data = random_rows(self.shard, parameter.shape[1:], torch.rand).mul_(2).sub_(1).mul_(bound)

    def _layers(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(
        self, embedding: torch.Tensor, dims: tuple[int, ...] | None = None, classes: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        dims = dims or self.dims
        weights, biases = self._parameters_of(dims, classes)
        if self.nesting == "mrl":
            return [
                functional.linear(embedding[:, :m], weight, biases[i] if biases else None)
                for i, (m, weight) in enumerate(zip(dims, weights, strict=True))
            ]
        return accumulate_products(embedding, weights[0], dims, biases[0] if biases else None)

    def factors(self, dims: tuple[int, ...] | None = None, classes: torch.Tensor | None = None) -> Factors:
        dims = dims or self.dims
        weights, biases = self._parameters_of(dims, classes)
        return Factors(dims, tuple(weights), tuple(biases))

    def _parameters_of(
        self, dims: tuple[int, ...], classes: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        layers = self._layers()
        biases = [layer.bias for layer in layers if layer.bias is not None]
        weights = self._select([layer.weight for layer in layers], dims, classes)
        return weights, self._select(biases, dims, classes) if biases else []


class NestedCosine(NestedHead):
    """Cosine of every prefix with class proxies.

    Every prefix of embedding and of proxy is normalised separately (section 3 and appendix C of the paper:
    normalisation must follow truncation).
    """

    def __init__(
        self, dims: Sequence[int], num_classes: int, nesting: Nesting = "mrl", *, shard: Shard | None = None
    ) -> None:
        super().__init__(dims, num_classes, nesting, shard=shard)
        rows = [
            torch.randn(num_classes, m) if self.shard.whole else random_rows(self.shard, (m,), torch.randn)
            for m in self.sizes
        ]
        self.proxies = nn.ParameterList(nn.Parameter(functional.normalize(row)) for row in rows)

    def forward(
        self, embedding: torch.Tensor, dims: tuple[int, ...] | None = None, classes: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """See ``NestedHead``; every score is a cosine."""
        dims = dims or self.dims
        proxies = self._select(list(self.proxies), dims, classes)
        if self.nesting == "mrl":
            return [
                functional.linear(unit_rows(embedding[:, :m]), unit_rows(proxy))
                for m, proxy in zip(dims, proxies, strict=True)
            ]
        products = accumulate_products(embedding, proxies[0], dims)
        lengths = zip(prefix_norms(embedding, dims), prefix_norms(proxies[0], dims), strict=True)
        return [product / (row[:, None] * column) for product, (row, column) in zip(products, lengths, strict=True)]

    def factors(self, dims: tuple[int, ...] | None = None, classes: torch.Tensor | None = None) -> Factors:
        dims = dims or self.dims
        proxies = self._select(list(self.proxies), dims, classes)
        return Factors(dims, tuple(proxies), (), 1.0)


def accumulate_products(
    embedding: torch.Tensor, weight: torch.Tensor, dims: Sequence[int], bias: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """[z[:, :m] @ W[:, :m].T + bias for m in dims]; each dim adds only its own block to the dim before."""
    total, products = bias, []
    for block, columns in zip(split_prefixes(embedding, dims), split_prefixes(weight, dims), strict=True):
        total = block @ columns.T if total is None else torch.addmm(total, block, columns.T)
        products.append(total)
    return products


def nested_loss(
    scores: Sequence[torch.Tensor], loss: Callable[[torch.Tensor], torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """Sum over nested dims of c_m times the loss of that dim's scores (equation 1; a sum, not a mean)."""
    return torch.stack([c * loss(score) for c, score in zip(weights, scores, strict=True)]).sum(dim=0)


def nested_pair_loss(
    left: torch.Tensor,
    right: torch.Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Sum over nested dims of c_m times a loss of two towers' prefixes, [n, m] each; the loss must normalise its
    inputs.

    Section 3: contrastive learning nests both towers and normalises every prefix separately.
    """
    return torch.stack([c * loss(left[:, :m], right[:, :m]) for m, c in zip(dims, weights, strict=True)]).sum()


def choose_dims(dims: tuple[int, ...], num: int | None, seed: int, step: int) -> tuple[int, ...]:
    """``num`` of the nested dims, always with the largest; None, or a larger number, returns all.

    The draw depends only on seed and step, so every worker trains the same dims.
    """
    if num is None or num >= len(dims):
        return dims
    generator = np.random.default_rng(derive_seed(seed, "nested dims", step))
    others = generator.choice(len(dims) - 1, size=num - 1, replace=False)
    return tuple(dims[i] for i in sorted([*others.tolist(), len(dims) - 1]))
