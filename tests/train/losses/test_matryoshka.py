"""Matryoshka heads: equation 1 and its weight-tied form, against the naive way to write them (float64)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lookalike.train.losses.matryoshka import (
    NestedCosine,
    NestedHead,
    NestedLinear,
    Nesting,
    accumulate_products,
    choose_dims,
    nested_loss,
    nested_pair_loss,
)
from lookalike.train.losses.pairs import two_tower_loss

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
    naive = [
        functional.cosine_similarity(z[:, None, :m], proxy[None, :, :m], dim=2)
        for m, proxy in zip(DIMS, proxies, strict=True)
    ]
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


@pytest.mark.parametrize("nesting", ["mrl", "mrl-e"])
@pytest.mark.parametrize("kind", [NestedLinear, NestedCosine])
def test_some_dims_and_some_classes_of_a_head(kind: type[NestedHead], nesting: Nesting) -> None:
    z, _ = inputs()
    head = kind(DIMS, 6, nesting).double()
    every, few = head(z), head(z, (3, 16), torch.tensor([0, 4]))
    assert len(few) == 2
    for scores, i in zip(few, (1, 3), strict=True):
        assert torch.allclose(scores, every[i][:, [0, 4]])


@settings(max_examples=40)
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
    assert torch.allclose(
        ours, functional.cross_entropy(functional.linear(z, head.layers[0].weight, head.layers[0].bias), labels)
    )  # type: ignore[arg-type]


def test_two_towers_nest_every_prefix_normalised_by_itself() -> None:
    """Section 3: the plain sum over dims of weight * loss(normalize(prefix)), for two towers."""
    (left, _), right = inputs(), torch.randn(10, 16, dtype=torch.float64, requires_grad=True)
    weights = (1.0, 0.5, 2.0, 0.25)
    ours = nested_pair_loss(left, right, DIMS, weights, lambda a, b: two_tower_loss(a, b, 0.1))
    naive = torch.zeros(())
    for m, c in zip(DIMS, weights, strict=True):
        logits = functional.normalize(left[:, :m]) @ functional.normalize(right[:, :m]).T / 0.1
        target = torch.arange(10)
        naive = naive + c * (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    assert torch.allclose(ours, naive)
    for one, other in zip(
        torch.autograd.grad(ours, (left, right)), torch.autograd.grad(naive, (left, right)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-10)


@settings(max_examples=60)
@given(st.sets(st.integers(1, 99), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 99), st.integers(0, 99))
def test_dims_of_a_step_hold_the_whole_embedding_and_depend_on_seed_and_step_alone(
    dims: set[int], num: int, seed: int, step: int
) -> None:
    ordered = tuple(sorted(dims))
    chosen = choose_dims(ordered, num, seed, step)
    assert chosen == choose_dims(ordered, num, seed, step)
    assert len(chosen) == min(num, len(ordered))
    assert list(chosen) == sorted(set(chosen) & dims)
    assert chosen[-1] == ordered[-1]
    assert choose_dims(ordered, None, seed, step) == ordered


def test_every_dim_gets_its_turn() -> None:
    counts = dict.fromkeys(DIMS, 0)
    for step in range(300):
        for m in choose_dims(DIMS, 2, 0, step):
            counts[m] += 1
    assert counts[16] == 300
    assert all(70 < counts[m] < 130 for m in DIMS[:-1])
