from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from lookalike.data.dictionary.concreteness import (
    batch_samples,
    initial_parameters,
    layers_of,
    score_bucket,
    score_terms,
    stack_samples,
)
from lookalike.data.dictionary.scores import DictionaryConfig, ProbeConfig
from lookalike.data.dictionary.sketch import POOL, SKETCH, Pools, Sample, assign_folds
from tests.data.dictionary.test_sketch import CONFIG, whole


def make_sample(sides: NDArray[Any]) -> Sample:
    return Sample(*sides.astype(np.float16), assign_folds(np.arange(2 * sides.shape[1], dtype=np.uint64), 3))


def make_samples(sizes: list[int], dim: int, shift: float, seed: int = 0) -> list[Sample]:
    """Gaussian clouds; the positives' is shifted along one direction of each term's own."""
    rng = np.random.default_rng(seed)
    samples = []
    for size in sizes:
        direction = rng.normal(size=dim)
        sides = rng.normal(size=(2, size, dim)) + 3
        sides[0] += shift * direction / np.linalg.norm(direction)
        samples.append(make_sample(sides))
    return samples


def accuracy(samples: list[Sample], config: ProbeConfig) -> NDArray[Any]:
    return np.asarray(score_terms(samples, config, 1) / [2 * len(s.positives) for s in samples])


def test_a_visible_term_scores_high_and_a_random_one_near_chance() -> None:
    """Concreteness is held-out accuracy: what follows the picture is learned, a coin toss is not."""
    assert accuracy(make_samples([60] * 4, 12, 4.0), ProbeConfig()).min() > 0.85
    tosses = accuracy(make_samples([60] * 40, 12, 0.0), ProbeConfig())
    assert abs(tosses.mean() - 0.5) < 0.03


def test_a_term_of_two_senses_needs_the_hidden_layer() -> None:
    """Positives left and right of the negatives: no line tells them apart."""
    rng = np.random.default_rng(3)
    sides = rng.normal(size=(2, 90, 8))
    sides[0, :, 0] += np.where(np.arange(90) % 2, 3.5, -3.5)
    assert accuracy([make_sample(sides)], ProbeConfig(steps=60))[0] > 0.8


def test_the_style_of_one_creator_is_not_what_a_word_looks_like() -> None:
    """All positives share a creator's style and nothing else: told apart by unit, at chance once it is held out."""
    (sample,) = make_samples([60], 12, 4.0)
    assert accuracy([sample], ProbeConfig())[0] > 0.85
    for creators, low, high in ((1, 0.45, 0.55), (9, 0.85, 1.0)):
        origins = np.where(np.arange(120) < 60, np.arange(120) % creators, np.arange(120)).astype(np.uint64)
        (share,) = accuracy([sample._replace(folds=assign_folds(origins, 3))], ProbeConfig())
        assert low <= share <= high


@pytest.mark.parametrize("dim", [7, 64])
def test_a_terms_score_does_not_depend_on_the_terms_beside_it(dim: int) -> None:
    """Bit for bit: alone, among others, in any order, in whatever batches."""
    samples = make_samples([6, 17, 40, 40, 41, 40, 9, 16, 80], dim, 1.0)
    config = ProbeConfig(hidden=5)
    together = score_terms(samples, config, 1)
    assert together.tolist() == [score_terms([sample], config, 1)[0] for sample in samples]
    assert together[::-1].tolist() == score_terms(samples[::-1], config, 1).tolist()
    assert len({*together.tolist()}) > 3


@pytest.mark.parametrize(("size", "dim", "folds", "hidden"), [(40, 24, 3, 16), (48, 128, 3, 16), (11, 7, 5, 3)])
def test_the_models_themselves_are_equal_bit_for_bit_in_any_batch(
    size: int, dim: int, folds: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stronger than equal hits: the held-out logits do not differ in a single bit."""
    seen: list[torch.Tensor] = []
    original = torch.baddbmm

    def record(*arguments: Any) -> torch.Tensor:
        result = original(*arguments)
        seen.append(result)
        return result

    samples = [
        sample._replace(folds=assign_folds(np.arange(2 * size, dtype=np.uint64), folds))
        for sample in make_samples([size] * 13, dim, 0.7)
    ]
    monkeypatch.setattr(torch, "baddbmm", record)
    logits: list[torch.Tensor] = []
    for group in [samples, samples[4:5], samples[3:7], samples[4:]]:
        score_terms(group, ProbeConfig(folds=folds, hidden=hidden), 1)
        logits.append(seen[-1])
    assert torch.equal(logits[0][4], logits[1][0])
    assert torch.equal(logits[0][4], logits[2][1])
    assert torch.equal(logits[0][4], logits[3][0])


def test_batches_hold_every_sample_once_within_the_bound() -> None:
    samples = make_samples([6, 17, 40, 40, 41, 40, 9, 16], 10, 1.0)
    assert list(batch_samples(samples, 2 * 96 * 10)) == [[0, 6, 7], [1], [2, 3], [4, 5]]
    assert list(batch_samples(samples, 1)) == [[0], [6], [7], [1], [2], [3], [4], [5]]


def test_written_out_gradients_against_autograd() -> None:
    """The same training by autograd and torch's plain optimizer, fold by fold on the training rows alone."""
    samples, config = make_samples([20, 16], 6, 1.5, seed=5), ProbeConfig(hidden=4, steps=5)
    for sample in samples:
        x, target, fold = (tensor[0] for tensor in stack_samples([sample], "cpu"))
        hits = 0
        for number in range(config.folds):
            first, bias, second, last = layers_of(initial_parameters(6, config, 1)[None], 6, config)
            own = slice(4 * number, 4 * number + 4)
            model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
            with torch.no_grad():
                for parameter, start in zip(
                    model.parameters(),
                    (first[0][own], bias[0, 0, own], second[0][own, number][None], last[0, 0, :1]),
                    strict=True,
                ):
                    parameter.copy_(start)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
            train = (fold >= 0) & (fold != number)
            for _ in range(config.steps):
                optimizer.zero_grad()
                sides = torch.where(target[train] > 0, target[train].sum(), (1 - target[train]).sum())
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    model(x[train])[:, 0], target[train], 0.5 / sides, reduction="sum"
                )
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            held = fold == number
            hits += int(((model(x[held])[:, 0] > 0) == (target[held] > 0.5)).sum())
        assert score_terms([sample], config, 1)[0] == hits


def test_features_are_scaled_by_the_terms_own_samples() -> None:
    (sample,) = make_samples([20], 6, 1.0)
    x, target, fold = (tensor[0].numpy() for tensor in stack_samples([sample], "cpu"))
    both = np.concatenate(sample[:2]).astype(np.float64)
    assert x.shape == (64, 6)
    assert np.allclose(x[:40], (both - both.mean(axis=0)) / both.std(axis=0), atol=1e-3)
    assert not x[40:].any()
    assert target[:40].tolist() == [1.0] * 20 + [0.0] * 20
    assert fold[:40].tolist() == sample.folds.tolist()
    assert (fold[40:] == -1).all()


def test_accuracy_against_scikit_learn_on_the_same_folds() -> None:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    samples = [sample for shift in (0, 2, 3, 5) for sample in make_samples([48] * 6, 32, shift, seed=shift)]
    ours = accuracy(samples, ProbeConfig())
    theirs = []
    for sample in samples:
        x, target, fold = (tensor[0].numpy() for tensor in stack_samples([sample], "cpu"))
        hits = 0
        for number in range(3):
            model = MLPClassifier((16,), max_iter=60, random_state=0, learning_rate_init=0.005)
            with pytest.warns(ConvergenceWarning):
                model.fit(x[fold != number], target[fold != number])
            hits += int((model.predict(x[fold == number]) == target[fold == number]).sum())
        theirs.append(hits / len(x))
    assert abs(ours.mean() - np.mean(theirs)) < 0.02
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9


def bucket_and_pools() -> tuple[pa.Table, Pools]:
    import pyarrow.compute as pc

    sketch = whole()
    pool = pc.starts_with(sketch["key"], POOL)
    return sketch.filter(pc.invert(pool)), Pools(sketch.filter(pool))


def test_unchanged_terms_keep_their_score_and_only_changed_ones_train(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DictionaryConfig.model_validate(CONFIG.model_dump())
    bucket, pools = bucket_and_pools()
    nothing = pa.table(
        {"term": pa.array([], pa.string()), "digest": pa.array([], pa.string()), "hits": pa.array([], pa.int32())}
    )
    fresh = score_bucket(bucket, pools, nothing, config, seed=7)
    assert fresh["reused"].to_pylist() == [False] * 3
    trained: list[int] = []

    def count(samples: list[Sample], *arguments: Any) -> NDArray[np.int64]:
        trained.append(len(samples))
        return score_terms(samples, *arguments)

    monkeypatch.setattr("lookalike.data.dictionary.concreteness.score_terms", count)
    earlier = fresh.select(["term", "digest", "hits"])
    again = score_bucket(bucket, pools, earlier, config, seed=7)
    assert again["reused"].to_pylist() == [True] * 3
    assert again.drop_columns(["reused"]).equals(fresh.drop_columns(["reused"]))
    rows = bucket.to_pylist()
    changed = next(row for row in rows if row["key"] == "red")
    changed["vector"] = [5.0, 5.0]
    mixed = score_bucket(pa.Table.from_pylist(rows, schema=bucket.schema), pools, earlier, config, seed=7)
    assert dict(zip(mixed["term"].to_pylist(), mixed["reused"].to_pylist(), strict=True)) == {
        "odd": True,
        "red": False,
        "round": True,
    }
    other = score_bucket(bucket, pools, earlier, config.model_copy(update={"probe": ProbeConfig(steps=3)}), seed=7)
    assert not any(other["reused"].to_pylist())
    assert trained == [0, 1, 3]


def test_terms_of_too_few_units_are_listed_without_a_score() -> None:
    bucket, pools = bucket_and_pools()
    few = bucket.filter(pa.compute.equal(bucket["key"], "red")).slice(0, 3)
    nothing = pa.table(
        {"term": pa.array([], pa.string()), "digest": pa.array([], pa.string()), "hits": pa.array([], pa.int32())}
    )
    (row,) = score_bucket(few, pools, nothing, CONFIG, seed=7).to_pylist()
    assert row == {"term": "red", "positives": 3, "trials": 0, "hits": 0, "digest": None, "reused": False}
    assert score_bucket(few.slice(0, 0), pools, nothing, CONFIG, seed=7).num_rows == 0
    assert SKETCH.names == few.column_names[:-1]
