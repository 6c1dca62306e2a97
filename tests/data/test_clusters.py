import numpy as np
import pyarrow as pa
import pytest

from lookalike.data.assignment import (
    LABEL_COUNTS,
    Tables,
    assign_part,
    choose_classes,
    count_labels,
    number_part,
)  # fmt: skip
from lookalike.data.clusters import (
    ClusterConfig,
    InterestClassifier,
    choose_interests,
    cluster_terms,
    embed_terms,
    read_taxonomy,
    spherical_kmeans,
    split_outliers,
)  # fmt: skip
from lookalike.data.interests import image_interests, restrict
from lookalike.errors import UsageError


@pytest.fixture(scope="module")
def classifier() -> InterestClassifier:
    return InterestClassifier(read_taxonomy(None), "wordllama")


def test_the_packaged_taxonomy_has_24_interests_with_seeds() -> None:
    taxonomy = read_taxonomy(None)
    assert len(taxonomy) == 24
    assert all(len(seeds) >= 10 for seeds in taxonomy.values())


def test_seed_terms_held_out_find_their_interest_far_above_chance() -> None:
    taxonomy = read_taxonomy(None)
    held_out = {name: [term for i, term in enumerate(seeds) if i % 5 == 4] for name, seeds in taxonomy.items()}
    used = {name: [term for i, term in enumerate(seeds) if i % 5 != 4] for name, seeds in taxonomy.items()}
    classifier = InterestClassifier(used, "wordllama")
    pairs = [(term, name) for name, terms in held_out.items() for term in terms]
    best = classifier.probabilities([term for term, _ in pairs]).argmax(axis=1)
    hits = sum(classifier.interests[i] == name for i, (_, name) in zip(best, pairs, strict=True))
    assert hits / len(pairs) > 0.45  # chance is 0.04


def test_interests_of_a_term_are_those_above_the_score_and_one_at_least() -> None:
    found = choose_interests(np.array([[0.9, 0.6, 0.7], [0.1, 0.2, 0.1]], np.float32), ClusterConfig(max_interests=2))
    assert found == [[0, 2], [1]]


def test_a_taxonomy_of_another_form_is_refused(tmp_path: object) -> None:
    path = f"{tmp_path}/t.yaml"
    with open(path, "w") as file:
        file.write("animals: [dog]\nmusic: ['!!']\n")
    with pytest.raises(UsageError, match="'music' has no usable seed term"):
        read_taxonomy(path)


def test_kmeans_finds_separate_groups() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(4, 16, dtype=np.float32)
    vectors = np.repeat(centres, 10, axis=0) + rng.normal(0, 0.05, (40, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels, similarity = spherical_kmeans(vectors, 4, 3)
    assert all(len(set(labels[i : i + 10].tolist())) == 1 for i in range(0, 40, 10))
    assert len(set(labels.tolist())) == 4
    assert similarity.min() > 0.9


def test_outliers_get_clusters_of_their_own() -> None:
    labels, similarity = split_outliers(np.array([0, 0, 1]), np.array([0.9, 0.5, 0.2], np.float32), 0.8)
    assert labels.tolist() == [0, 2, 3]
    assert similarity.tolist() == pytest.approx([0.9, 1.0, 1.0])


def test_synonyms_share_a_cluster_and_a_term_may_have_several(classifier: InterestClassifier) -> None:
    terms = sorted(["sofa", "couch", "violin", "cello", "jaguar", "cat", "sedan", "desk"])
    rows = cluster_terms(terms, classifier, ClusterConfig(interest_score=0.2), 1).to_pylist()
    by_term = {term: {row["cluster"] for row in rows if row["term"] == term} for term in terms}
    assert all(by_term.values())
    assert by_term["sofa"] & by_term["couch"]
    assert max(len(clusters) for clusters in by_term.values()) > 1
    assert [row["cluster"] for row in rows] == sorted(row["cluster"] for row in rows)
    assert embed_terms(["sofa"]).shape == (1, 256)


def tables() -> Tables:
    animal, vehicle = np.array([0.9, 0.1], np.float32), np.array([0.1, 0.9], np.float32)
    both = np.array([0.5, 0.5], np.float32)
    clusters = {"jaguar": [0, 1], "cat": [0]}
    return Tables({"jaguar": both, "cat": animal, "engine": vehicle}, clusters, {**clusters, "engine": [2]},
                  {0: 0, 1: 1, 2: 1}, ["animals", "transport"], 0.5)  # fmt: skip


def test_interest_restriction_tells_the_senses_of_jaguar_apart() -> None:
    """Pinterest section 3.2.1: the other words of the picture say which sense is meant."""
    known = tables()
    own = image_interests({"jaguar": 0.9, "engine": 0.9}, known.probabilities, 0.5)
    assert restrict([0, 1], known.interest_of, own) == [1]
    own = image_interests({"jaguar": 0.9}, known.probabilities, 0.5)
    assert restrict([0, 1], known.interest_of, own) == [0, 1]
    assert image_interests({"unknown": 1.0}, known.probabilities, 0.5).tolist() == []


def test_assignment_counts_the_variants_and_numbers_the_columns() -> None:
    named = pa.table({"image_id": ["a", "a", "b", "b", "x"], "term": ["jaguar", "engine", "jaguar", "cat", "cat"],
                      "score": pa.array([0.9, 0.9, 0.9, 0.8, 0.9], pa.float32())})  # fmt: skip
    assigned, counts = assign_part(named, ["a", "b", "c"], tables())
    assert assigned["clusters"].to_pylist() == [[1], [0], []]
    assert assigned["interests"].to_pylist() == [["transport"], ["animals"], []]
    found = {(row["variant"], row["cluster"]): row["images"] for row in counts.to_pylist()}
    assert found[("annotation clustering", 2)] == 1
    assert found[("+ visual dictionary", 0)] == 2
    assert found[("+ interest restriction", 0)] == 1
    columns = choose_classes(counts, 1)
    numbered = number_part(assigned, columns)
    assert numbered["labels"].to_pylist() == [[1], [0], []]
    assert count_labels(numbered, 2).tolist() == [1, 1, 3, 2, 2]
    assert choose_classes(LABEL_COUNTS.empty_table(), 1) == {}
