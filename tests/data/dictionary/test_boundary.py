from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from lookalike.config import parse_config
from lookalike.data.dictionary.boundary import (
    CANDIDATES,
    BoundaryConfig,
    choose_by_retrieval,
    choose_by_words,
    ranking_auc,
    read_words,
)
from lookalike.data.dictionary.sketch import POOL, Pools
from lookalike.errors import UsageError
from tests.data.dictionary.test_sketch import whole


def table(scores: dict[str, float | None]) -> pa.Table:
    return pa.table({"term": list(scores), "concreteness": pa.array(scores.values(), pa.float32())})


@given(st.lists(st.tuples(st.sampled_from([0.5, 0.6, 0.7, 0.9]), st.booleans()), min_size=2, max_size=30))
def test_ranking_auc_against_scikit_learn(rows: list[tuple[float, bool]]) -> None:
    names = [f"t{n}" for n in range(len(rows))]
    dictionary = table({**{n: s for n, (s, _) in zip(names, rows, strict=True)}, "unscored": None})
    sides = [[n for n, (_, c) in zip(names, rows, strict=True) if c is wanted] for wanted in (True, False)]
    found = ranking_auc(dictionary, [*sides[0], "unscored", "unknown"], sides[1])
    if sides[0] and sides[1]:
        assert found == pytest.approx(roc_auc_score([c for _, c in rows], [s for s, _ in rows]))
    else:
        assert np.isnan(found)


def test_the_word_list_sets_the_boundary_of_best_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    concrete = {f"c{n}": float(rng.normal(0.8, 0.07)) for n in range(40)}
    abstract = {f"a{n}": float(rng.normal(0.6, 0.07)) for n in range(60)}
    words = {**dict.fromkeys(concrete, True), **dict.fromkeys(abstract, False)}
    dictionary = table({**concrete, **abstract, "other": 0.99})
    choice = choose_by_words(dictionary, words)
    scores = np.array([{**concrete, **abstract}[word] for word in words])
    oracle = [balanced_accuracy_score(list(words.values()), scores >= at) for at in CANDIDATES]
    assert [row["value"] for row in choice.curve] == pytest.approx(oracle, abs=1e-5)
    assert choice.boundary == CANDIDATES[int(np.argmax(oracle))]
    assert [row["terms"] for row in choice.curve] == [int((scores >= at).sum()) + 1 for at in CANDIDATES]
    assert not set(choice.facts) & {"kept", "abstract", "too_few", "terms", "boundary"}  # they stand beside these
    assert choice.facts["auc"] == pytest.approx(roc_auc_score(list(words.values()), scores), abs=1e-4)
    with pytest.raises(UsageError, match="4 concrete and 0 abstract words are scored"):
        choose_by_words(table({f"c{n}": 0.8 for n in range(4)}), words)


def test_word_lists_as_yaml_and_csv(tmp_path: Path) -> None:
    yaml, table, bad, flat = (tmp_path / name for name in ("w.yaml", "w.csv", "bad.csv", "flat.yaml"))
    yaml.write_text("concrete: [Cats, tree]\nabstract: [hope]\n")
    table.write_text("term,concrete\nCats,1\ntree,1\nhope,0\n")
    assert read_words(str(yaml)) == read_words(str(table)) == {"cat": True, "tree": True, "hope": False}
    bad.write_text("term,concrete\ncat,yes\n")
    flat.write_text("concrete: [cat]\nabstract: []\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_words(str(bad))
    with pytest.raises(UsageError, match="1 usable words of one kind"):
        read_words(str(flat))
    with pytest.raises(UsageError, match=r"needs boundary_from\.words"):
        parse_config(BoundaryConfig, {"criterion": "words"}, "labels")


def test_the_packaged_kind_of_list_is_read() -> None:
    words = read_words(str(Path(__file__).parents[1] / "concreteness_words.yaml"))
    assert sum(words.values()) >= 95
    assert len(words) - sum(words.values()) >= 95


def make_pools(rng: np.random.Generator) -> tuple[Pools, np.ndarray, list[str]]:
    """Features of 12 dims: the first 4 show what is in the picture, the others only what abstract words follow."""
    centres = rng.normal(size=(10, 4)) * 2

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        kind = rng.integers(0, 10, count)
        return np.hstack([centres[kind] + rng.normal(size=(count, 4)) * 0.4, rng.normal(size=(count, 8)) * 3]), kind

    x, kind = draw(600)
    rows = []
    for n in range(600):
        terms = [f"kind {kind[n]}"] + [f"noise {d}" for d in range(4, 12) if x[n, d] > 0]
        rows.append(
            {
                "key": POOL + "d",
                "unit_hash": n,
                "image_hash": n,
                "image_id": str(n),
                "dataset": "d",
                "origin": n,
                "terms": sorted(terms),
                "vector": x[n].astype(np.float16),
            }
        )
    schema = whole().schema
    schema = schema.set(schema.get_field_index("vector"), pa.field("vector", pa.list_(pa.float16(), 12)))
    valid, labels = draw(200)
    return Pools(pa.Table.from_pylist(rows, schema=schema)), valid, [str(k) for k in labels]


def test_retrieval_drops_the_terms_that_lead_away_from_what_is_seen() -> None:
    rng = np.random.default_rng(1)
    pools, valid, labels = make_pools(rng)
    scores = {**{f"kind {n}": 0.9 for n in range(10)}, **{f"noise {d}": 0.62 for d in range(4, 12)}}
    choice = choose_by_retrieval(table(scores), pools, valid, labels, 0.1)  # type: ignore[arg-type]
    assert choice.boundary == 0.65  # the smallest that removes all noise
    assert [row["terms"] for row in choice.curve] == [18, 18, 18, *[10] * 6, 0]
    values = [row["value"] for row in choice.curve]
    assert values[3] > values[0] + 0.1
    assert choice.facts["standard_error"] == pytest.approx((values[3] * (1 - values[3]) / 200) ** 0.5, abs=1e-4)
    harmless = dict.fromkeys(scores, 0.9)
    assert choose_by_retrieval(table(harmless), pools, valid, labels, 0.1).boundary == 0.5  # type: ignore[arg-type]


def test_the_curve_against_ridge_regressions_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    pools, valid, labels = make_pools(rng)
    scores = {**{f"kind {n}": 0.5 + n / 25 for n in range(10)}, **{f"noise {d}": 0.5 + d / 30 for d in range(4, 12)}}
    choice = choose_by_retrieval(table(scores), pools, valid, labels, 0.1)  # type: ignore[arg-type]
    x = pools.vectors.astype(np.float64)
    x = x - x.mean(axis=0)
    terms = [term for term in pools.terms.to_pylist() if scores[term] >= np.float32(0.65)]
    y = np.array(
        [[row in pools.rows_of(pools.terms.to_pylist().index(term)) for term in terms] for row in range(len(x))], float
    )
    y = (y - y.mean(axis=0)) / y.std(axis=0)
    ridge = Ridge(0.1 * (x**2).mean() * len(x), fit_intercept=False).fit(x, y)
    out = (valid - pools.vectors.astype(np.float64).mean(axis=0)) @ ridge.coef_.T
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    similar = out @ out.T
    np.fill_diagonal(similar, -np.inf)
    expected = np.mean([labels[i] == labels[j] for i, j in enumerate(similar.argmax(axis=1))])
    assert choice.curve[3]["boundary"] == 0.65
    assert choice.curve[3]["value"] == pytest.approx(expected, abs=0.011)


def test_a_validation_split_without_pairs_is_refused() -> None:
    pools, valid, _ = make_pools(np.random.default_rng(0))
    with pytest.raises(UsageError, match="0 images that share a group or category"):
        choose_by_retrieval(table({"kind 1": 0.9}), pools, valid[:3], ["a", "b", "c"], 0.1)
