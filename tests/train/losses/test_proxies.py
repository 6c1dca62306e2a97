"""Sampled and sharded classes: which classes a step scores, which a worker holds, how they start."""

import numpy as np
import pytest
import torch

from lookalike.errors import UsageError
from lookalike.train.losses.matryoshka import NestedCosine, NestedLinear
from lookalike.train.losses.proxies import (
    Shard,
    choose_classes,
    gather_labels,
    gather_rows,
    logsumexp_workers,
    random_rows,
    sum_workers,
)


def test_one_process_needs_no_group() -> None:
    values = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(values) is values
    assert sum_workers(values) is values
    assert logsumexp_workers(values) is values
    labels = torch.tensor([[1, -1]])
    assert gather_labels(labels) is labels


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards_cut_the_classes_in_rank_order(world: int) -> None:
    shards = [Shard.of_worker(11, rank, world) for rank in range(world)]
    assert [c for shard in shards for c in range(shard.first, shard.stop)] == list(range(11))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(shard.whole == (world == 1) for shard in shards)


def test_more_workers_than_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="3 classes cannot be sharded over 4 workers; set shard: false"):
        Shard.of_worker(3, 0, 4)


def test_random_rows_are_parts_of_one_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookalike.train.losses.proxies.ROWS_AT_ONCE", 4)
    parts = {}
    for world in (1, 3):
        for rank in range(world):
            torch.manual_seed(7)
            parts[world, rank] = random_rows(Shard.of_worker(11, rank, world), (2,), torch.randn)
            after = torch.rand(1)
            assert torch.equal(parts.setdefault((0, 0), after), after)  # every worker's random state moves alike
    assert torch.equal(torch.cat([parts[3, rank] for rank in range(3)]), parts[1, 0])


def test_sharded_heads_start_like_whole_ones() -> None:
    shard = Shard(100, 400, 1000)
    linear = NestedLinear((4, 16), 1000, shard=shard)
    for m, layer in zip((4, 16), linear.layers, strict=True):
        for parameter in layer.parameters():
            assert len(parameter) == 300
            assert 0.95 * m**-0.5 < parameter.abs().max() <= m**-0.5
            assert abs(parameter.mean()) < 0.1 * m**-0.5
    cosine = NestedCosine((4, 16), 1000, "mrl-e", shard=shard)
    assert torch.allclose(cosine.proxies[0].norm(dim=1), torch.ones(300))
    assert len(cosine.proxies) == 1


def test_a_sample_holds_every_positive_and_random_others() -> None:
    """An et al. 2021, section 3.2."""
    labels = torch.tensor([[5, -1], [17, 5], [-1, -1]])
    chosen = choose_classes(labels, 40, 10, seed=3, step=1)
    assert len(chosen) == 10
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert {5, 17} <= set(chosen.tolist())
    assert torch.equal(chosen, choose_classes(labels.flip(0), 40, 10, seed=3, step=1))
    assert not torch.equal(chosen, choose_classes(labels, 40, 10, seed=3, step=2))
    assert not torch.equal(chosen, choose_classes(labels, 40, 10, seed=4, step=1))
    assert choose_classes(torch.arange(8), 40, 3, seed=0, step=0).tolist() == list(range(8))  # positives all stay


def test_every_class_is_drawn_in_time() -> None:
    counts = np.zeros(20)
    for step in range(400):
        counts[choose_classes(torch.tensor([4]), 20, 5, seed=0, step=step).numpy()] += 1
    assert counts[4] == 400
    others = np.delete(counts, 4)
    assert others.sum() == 1600
    assert others.min() > 50
    assert others.max() < 120
