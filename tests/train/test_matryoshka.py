"""Matryoshka heads: equation 1 and its weight-tied form, against the naive way to write them (float64)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lookalike.train.matryoshka import NestedCosine, NestedLinear, Nesting, accumulate_products, nested_loss

DIMS = (2, 3, 8, 16)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    return torch.randn(10, 16, dtype=torch.float64, requires_grad=True), torch.randint(0, 6, (10,))


def naive_scores(head: NestedLinear, z: torch.Tensor) -> list[torch.Tensor]:
    scores = []
    for i, m in enumerate(DIMS):
        layer = head.layers[i if head.nesting == "mrl" else 0]
        scores.append(z[:, :m] @ layer.weight[:, :m].T + (0 if layer.bias is None else layer.bias))  # type: ignore[index, operator]
    return scores


@pytest.mark.parametrize("nesting", ["mrl", "mrl-e"])
@pytest.mark.parametrize("bias", [True, False])
def test_equation_1_is_a_weighted_sum_of_independent_cross_entropies(nesting: Nesting, bias: bool) -> None:
    """Kusupati et al. 2022, equation 1: a sum over nested dims, not a mean."""
    z, labels = inputs()
    head = NestedLinear(DIMS, 6, nesting, bias=bias).double()
    weights = (1.0, 0.5, 2.0, 1.0)
    ours = nested_loss(head(z), lambda s: functional.cross_entropy(s, labels), weights)
    naive = sum(c * functional.cross_entropy(s, labels) for c, s in zip(weights, naive_scores(head, z), strict=True))
    assert isinstance(naive, torch.Tensor)
    assert torch.allclose(ours, naive, rtol=1e-12)
    parameters = [z, *head.parameters()]
    for one, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(naive, parameters), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_mrl_has_a_matrix_per_dim_and_mrl_e_one() -> None:
    """Section 3: MRL-E ties the weights, W^(m) = W[:m]."""
    assert [tuple(p.shape) for p in NestedLinear(DIMS, 6, "mrl", bias=False).parameters()] == [(6, m) for m in DIMS]
    assert [tuple(p.shape) for p in NestedLinear(DIMS, 6, "mrl-e").parameters()] == [(6, 16), (6,)]
    assert [tuple(p.shape) for p in NestedCosine(DIMS, 6, "mrl-e").parameters()] == [(6, 16)]


@pytest.mark.parametrize("nesting", ["mrl", "mrl-e"])
def test_every_prefix_is_normalised_by_itself_after_truncation(nesting: Nesting) -> None:
    """Section 3 and appendix C."""
    z, _ = inputs()
    head = NestedCosine(DIMS, 6, nesting).double()
    cosines = head(z)
    proxies = list(head.proxies) if nesting == "mrl" else [head.proxies[0]] * len(DIMS)
    naive = [functional.cosine_similarity(z[:, None, :m], proxy[None, :, :m], dim=2)
             for m, proxy in zip(DIMS, proxies, strict=True)]  # fmt: skip
    for ours, theirs in zip(cosines, naive, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    parameters = [z, *head.parameters()]
    ours_grad = torch.autograd.grad(sum(c.pow(3).sum() for c in cosines), parameters)  # type: ignore[arg-type]
    naive_grad = torch.autograd.grad(sum(c.pow(3).sum() for c in naive), parameters)  # type: ignore[arg-type]
    for one, other in zip(ours_grad, naive_grad, strict=True):
        assert torch.allclose(one, other, atol=1e-10)
    before = functional.normalize(z)[:, :2] @ functional.normalize(head.proxies[-1])[:, :2].T
    assert not torch.allclose(cosines[0], before, atol=0.05)  # the other order gives other numbers


def test_cosines_do_not_depend_on_what_follows_the_prefix() -> None:
    z, _ = inputs()
    head = NestedCosine(DIMS, 6, "mrl-e").double()
    longer = torch.cat([z[:, :3], 100 * z[:, 3:]], dim=1)
    assert torch.allclose(head(z)[1], head(longer)[1])


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, 24), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_accumulated_products_are_prefix_products(dims: set[int], n: int, num_classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 24, dtype=torch.float64, generator=generator)
    weight = torch.randn(num_classes, 24, dtype=torch.float64, generator=generator)
    ordered = sorted(dims)
    for m, product in zip(ordered, accumulate_products(z, weight, ordered), strict=True):
        assert torch.allclose(product, z[:, :m] @ weight[:, :m].T, atol=1e-12)


def test_one_dim_is_the_plain_task() -> None:
    z, labels = inputs()
    head = NestedLinear((16,), 6).double()
    ours = nested_loss(head(z), lambda s: functional.cross_entropy(s, labels), (1.0,))
    assert torch.allclose(ours, functional.cross_entropy(functional.linear(z, head.layers[0].weight,
                                                                          head.layers[0].bias), labels))  # type: ignore[arg-type]  # fmt: skip
