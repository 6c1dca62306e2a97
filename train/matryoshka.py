"""Matryoshka heads: class scores at every nested dim of one embedding (Kusupati et al. 2022, section 3).

Legend: n rows, D embedding size, C classes, m a nested dim, M how many nested dims.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

Nesting = Literal["mrl", "mrl-e"]


class NestedLinear(nn.Module):
    """Linear class scores of every prefix z[:, :m]: embeddings [n, D] -> list of M logits [n, C].

    ``mrl``: one weight matrix W^(m) per nested dim. ``mrl-e``: all share one matrix, W[:, :m], and one bias; the logits
    accumulate block by block, so all nested dims together cost one full-size matmul.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, nesting: Nesting = "mrl", *, bias: bool = True) -> None:
        super().__init__()
        self.dims, self.nesting = tuple(dims), nesting
        sizes = self.dims if nesting == "mrl" else self.dims[-1:]
        self.layers = nn.ModuleList(nn.Linear(m, num_classes, bias=bias) for m in sizes)

    def forward(self, embedding: torch.Tensor) -> list[torch.Tensor]:
        """See the class."""
        if self.nesting == "mrl":
            return [layer(embedding[:, :m]) for m, layer in zip(self.dims, self.layers, strict=True)]
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)
        partial = accumulate_products(embedding, layer.weight, self.dims)
        return partial if layer.bias is None else [product + layer.bias for product in partial]


class NestedCosine(nn.Module):
    """Cosine of every prefix with class proxies: embeddings [n, D] -> list of M cosines [n, C].

    Every prefix, of embedding and of proxy, is normalised by itself (section 3 and appendix C of the paper: the
    normalisation must follow the truncation).
    """

    def __init__(self, dims: Sequence[int], num_classes: int, nesting: Nesting = "mrl") -> None:
        super().__init__()
        self.dims, self.nesting = tuple(dims), nesting
        sizes = self.dims if nesting == "mrl" else self.dims[-1:]
        self.proxies = nn.ParameterList(nn.Parameter(functional.normalize(torch.randn(num_classes, m))) for m in sizes)

    def forward(self, embedding: torch.Tensor) -> list[torch.Tensor]:
        """See the class."""
        if self.nesting == "mrl":
            return [functional.linear(functional.normalize(embedding[:, :m]), functional.normalize(proxy))
                    for m, proxy in zip(self.dims, self.proxies, strict=True)]  # fmt: skip
        proxy = self.proxies[0]
        products = accumulate_products(embedding, proxy, self.dims)
        return [product / (prefix_norm(embedding, m)[:, None] * prefix_norm(proxy, m)[None])
                for m, product in zip(self.dims, products, strict=True)]  # fmt: skip


def accumulate_products(embedding: torch.Tensor, weight: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """[z[:, :m] @ W[:, :m].T for m in dims], each adding only its own block to the one before."""
    total, start, products = None, 0, []
    for m in dims:
        block = embedding[:, start:m] @ weight[:, start:m].T
        total = block if total is None else total + block
        products.append(total)
        start = m
    return products


def prefix_norm(vectors: torch.Tensor, m: int) -> torch.Tensor:
    """Euclidean norm of the first m values of each row, at least 1e-12."""
    norm: torch.Tensor = torch.linalg.vector_norm(vectors[:, :m], dim=1)
    return norm.clamp_min(1e-12)


def nested_loss(
    scores: Sequence[torch.Tensor], loss: Callable[[torch.Tensor], torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """Sum over nested dims of c_m times the loss of that dim's scores (equation 1; a sum, not a mean)."""
    return torch.stack([c * loss(score) for c, score in zip(weights, scores, strict=True)]).sum(dim=0)
