import numpy as np
import pytest

from lookalike.data.interests.taxonomy import InterestClassifier, InterestConfig, choose_interests, read_taxonomy, votes
from lookalike.errors import UsageError


def test_the_packaged_taxonomy_has_24_interests_with_seeds() -> None:
    taxonomy = read_taxonomy(None)
    assert len(taxonomy) == 24
    assert all(len(seeds) >= 40 for seeds in taxonomy.values())


@pytest.mark.parametrize(("embedder", "least"), [("minilm", 0.7), ("wordllama", 0.45)])
def test_seed_terms_held_out_find_their_interest_far_above_chance(embedder: str, least: float) -> None:
    taxonomy = read_taxonomy(None)
    several = {term for seeds in taxonomy.values() for term in seeds}
    held_out = {term for i, term in enumerate(sorted(several)) if i % 5 == 4}
    used = {name: [term for term in seeds if term not in held_out] for name, seeds in taxonomy.items()}
    classifier = InterestClassifier(used, embedder)
    terms = sorted(held_out)
    best = classifier.probabilities(terms).argmax(axis=1)
    hits = sum(term in taxonomy[classifier.interests[i]] for i, term in zip(best, terms, strict=True))
    assert hits / len(terms) > least  # chance is 0.05


def test_a_seed_listed_twice_belongs_to_both() -> None:
    classifier = InterestClassifier(read_taxonomy(None), "minilm")
    [own] = choose_interests(classifier.probabilities(["mouse"]), InterestConfig())
    assert [classifier.interests[i] for i in sorted(own)] == ["animals", "computers and software"]


def test_interests_of_a_term_are_those_above_the_score_and_one_at_least() -> None:
    found = choose_interests(np.array([[0.9, 0.6, 0.7], [0.1, 0.2, 0.1]], np.float32), InterestConfig(most=2))
    assert found == [[0, 2], [1]]


def test_a_taxonomy_of_another_form_is_refused(tmp_path: object) -> None:
    path = f"{tmp_path}/t.yaml"
    with open(path, "w") as file:
        file.write("animals: [dog]\nmusic: ['!!']\n")
    with pytest.raises(UsageError, match="'music' has no usable seed term"):
        read_taxonomy(path)


def test_a_term_of_many_senses_has_one_vote_and_a_vague_one_less() -> None:
    found = votes(np.array([[1.0, 1.0], [0.2, 0.1], [0.0, 1.0]], np.float32))
    assert found.tolist() == pytest.approx(np.array([[0.5, 0.5], [0.2, 0.1], [0.0, 1.0]]))
