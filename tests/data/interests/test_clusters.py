import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data.interests.clusters import (
    CLUSTERS,
    TermClusterConfig,
    carry_over,
    cluster_terms,
    kmeans,
    match_sets,
    split_outliers,
)
from lookalike.data.interests.taxonomy import InterestClassifier, InterestConfig, choose_interests, read_taxonomy
from lookalike.data.interests.term_embedders import embed_terms
from lookalike.errors import UsageError


@pytest.fixture(scope="module")
def classifier() -> InterestClassifier:
    return InterestClassifier(read_taxonomy(None), "minilm")


def clustered(classifier: InterestClassifier, terms: list[str], config: TermClusterConfig) -> pa.Table:
    vectors = embed_terms("minilm", terms)
    chosen = choose_interests(classifier.probabilities(terms, vectors), config.interests)
    return cluster_terms(terms, vectors, chosen, interests=classifier.interests, config=config, seed=1)


def test_kmeans_finds_separate_groups() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(4, 16, dtype=np.float32)
    vectors = np.repeat(centres, 10, axis=0) + rng.normal(0, 0.05, (40, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels, similarity = kmeans(vectors, 4, 3)
    assert all(len(set(labels[i : i + 10].tolist())) == 1 for i in range(0, 40, 10))
    assert len(set(labels.tolist())) == 4
    assert similarity.min() > 0.9


def grouped(num: int, groups: int, noise: float) -> np.ndarray:
    rng = np.random.default_rng(num)
    vectors = np.repeat(rng.normal(size=(groups, 24)), num // groups, axis=0) + rng.normal(0, noise, (num, 24))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("num", "groups", "noise", "k"),
    [
        (60, 10, 0.1, 10),
        (200, 20, 0.05, 20),
        (200, 20, 0.3, 20),
        (40, 4, 1.0, 20),
        (226, 1, 5.0, 113),
        (1000, 50, 0.5, 50),
    ],
)
def test_inertia_is_within_a_hundredth_of_scikit_learns_best_of_ten(
    num: int, groups: int, noise: float, k: int
) -> None:
    from sklearn.cluster import KMeans

    vectors = grouped(num, groups, noise)
    labels, _ = kmeans(vectors, k, 3)
    means = [vectors[labels == label].mean(axis=0) for label in range(k)]
    spread = sum(((vectors[labels == label] - mean) ** 2).sum() for label, mean in enumerate(means))
    assert spread <= 1.01 * KMeans(k, n_init=10, random_state=0).fit(vectors).inertia_


def test_fewer_distinct_vectors_than_centres_are_a_cluster_each(recwarn: pytest.WarningsRecorder) -> None:
    vectors = np.repeat(np.eye(3, 8, dtype=np.float32)[[2, 0, 1]], 5, axis=0)
    labels, similarity = kmeans(vectors, 6, 1)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert similarity.tolist() == [1.0] * 15
    assert kmeans(vectors[:1], 3, 1)[0].tolist() == [0]
    assert not recwarn.list


def test_starts_are_the_same_each_time() -> None:
    vectors = grouped(60, 10, 0.3)
    first, again = kmeans(vectors, 12, 5), kmeans(vectors, 12, 5)
    assert [values.tolist() for values in first] == [values.tolist() for values in again]


def test_outliers_get_clusters_of_their_own() -> None:
    labels, similarity = split_outliers(np.array([0, 0, 1]), np.array([0.9, 0.5, 0.2], np.float32), 0.8)
    assert labels.tolist() == [0, 2, 3]
    assert similarity.tolist() == pytest.approx([0.9, 1.0, 1.0])


def test_synonyms_share_a_cluster_and_a_term_may_have_several(classifier: InterestClassifier) -> None:
    terms = sorted(["sofa", "couch", "violin", "cello", "jaguar", "cat", "sedan", "desk"])
    rows = clustered(classifier, terms, TermClusterConfig(interests=InterestConfig(score=0.4))).to_pylist()
    by_term = {term: {row["cluster"] for row in rows if row["term"] == term} for term in terms}
    assert all(by_term.values())
    assert by_term["sofa"] & by_term["couch"]
    assert {row["interest"] for row in rows if row["term"] == "jaguar"} == {"animals", "transport"}
    assert [row["cluster"] for row in rows] == sorted(row["cluster"] for row in rows)


def test_the_number_of_clusters_is_the_rules_or_the_recipes(classifier: InterestClassifier) -> None:
    terms = sorted(["bear", "lion", "wolf", "eagle", "shark", "snake"])
    for config, expected in (
        (TermClusterConfig(terms_per_cluster=3, min_similarity=0), 2),
        (TermClusterConfig(num_clusters={"animals": 4}, min_similarity=0), 4),
    ):
        found = clustered(classifier, terms, config)
        assert len({row["cluster"] for row in found.to_pylist() if row["interest"] == "animals"}) == expected
    with pytest.raises(UsageError, match=r"num_clusters has 'animal': 4.*did you mean 'animals'"):
        clustered(classifier, terms, TermClusterConfig(num_clusters={"animal": 4}))


def as_clusters(*members: tuple[int, str, str]) -> pa.Table:
    rows = [
        {"cluster": c, "interest": i, "term": t, "similarity": 1.0} for c, i, names in members for t in names.split()
    ]
    return pa.Table.from_pylist(rows, schema=CLUSTERS)


def ids(table: pa.Table) -> dict[str, int]:
    return {f"{row['interest']}/{row['term']}": row["cluster"] for row in table.to_pylist()}


def test_a_cluster_keeps_its_id_from_run_to_run_and_none_is_used_twice() -> None:
    before = as_clusters((0, "a", "cat kitten"), (1, "a", "dog puppy"), (2, "b", "cat"), (5, "b", "car"))
    now = as_clusters((0, "a", "bird"), (1, "a", "dog puppy hound"), (2, "a", "cat kitten"), (3, "b", "cat truck"))
    table, next_id, count = carry_over(now, before, 9, 0.3)
    found = ids(table)
    assert (found["a/dog"], found["a/cat"], found["a/kitten"], found["b/cat"]) == (1, 0, 0, 2)
    assert (found["a/bird"], next_id, count) == (9, 10, 3)
    assert table["cluster"].to_pylist() == sorted(table["cluster"].to_pylist())
    assert carry_over(before, before, 9, 0.3) == (before, 9, 4)
    table, next_id, count = carry_over(now, CLUSTERS.empty_table(), 0, 0.3)
    assert (ids(table), next_id, count) == (ids(now), 4, 0)


@settings(max_examples=40)
@given(
    st.lists(st.frozensets(st.sampled_from("abcdef"), min_size=1), max_size=4),
    st.lists(st.frozensets(st.sampled_from("abcdef"), min_size=1), max_size=4),
)
def test_matching_is_one_to_one_and_the_best(left: list[frozenset[str]], right: list[frozenset[str]]) -> None:
    from itertools import permutations

    found = match_sets(left, right, 1e-9)
    assert len(set(found.values())) == len(found)
    value = sum(len(left[i] & right[j]) / len(left[i] | right[j]) for i, j in found.items())
    short, long = sorted([left, right], key=len)
    best = max(
        (sum(len(a & b) / len(a | b) for a, b in zip(short, order, strict=False)) for order in permutations(long)),
        default=0.0,
    )
    assert value == pytest.approx(best)


def test_sets_match_by_the_jaccard_index() -> None:
    left, right = frozenset("abcd"), frozenset("cdef")  # two of six
    assert match_sets([left], [right], 0.33) == {0: 0}
    assert match_sets([left], [right], 0.34) == {}
