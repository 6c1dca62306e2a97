"""Pair losses against pytorch-metric-learning and loops over pairs, values and gradients (float64)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lookalike.train.losses.pairs import (
    Mining,
    contrastive_loss,
    cosine_losses,
    distance_log_weights,
    draw_negatives,
    relate,
    semi_hard_negatives,
    triplet_loss,
    two_tower_loss,
    unit_distances,
)

VALUES = torch.tensor([0, 1, 0, 2, 1, 0, -1, 3, 2, -1, 4, 1])


def rows(dim: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(VALUES), dim, dtype=torch.float64, generator=generator).requires_grad_()


def uniform(seed: int = 1) -> torch.Tensor:
    return torch.rand(len(VALUES), len(VALUES), generator=torch.Generator().manual_seed(seed))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, *inputs: torch.Tensor) -> None:
    assert torch.allclose(ours, theirs, rtol=1e-9), (ours, theirs)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert torch.allclose(one, other, atol=1e-9)
        assert one.abs().max() > 0


def drawn(z: torch.Tensor, mining: Mining) -> list[tuple[int, int, int]]:
    """The triplets of known rows, by a loop over pairs, with the negative that our miner gives."""
    positives, negatives = relate(VALUES, VALUES)
    distances = unit_distances(z.detach())
    if mining == "semi_hard":
        picked = semi_hard_negatives(distances, negatives)
    else:
        weights = (
            torch.where(negatives, 0.0, -math.inf)
            if mining == "random"
            else distance_log_weights(distances, negatives, z.shape[1])
        )
        picked = draw_negatives(weights, uniform())
    return [(a, p, int(picked[a, p])) for a in range(len(z)) for p in range(len(z)) if positives[a, p]]


@pytest.mark.parametrize("mining", ["random", "semi_hard"])
def test_triplets_against_pytorch_metric_learning(mining: Mining) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    reducers = pytest.importorskip("pytorch_metric_learning.reducers")
    z = rows()
    triplets = tuple(torch.tensor(column) for column in zip(*drawn(z, mining), strict=True))
    oracle = losses.TripletMarginLoss(margin=0.2, reducer=reducers.MeanReducer())
    ours = triplet_loss(z, VALUES, uniform(), mining=mining, margin=0.2, beta=1.2)
    assert_same(ours, oracle(z, indices_tuple=triplets), z)


@pytest.mark.parametrize("dim", [4, 16])
def test_distance_weighted_margin_loss_against_pytorch_metric_learning(dim: int) -> None:
    """Wu et al. 2017, section 4."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z = rows(dim)
    triplets = tuple(torch.tensor(column) for column in zip(*drawn(z, "distance_weighted"), strict=True))
    # beta is exact in the oracle's float32
    ours = triplet_loss(z, VALUES, uniform(), mining="distance_weighted", margin=0.2, beta=1.25)
    assert_same(ours, losses.MarginLoss(margin=0.2, beta=1.25)(z, indices_tuple=triplets), z)


@pytest.mark.parametrize("dim", [3, 8, 64])
def test_sampling_weights_are_those_of_pytorch_metric_learning_at_the_prefix_s_own_dim(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    common = pytest.importorskip("pytorch_metric_learning.utils.loss_and_miner_utils")
    caught = {}
    monkeypatch.setattr(
        common, "get_random_triplet_indices", lambda labels, ref_labels=None, weights=None: caught.update(w=weights)
    )
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(30, 64, dtype=torch.float64, generator=generator) + torch.linspace(1.5, 0, 64)  # near enough
    values = torch.arange(30) % 7
    miners.DistanceWeightedMiner().mine(z[:, :dim], values, z[:, :dim], values)
    _, negatives = relate(values, values)
    ours = distance_log_weights(unit_distances(z[:, :dim]), negatives, dim).softmax(dim=1)
    reachable = (negatives & (unit_distances(z[:, :dim]) < 1.4)).any(dim=1)
    assert reachable.sum() > 10
    assert torch.allclose(ours[reachable], caught["w"][reachable], atol=1e-9)


def test_weights_stay_finite_at_2048_dims_where_the_raw_formula_overflows() -> None:
    z = torch.randn(16, 2048, generator=torch.Generator().manual_seed(0)) + 1.0
    values = torch.arange(16) // 2
    distances, (_, negatives) = unit_distances(z), relate(values, values)
    raw = (2 - 2048) * distances.log() - (2048 - 3) / 2 * (1 - distances**2 / 4).log()
    assert not torch.isfinite(raw[negatives].exp()).all()
    weights = distance_log_weights(distances, negatives, 2048).exp()
    assert torch.isfinite(weights).all()
    assert (weights.amax(dim=1) == 1.0).all()
    assert (weights[~negatives] == 0.0).all()


def test_far_negatives_are_drawn_when_there_are_no_near_ones_and_cost_nothing() -> None:
    z = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 0.01]], requires_grad=True)
    values = torch.tensor([1, 0, 0])  # the negative comes first: a draw from no weights gives the last
    loss = triplet_loss(z, values, torch.rand(3, 3), mining="distance_weighted", margin=0.2, beta=1.2)
    assert loss.item() == 0.0


@settings(max_examples=40)
@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 10_000))
def test_semi_hard_negatives_by_a_loop(n: int, num_values: int, seed: int) -> None:
    """Schroff et al. 2015: the nearest negative beyond the positive, or the farthest."""
    generator = torch.Generator().manual_seed(seed)
    distances = unit_distances(torch.randn(n, 3, dtype=torch.float64, generator=generator))
    values = torch.randint(-1, num_values, (n,), generator=generator)
    positives, negatives = relate(values, values)
    picked = semi_hard_negatives(distances, negatives)
    for a, p in positives.nonzero().tolist():
        others = negatives[a].nonzero()[:, 0].tolist()
        if others:
            beyond = [x for x in others if distances[a, x] > distances[a, p]]
            best = min(beyond, key=lambda x: distances[a, x]) if beyond else max(others, key=lambda x: distances[a, x])
            assert picked[a, p] == best


@settings(max_examples=40)
@given(st.integers(2, 10), st.integers(0, 10_000))
def test_negatives_are_drawn_where_there_is_weight(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, n, generator=generator) * 30
    weights[torch.rand(n, n, generator=generator) < 0.4] = -math.inf
    picked = draw_negatives(weights, torch.rand(n, n, generator=generator))
    some = weights.isfinite().any(dim=1)
    assert weights.gather(1, picked)[some].isfinite().all()


def test_the_lowest_draw_takes_the_first_negative_with_weight() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.4, 0.6]] * 4).log()
    assert draw_negatives(weights, torch.zeros(4, 4)).unique().tolist() == [2]


def test_a_negative_as_far_as_the_positive_is_not_beyond_it() -> None:
    distances = torch.tensor([[0.0, 0.5, 0.5, 0.7]] * 4)
    negatives = torch.tensor([[False, False, True, True]] * 4)
    assert semi_hard_negatives(distances, negatives)[0, 1] == 3


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).log().repeat(4, 1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([draw_negatives(weights, torch.rand(4, 4, generator=generator)).flatten() for _ in range(500)])
    share = draws.bincount(minlength=4) / len(draws)
    assert torch.allclose(share, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.02)


def test_contrastive_is_the_supervised_form_of_pytorch_metric_learning() -> None:
    """Khosla et al. 2020, equation 2."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z = rows()
    known = VALUES >= 0
    ours = contrastive_loss(z, VALUES, z, VALUES, temperature=0.1)
    oracle = losses.SupConLoss(temperature=0.1)  # averages over anchors with a loss, which are those with a positive
    assert_same(ours, oracle(z[known], VALUES[known]), z)


def test_contrastive_on_two_views_is_ntxent() -> None:
    """Chen et al. 2020, equation 1."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z, row = rows(), torch.arange(12) % 6
    ours = contrastive_loss(z, row, z, row, temperature=0.2)
    assert_same(ours, losses.NTXentLoss(temperature=0.2)(z, row), z)


def test_contrastive_against_candidates_elsewhere() -> None:
    """Rows 4.. 7 of a larger batch, as a worker among others sees it: the parts average to the whole."""
    z = rows()
    whole = contrastive_loss(z, VALUES, z, VALUES, temperature=0.1)
    counts = relate(VALUES, VALUES)[0].any(dim=1)
    parts = [
        contrastive_loss(z[i : i + 4], VALUES[i : i + 4], z, VALUES, temperature=0.1, offset=i)
        * counts[i : i + 4].sum()
        for i in (0, 4, 8)
    ]
    assert_same(torch.stack(parts).sum() / counts.sum(), whole, z)


def test_cosine_is_torch_s_cosine_embedding_loss_on_each_kind_of_pair() -> None:
    z = rows()
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j and VALUES[i] >= 0 and VALUES[j] >= 0]
    same = [pair for pair in pairs if VALUES[pair[0]] == VALUES[pair[1]]]
    other = [pair for pair in pairs if VALUES[pair[0]] != VALUES[pair[1]]]
    theirs = sum(
        functional.cosine_embedding_loss(
            z[[i for i, _ in kind]], z[[j for _, j in kind]], torch.full((len(kind),), float(sign)), margin=0.3
        )
        for kind, sign in ((same, 1), (other, -1))
    )
    assert isinstance(theirs, torch.Tensor)
    assert_same(cosine_losses(z, VALUES, 0.3).sum(), theirs, z)


def test_two_towers_against_cross_entropy_with_the_diagonal_as_target() -> None:
    left, right = rows(seed=0), rows(seed=1)
    logits = functional.normalize(left) @ functional.normalize(right).T / 0.07
    target = torch.arange(12)
    theirs = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
    assert_same(two_tower_loss(left, right, 0.07), theirs, left, right)


@pytest.mark.parametrize("values", [[-1, -1, -1], [0, 1, 2], [0, 0, 0], [0, 0, -1]])
def test_a_batch_without_triplets_gives_zero_with_a_gradient_path(values: list[int]) -> None:
    z = torch.randn(3, 4, requires_grad=True)
    for mining in ("random", "semi_hard", "distance_weighted"):
        loss = triplet_loss(z, torch.tensor(values), torch.rand(3, 3), mining=mining, margin=0.2, beta=1.2)
        loss.backward()
        assert loss.item() == 0.0
        assert z.grad is not None
        assert z.grad.abs().max() == 0.0


def test_unknown_rows_get_no_gradient() -> None:
    z = rows()
    everything = [
        triplet_loss(z, VALUES, uniform(), mining=mining, margin=0.2, beta=1.2)
        for mining in ("random", "semi_hard", "distance_weighted")
    ]
    everything += [contrastive_loss(z, VALUES, z, VALUES, temperature=0.1), cosine_losses(z, VALUES, 0.2).sum()]
    for loss in everything:
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert gradient[VALUES < 0].abs().max() == 0.0
        assert gradient[VALUES == 0].abs().max() > 0.0


def test_equal_rows_have_a_finite_gradient() -> None:
    z = torch.ones(4, 3, requires_grad=True)
    loss = triplet_loss(z, torch.tensor([0, 0, 1, 1]), torch.rand(4, 4), mining="semi_hard", margin=0.2, beta=1.2)
    loss.backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
