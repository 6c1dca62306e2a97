from typing import Any

import numpy as np
import pytest

from lookalike.data.interests.restriction import image_interests, interaction_evidence, restrict

VOTES = {
    "jaguar": np.array([0.5, 0.5], np.float32),
    "cat": np.array([0.9, 0.1], np.float32),
    "engine": np.array([0.1, 0.9], np.float32),
}


def test_interest_restriction_tells_the_senses_of_jaguar_apart() -> None:
    """Pinterest section 3.2.1: the other words of the picture say which sense is meant."""
    interest_of = {0: 0, 1: 1}
    own = image_interests([("jaguar", 0.9), ("engine", 0.9)], VOTES, 0.5)
    assert restrict([0, 1], interest_of, own) == [1]
    own = image_interests([("jaguar", 0.9)], VOTES, 0.5)
    assert restrict([0, 1], interest_of, own) == [0, 1]
    assert image_interests([("unknown", 1.0)], VOTES, 0.5).tolist() == []
    assert image_interests([("jaguar", 0.9), ("cat", 0.5)], VOTES, 0.5).tolist() == [0, 1]  # .90 and .50


def test_what_people_searched_for_decides_like_text_does() -> None:
    """Pinterest section 3.2.1: text metadata and user interactions."""
    signals: list[dict[str, Any]] = [{"term": "big cats", "weight": 40.0}, {"term": "v8 engine", "weight": 4.0}]
    used = interaction_evidence(signals, VOTES, 1.0)
    assert used == [("cat", 1.0), ("engine", pytest.approx(0.1))]
    assert image_interests([("jaguar", 0.9), *used], VOTES, 0.5).tolist() == [0]
    assert interaction_evidence(signals, VOTES, 0.0) == interaction_evidence(None, VOTES, 1.0) == []
    assert interaction_evidence([{"term": "cat", "weight": 0.0}], VOTES, 1.0) == []
