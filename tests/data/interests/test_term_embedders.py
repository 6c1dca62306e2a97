import numpy as np
import pytest

from lookalike.data.interests.term_embedders import embed_terms
from lookalike.errors import UsageError


@pytest.mark.parametrize(("name", "dim"), [("wordllama", 256), ("minilm", 384)])
def test_terms_of_like_meaning_are_near_and_company_changes_nothing(name: str, dim: int) -> None:
    terms = ["sofa", "couch", "banana", "international maritime signal flag"]
    vectors = embed_terms(name, terms)
    assert vectors.shape == (4, dim)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert embed_terms(name, ["banana"])[0] == pytest.approx(vectors[2], abs=1e-5)
    assert len(embed_terms(name, [])) == 0


def test_minilm_gives_the_cosines_of_the_published_model() -> None:
    """all-MiniLM-L6-v2 by sentence-transformers: dog and puppy 0.80, dog and truck 0.45, sofa and couch 0.86."""
    dog, puppy, truck, sofa, couch = embed_terms("minilm", ["dog", "puppy", "truck", "sofa", "couch"])
    assert [dog @ puppy, dog @ truck, sofa @ couch] == pytest.approx([0.80, 0.45, 0.86], abs=0.006)


def test_an_unknown_embedder_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'minilmm'.*did you mean 'minilm'.*wordllama"):
        embed_terms("minilmm", ["cat"])
