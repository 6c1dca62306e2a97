"""Metrics against loops written from the definitions, and against four libraries where the definition is the same."""

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import ndcg_score
from sklearn.neighbors import KNeighborsClassifier

from lookalike.errors import UsageError
from lookalike.retrieval import metrics
from lookalike.retrieval.metrics import get_metric, mean
from lookalike.retrieval.relevance import ByPairs, Judged, judge_labels

LISTS = {
    "random": lambda r: (r.integers(0, 6, 60), r.integers(0, 6, 40)),
    "none relevant": lambda r: (r.integers(0, 6, 60), r.integers(6, 9, 40)),
    "all relevant": lambda r: (np.full(60, 3), np.full(40, 3)),
    "one relevant": lambda r: (np.arange(60), r.integers(0, 60, 40)),
    "fewer than k": lambda r: (r.integers(0, 3, 4), r.integers(0, 4, 40)),
    "many classes": lambda r: (r.integers(2040, 2060, 60), r.integers(2040, 2060, 40)),
}


class Case:
    """Every query ranks the whole database of classes, padded to 60 ranks; the lists are ``judged``."""

    def __init__(self, name: str) -> None:
        random = np.random.default_rng(3)
        self.database, self.labels = LISTS[name](random)
        self.ranked = np.stack([random.permutation(len(self.database)) for _ in self.labels])
        self.neighbours = np.pad(self.database[self.ranked], ((0, 0), (0, 60 - len(self.database))), constant_values=-1)
        self.relevant = np.array([(self.database == label).sum() for label in self.labels])
        self.judged = judge_labels(self.neighbours, self.labels, self.relevant)

    def figure(self, id_: str) -> float:
        """Ours, 0 if no query counts."""
        scores = get_metric(id_).score(self.judged)
        return 0.0 if np.isnan(scores).all() else mean(scores)

    def loop(self, score: Callable[[list[bool], int], float], counts: bool) -> float:
        """Mean of ``score(hits in rank order, R)``; ``counts``: over queries with R > 0 only."""
        pairs = zip(self.neighbours, self.labels, self.relevant, strict=True)
        scores = [score((line == label).tolist(), int(total)) for line, label, total in pairs if total or not counts]
        return float(np.mean(scores)) if scores else 0.0


@pytest.fixture(params=list(LISTS))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def ap_sum(hits: list[bool], k: int) -> float:
    """The sum of rel_i * P@i, by the letter."""
    return sum(hits[i] * sum(hits[: i + 1]) / (i + 1) for i in range(k))


@pytest.mark.parametrize("k", [1, 3, 10, 60])
def test_figures_are_those_of_loops(case: Case, k: int) -> None:
    wanted: dict[str, tuple[Callable[[list[bool], int], float], bool]] = {
        "p_at_{k}": (lambda hits, total: sum(hits[:k]) / k, False),
        "hit_at_{k}": (lambda hits, total: float(any(hits[:k])), False),
        "recall_at_{k}": (lambda hits, total: sum(hits[:k]) / total, True),
        "map_at_{k}_by_k": (lambda hits, total: ap_sum(hits, k) / k, False),
        "map_at_{k}_by_hits": (lambda hits, total: ap_sum(hits, k) / max(1, sum(hits[:k])), False),
        "map_at_{k}_by_relevant": (lambda hits, total: ap_sum(hits, k) / total, True),
        "map_at_{k}_by_reachable": (lambda hits, total: ap_sum(hits, k) / min(k, total), True),
        "map_at_r": (lambda hits, total: ap_sum(hits, total) / total, True),
        "r_precision": (lambda hits, total: sum(hits[:total]) / total, True),
        "mrr_at_{k}": (lambda hits, total: 1 / (hits[:k].index(True) + 1) if any(hits[:k]) else 0.0, False),
    }
    for form, (score, counts) in wanted.items():
        assert case.figure(form.replace("{k}", str(k))) == pytest.approx(case.loop(score, counts), abs=1e-12), form


def torch_mean(name: str, case: Case, **settings: object) -> float:
    """The mean of torchmetrics' metric over the queries that count for us, or over all if it takes ``k`` as it is."""
    import_module("lookalike.vision.backbones")  # makes torchvision, which torchmetrics imports, importable on CPU
    function = getattr(import_module("torchmetrics.functional.retrieval"), name)
    scores = torch.arange(case.neighbours.shape[1], 0, -1).float()
    lines = zip(case.neighbours, case.labels, strict=True)
    return float(np.mean([float(function(scores, torch.tensor(line == label), **settings)) for line, label in lines]))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_torchmetrics(case: Case, k: int) -> None:
    """It counts queries with nothing to find as 0; ours are the mean over the others."""
    share = (case.relevant > 0).mean()
    for id_, name, weight in (
        (f"p_at_{k}", "retrieval_precision", 1),
        (f"hit_at_{k}", "retrieval_hit_rate", 1),
        (f"map_at_{k}_by_hits", "retrieval_average_precision", 1),
        (f"mrr_at_{k}", "retrieval_reciprocal_rank", 1),
        (f"recall_at_{k}", "retrieval_recall", share),
        (f"ndcg_at_{k}", "retrieval_normalized_dcg", share),
    ):
        assert case.figure(id_) * weight == pytest.approx(torch_mean(name, case, top_k=k), abs=1e-6), id_
    assert case.figure("r_precision") * share == pytest.approx(torch_mean("retrieval_r_precision", case), abs=1e-6)


@pytest.mark.parametrize("k", [10, 60])
def test_pytorch_metric_learning(case: Case, k: int) -> None:
    """It leaves out queries with nothing to find; its mean average precision divides by all relevant rows."""
    found = case.relevant > 0
    if len(case.database) < 60 or not found.any():
        pytest.skip("it has no figure for lists with missing rows or without a relevant one")

    def ranked(queries: object, num: int, database: object, same: bool) -> tuple[None, torch.Tensor]:
        return None, torch.tensor(case.ranked[:, :num])

    wanted = {
        "precision_at_1": "p_at_1",
        "mean_average_precision": f"map_at_{k}_by_relevant",
        "mean_reciprocal_rank": f"mrr_at_{k}",
    }
    if k >= case.relevant.max():
        wanted |= {"mean_average_precision_at_r": "map_at_r", "r_precision": "r_precision"}
    calculator = AccuracyCalculator(include=tuple(wanted), k=k, knn_func=ranked, device=torch.device("cpu"))
    labels = torch.tensor(case.labels), torch.tensor(case.database)
    theirs = calculator.get_accuracy(torch.zeros(40, 2), labels[0], torch.zeros(60, 2), labels[1], False)
    for name, id_ in wanted.items():
        ours = get_metric(id_).score(case.judged)[found]
        assert mean(ours) == pytest.approx(float(theirs[name]), abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5, 20])
def test_ranx(case: Case, k: int) -> None:
    ranx = pytest.importorskip("ranx")
    found = case.relevant > 0
    if not found.any():
        pytest.skip("it takes no query without a relevant row")
    judgements, runs = {}, {}
    for i in np.flatnonzero(found):
        judgements[f"q{i}"] = {f"d{row}": 1 for row in np.flatnonzero(case.database == case.labels[i])}
        runs[f"q{i}"] = {f"d{row}": float(100 - rank) for rank, row in enumerate(case.ranked[i])}
    names = {
        f"recall@{k}": f"recall_at_{k}",
        f"map@{k}": f"map_at_{k}_by_relevant",
        f"ndcg@{k}": f"ndcg_at_{k}",
        f"ndcg_burges@{k}": f"ndcg_at_{k}_exponential",
        f"precision@{k}": f"p_at_{k}",
        f"mrr@{k}": f"mrr_at_{k}",
        f"hit_rate@{k}": f"hit_at_{k}",
        "r-precision": "r_precision",
    }
    theirs = ranx.evaluate(ranx.Qrels(judgements), ranx.Run(runs), list(names), make_comparable=True)
    for name, id_ in names.items():
        ours = float(np.nanmean(get_metric(id_).score(case.judged)[found]))
        assert ours == pytest.approx(theirs[name], abs=1e-6), name


def graded(seed: int, num: int = 30, rows: int = 50) -> tuple[np.ndarray, np.ndarray, Judged]:
    """Grades 0 to 3 of every row for every query [num, rows], the ranked rows, and the lists judged by pairs."""
    random = np.random.default_rng(seed)
    grades = random.choice(4, (num, rows), p=[0.8, 0.1, 0.06, 0.04]).astype(float)
    grades[0], grades[1] = 0, 3
    queries, items = np.nonzero(grades)
    pairs = ByPairs(queries, items, grades[queries, items], num_queries=num)
    ranked = np.stack([random.permutation(rows) for _ in range(num)])
    return grades, ranked, pairs.judge(ranked)


@pytest.mark.parametrize("k", [1, 5, 50])
def test_graded_gain_is_that_of_scikit_learn(k: int) -> None:
    grades, ranked, judged = graded(4)
    ours, exponential = (get_metric(f"ndcg_at_{k}{form}").score(judged) for form in ("", "_exponential"))
    places = np.argsort(ranked, axis=1)
    for i in range(len(grades)):
        if not grades[i].any():
            assert np.isnan(ours[i])
            continue
        scores = -places[i][None].astype(float)
        assert ours[i] == pytest.approx(ndcg_score(grades[i][None], scores, k=k), abs=1e-9)
        assert exponential[i] == pytest.approx(ndcg_score(2 ** grades[i][None] - 1, scores, k=k), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5, 50])
def test_graded_gain_is_that_of_ranx(k: int) -> None:
    ranx = pytest.importorskip("ranx")
    grades, ranked, judged = graded(4)
    ours, exponential = (get_metric(f"ndcg_at_{k}{form}").score(judged) for form in ("", "_exponential"))
    asked = range(1, len(grades))
    judgements = {f"q{i}": {f"d{row}": int(grades[i, row]) for row in np.flatnonzero(grades[i])} for i in asked}
    runs = {f"q{i}": {f"d{row}": float(100 - rank) for rank, row in enumerate(ranked[i])} for i in asked}
    theirs = ranx.evaluate(ranx.Qrels(judgements), ranx.Run(runs), [f"ndcg@{k}", f"ndcg_burges@{k}"])
    assert mean(ours) == pytest.approx(theirs[f"ndcg@{k}"], abs=1e-6)
    assert mean(exponential) == pytest.approx(theirs[f"ndcg_burges@{k}"], abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_vote_is_that_of_scikit_learn_where_no_classes_are_equally_frequent(k: int) -> None:
    random = np.random.default_rng(5)
    points, classes = random.normal(size=(80, 4)), random.integers(0, 3, 80)
    queries, labels = random.normal(size=(60, 4)), random.integers(0, 3, 60)
    ranked = np.argsort(((queries[:, None] - points) ** 2).sum(axis=2), axis=1)
    votes = get_metric(f"vote_at_{k}").score(judge_labels(classes[ranked], labels))
    counts = np.stack([np.bincount(line, minlength=3) for line in classes[ranked[:, :k]]])
    clear = np.sort(counts, axis=1)[:, -1] > np.sort(counts, axis=1)[:, -2]
    theirs = KNeighborsClassifier(k).fit(points, classes).predict(queries) == labels
    assert clear.sum() > 30
    assert votes[clear].tolist() == theirs[clear].astype(float).tolist()


def test_of_equally_frequent_classes_the_one_that_ranks_first_wins_the_vote() -> None:
    judged = judge_labels(
        np.array([[2, 1, 1, 2], [1, 2, 2, 1], [-1, -1, -1, 5], [7, 8, 8, -1]]), np.array([2, 2, 5, 8])
    )
    assert get_metric("vote_at_4").score(judged).tolist() == [1, 0, 1, 1]
    with pytest.raises(UsageError, match="pairs have none"):
        get_metric("vote_at_4").score(graded(4)[2])


def test_the_denominator_changes_the_figure() -> None:
    """The trap: the same ranking, "mAP@10" four times, and "R@10" twice."""
    judged = judge_labels(np.array([[1, 0, 0, 0]]), np.array([1]), 2)
    figures = {
        end: mean(get_metric(f"map_at_4_by_{end}").score(judged)) for end in ("k", "hits", "relevant", "reachable")
    }
    assert figures == {"k": 0.25, "hits": 1.0, "relevant": 0.5, "reachable": 0.5}
    long = judge_labels(np.array([[1, 0, 0, 0]]), np.array([1]), 1300)
    assert mean(get_metric("map_at_4_by_reachable").score(long)) == 0.25
    assert mean(get_metric("recall_at_4").score(long)) == 1 / 1300
    assert mean(get_metric("hit_at_4").score(long)) == 1.0
    random = Case("random")
    assert random.figure("map_at_10_by_hits") > 1.5 * random.figure("map_at_10_by_k")


def test_recall_is_divided_by_what_the_database_holds_not_by_1300() -> None:
    """MRL's published code divides by ImageNet's 1,300 pictures of a class on any data."""
    case = Case("random")
    hits = np.mean([(line[:10] == label).sum() for line, label in zip(case.neighbours, case.labels, strict=True)])
    assert case.figure("recall_at_10") > 50 * hits / 1300


def test_figures_leave_the_lists_as_they_are() -> None:
    """MRL's published funnel writes into the neighbours that the next plan starts from."""
    case = Case("random")
    before = case.neighbours.copy()
    for id_ in ("map_at_10_by_k", "ndcg_at_10", "vote_at_10", "recall_at_10", "map_at_r"):
        get_metric(id_).score(judge_labels(case.neighbours, case.labels, case.relevant))
    assert (case.neighbours == before).all()


def test_float16_labels_are_refused_because_they_merge_classes() -> None:
    """MRL's published code keeps labels as float16: 2048 and 2049 become one class there."""
    labels = np.array([2049], np.int64)
    neighbours = np.array([[2048, 2049]], np.int64)
    assert (neighbours.astype(np.float16) == labels.astype(np.float16)[:, None]).all()  # the bug
    assert mean(get_metric("p_at_2").score(judge_labels(neighbours, labels))) == 0.5
    for dtype in (np.float16, np.float64):
        with pytest.raises(UsageError, match="float16 merges"):
            judge_labels(neighbours.astype(dtype), labels)


def test_padding_reaches_no_figure() -> None:
    """A distributed sampler that repeats rows to fill a batch would count them twice; missing rows here are -1."""
    case = Case("fewer than k")
    short = judge_labels(case.neighbours[:, :4], case.labels, case.relevant)
    for id_ in ("recall_at_{k}", "hit_at_{k}", "mrr_at_{k}", "map_at_{k}_by_relevant", "ndcg_at_{k}"):
        at_four = mean(get_metric(id_.replace("{k}", "4")).score(short))
        assert case.figure(id_.replace("{k}", "60")) == pytest.approx(at_four), id_


def test_queries_with_nothing_to_find_do_not_count_in_what_divides_by_it() -> None:
    judged = judge_labels(np.array([[1, 2], [3, 4]]), np.array([1, 9]), np.array([1, 0]))
    for id_ in ("recall_at_2", "map_at_2_by_relevant", "map_at_2_by_reachable", "map_at_r", "ndcg_at_2", "r_precision"):
        assert mean(get_metric(id_).score(judged)) == 1.0, id_
    for id_ in ("hit_at_2", "mrr_at_2", "map_at_2_by_hits"):
        assert mean(get_metric(id_).score(judged)) == 0.5, id_


def test_missing_hits_and_unknown_labels_are_never_relevant() -> None:
    for neighbours, label, wanted in (([-1, 3, -1], 3, 1 / 3), ([-1, -1, 2], -1, 0), (["", "a", "b"], "", 0)):
        judged = judge_labels(np.array([neighbours]), np.array([label]))
        assert mean(get_metric("p_at_3").score(judged)) == pytest.approx(wanted)


def test_lists_that_are_too_short_are_refused() -> None:
    """pytorch-metric-learning 240, 362: MAP@R from fewer than R ranks came out too small, without a word."""
    judged = judge_labels(np.zeros((1, 2), int), np.zeros(1, int), 3)
    for id_, words in (("p_at_3", "go to 2"), ("map_at_r", "has 3 relevant rows"), ("r_precision", "retrieve 3")):
        with pytest.raises(UsageError, match=words):
            get_metric(id_).score(judged)
    assert get_metric("map_at_r").depth(judged.num_relevant) == 3
    assert get_metric("p_at_20").depth(judged.num_relevant) == 20
    with pytest.raises(UsageError, match="must be"):
        judge_labels(np.zeros((1, 2), int), np.zeros(2, int))
    with pytest.raises(UsageError, match="no query"):
        mean(np.array([np.nan]))


def test_ids_say_what_is_measured() -> None:
    assert get_metric("map_at_20_by_k").definition.startswith("(1/20) sum_{i<=20} rel_i P@i")
    assert {get_metric(form.replace("{k}", "7")).id for form in metrics.FAMILIES} == {
        form.replace("{k}", "7") for form in metrics.FAMILIES
    }
    for wrong in ("map_at_10", "p_at_0", "p_at_05", "p_at_{k}", "map_at_r_at_3"):
        with pytest.raises(UsageError, match=f"unknown metric '{wrong}'".replace("{", r"\{")):
            get_metric(wrong)


def test_recall_at_a_precision_counts_what_no_list_holds() -> None:
    hits, scores = np.array([True, True, False, True]), np.array([0.9, 0.8, 0.7, 0.6])
    assert metrics.recall_at_precision(hits, scores, 0.95) == pytest.approx(2 / 3)
    assert metrics.recall_at_precision(hits, scores, 0.95, num_relevant=8) == 2 / 8
    assert metrics.recall_at_precision(hits, np.ones(4), 0.95) == 0  # equal scores pass together or not at all


def test_overlap_is_the_share_of_exact_rows_found() -> None:
    found = np.array([[5, 1, 9], [-1, -1, -1], [1, 2, 3]])
    exact = np.array([[1, 5, 7], [0, 1, 2], [-1, -1, -1]])
    assert metrics.per_query_overlap(found, exact).tolist() == [2 / 3, 0, 1]
    few = np.array([[9, 4, -1], [3, -1, -1], [1, 2, 3]])  # a small database has no more
    assert metrics.per_query_overlap(found, few).tolist() == [0.5, 0, 1]
