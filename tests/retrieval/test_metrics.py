"""Metrics against loops written from the definitions, and against torchmetrics where the definition is the same."""

from importlib import import_module

import numpy as np
import pytest
import torch

from lookalike.errors import UsageError
from lookalike.retrieval import metrics


@pytest.fixture
def ranking():
    """Neighbour labels [40, 60] that rank a whole database of 60 items with 6 classes, and the query labels."""
    generator = np.random.default_rng(3)
    database = generator.integers(0, 6, 60)
    labels = generator.integers(0, 6, 40)
    return np.stack([generator.permutation(database) for _ in range(40)]), labels, database


def ap_by_k(neighbours, label, k):
    """(1/k) sum of rel_i * P@i, by the letter."""
    total = 0.0
    for i in range(1, k + 1):
        precision = sum(item == label for item in neighbours[:i]) / i
        total += (neighbours[i - 1] == label) * precision
    return total / k


@pytest.mark.parametrize("k", [1, 3, 10, 60])
def test_map_at_k_of_the_mrl_paper_divides_by_k(ranking, k):
    neighbours, labels, _ = ranking
    expected = np.mean([ap_by_k(line, label, k) for line, label in zip(neighbours, labels, strict=True)])
    assert metrics.map_at_k_by_k(neighbours, labels, k) == pytest.approx(expected)
    if k == 10:
        assert metrics.map_at_k_by_k(neighbours, labels, 10) == pytest.approx(expected)


def torch_mean(name, neighbours, labels, **settings):
    """The mean over queries of torchmetrics' metric."""
    import_module("lookalike.vision.backbones")  # makes torchvision, which torchmetrics imports, importable on CPU
    function = getattr(import_module("torchmetrics.functional.retrieval"), name)
    scores = torch.arange(neighbours.shape[1], 0, -1).float()
    return np.mean(
        [
            float(function(scores, torch.tensor(line == label), **settings))
            for line, label in zip(neighbours, labels, strict=True)
        ]
    )


@pytest.mark.parametrize("k", [1, 5, 20])
def test_precision_and_recall_are_those_of_torchmetrics(ranking, k):
    neighbours, labels, database = ranking
    relevant = metrics.count_relevant(database, labels)
    assert relevant.tolist() == [(database == label).sum() for label in labels]
    assert metrics.precision_at_k(neighbours, labels, k) == pytest.approx(
        torch_mean("retrieval_precision", neighbours, labels, top_k=k)
    )
    assert metrics.recall_at_k(neighbours, labels, k, num_relevant=relevant) == pytest.approx(
        torch_mean("retrieval_recall", neighbours, labels, top_k=k)
    )


def test_map_over_the_whole_database_is_that_of_torchmetrics(ranking):
    """At k = all items the hits in the top k are all relevant items, so that both denominators agree."""
    neighbours, labels, database = ranking
    relevant = metrics.count_relevant(database, labels)
    ours = metrics.map_at_k_by_relevant(neighbours, labels, 60, num_relevant=relevant)
    assert ours == pytest.approx(torch_mean("retrieval_average_precision", neighbours, labels))


@pytest.mark.parametrize("k", [1, 3, 10, 60])
def test_map_by_relevant_divides_by_k_or_all_there_is_to_find(ranking, k):
    """min(k, R): 60 items of 6 classes have more to find than a short list can hold."""
    neighbours, labels, database = ranking
    relevant = metrics.count_relevant(database, labels)
    assert relevant.min() > 3
    expected = np.mean(
        [
            ap_by_k(line, label, k) * k / min(k, total)
            for line, label, total in zip(neighbours, labels, relevant, strict=True)
        ]
    )
    assert metrics.map_at_k_by_relevant(neighbours, labels, k, num_relevant=relevant) == pytest.approx(expected)


def test_queries_with_nothing_to_find_are_left_out_of_what_divides_by_it(ranking):
    neighbours, labels, database = ranking
    more, lines = np.append(labels, 99), np.vstack([neighbours, neighbours[:1]])
    relevant = metrics.count_relevant(database, more)
    assert relevant[-1] == 0
    for figure in (metrics.map_at_k_by_relevant, metrics.recall_at_k):
        wanted = figure(neighbours, labels, 10, num_relevant=relevant[:-1])
        assert figure(lines, more, 10, num_relevant=relevant) == pytest.approx(wanted)


def test_the_denominator_changes_the_figure(ranking):
    """The trap: the same ranking, "mAP@10" three times."""
    neighbours, labels, _ = ranking
    by_k = metrics.map_at_k_by_k(neighbours, labels, 10)
    by_hits = torch_mean("retrieval_average_precision", neighbours, labels, top_k=10)
    assert by_hits > 1.5 * by_k
    few = np.array([[1, 0, 0, 0]])
    assert metrics.map_at_k_by_k(few, np.array([1]), 4) == 0.25
    assert metrics.map_at_k_by_relevant(few, np.array([1]), 4, num_relevant=1) == 1.0


def test_top1_is_the_nearest_neighbours_label(ranking):
    neighbours, labels, _ = ranking
    assert metrics.precision_at_k(neighbours, labels, 1) == (neighbours[:, 0] == labels).mean()


def test_float16_labels_are_refused_because_they_merge_classes():
    """MRL's published code keeps labels as float16: 2048 and 2049 become one class there."""
    labels = np.array([2049], np.int64)
    neighbours = np.array([[2048, 2049]], np.int64)
    assert (neighbours.astype(np.float16) == labels.astype(np.float16)[:, None]).all()  # the bug
    assert metrics.precision_at_k(neighbours, labels, 2) == 0.5
    for dtype in (np.float16, np.float64):
        with pytest.raises(UsageError, match="float16 merges"):
            metrics.precision_at_k(neighbours.astype(dtype), labels, 2)


def test_missing_hits_and_unknown_labels_are_never_relevant():
    assert metrics.precision_at_k(np.array([[-1, 3, -1]]), np.array([3]), 3) == pytest.approx(1 / 3)
    assert metrics.precision_at_k(np.array([[-1, -1]]), np.array([-1]), 2) == 0
    assert metrics.precision_at_k(np.array([["", "a"]]), np.array([""]), 2) == 0
    assert metrics.map_at_k_by_k(np.array([["", "a"]]), np.array(["a"]), 2) == 0.25


def test_wrong_shapes_are_refused():
    with pytest.raises(UsageError, match="go to 2"):
        metrics.precision_at_k(np.zeros((1, 2), int), np.zeros(1, int), 3)
    with pytest.raises(UsageError, match="must be"):
        metrics.precision_at_k(np.zeros((1, 2), int), np.zeros(2, int), 1)
    with pytest.raises(UsageError, match="no query"):
        metrics.precision_at_k(np.zeros((0, 2), int), np.zeros(0, int), 1)


def test_overlap_is_the_share_of_exact_rows_found():
    found = np.array([[5, 1, 9], [-1, -1, -1], [1, 2, 3]])
    exact = np.array([[1, 5, 7], [0, 1, 2], [-1, -1, -1]])
    assert metrics.per_query_overlap(found, exact).tolist() == [2 / 3, 0, 1]
    few = np.array([[9, 4, -1], [3, -1, -1], [1, 2, 3]])  # a small database has no more
    assert metrics.per_query_overlap(found, few).tolist() == [0.5, 0, 1]
