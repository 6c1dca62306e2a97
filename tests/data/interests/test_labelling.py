import pyarrow as pa

from lookalike.data.interests.clusters import CLUSTERS
from lookalike.data.interests.labelling import (
    ASSIGNED,
    LABEL_COUNTS,
    LabelTables,
    assign_part,
    choose_classes,
    count_labels,
    describe_classes,
    number_part,
    terms_of_images,
)
from lookalike.data.interests.polysemy import SENSES, count_senses, describe_senses, separated
from lookalike.data.interests.restriction import RestrictionConfig
from lookalike.data.parts import add_up
from tests.data.interests.test_restriction import VOTES


def tables(share: float = 0.5) -> LabelTables:
    clusters = {"jaguar": [0, 1], "cat": [0]}
    return LabelTables(
        VOTES,
        clusters,
        {**clusters, "engine": [2]},
        {0: 0, 1: 1, 2: 1},
        {"jaguar": [0, 1]},
        ["animals", "transport"],
        RestrictionConfig(share=share),
    )


ROWS = pa.table({"image_id": ["a", "b", "c"], "interactions": [None, None, [{"term": "engines", "weight": 2.0}]]})
NAMED = pa.table(
    {
        "image_id": ["a", "a", "b", "b", "x", "c"],
        "term": ["jaguar", "engine", "jaguar", "cat", "cat", "jaguar"],
        "score": pa.array([0.9, 0.9, 0.9, 0.8, 0.9, 0.9], pa.float32()),
    }
)


def test_assignment_counts_the_variants_and_numbers_the_columns() -> None:
    assigned, counts = assign_part(NAMED, ROWS, tables())
    assert assigned["clusters"].to_pylist() == [[1], [0], [1]]
    assert assigned["interests"].to_pylist() == [["transport"], ["animals"], ["transport"]]
    found = {(row["variant"], row["cluster"]): row["images"] for row in counts.to_pylist()}
    assert found[("annotation clustering", 2)] == 1
    assert found[("+ visual dictionary", 0)] == 3
    assert found[("+ interest restriction", 0)] == 1
    columns = choose_classes(counts, 1)
    numbered = number_part(assigned, columns)
    assert numbered["labels"].to_pylist() == [[1], [0], [1]]
    assert {(row["kind"], row["name"]): row["count"] for row in count_labels(numbered).to_pylist()} == {
        ("images", "all"): 3,
        ("images", "labelled"): 3,
        ("label", "0"): 1,
        ("label", "1"): 2,
        ("interest", "animals"): 1,
        ("interest", "transport"): 2,
    }
    assert choose_classes(LABEL_COUNTS.empty_table(), 1) == {}


def test_of_several_scores_for_a_term_the_highest_counts() -> None:
    named = pa.table(
        {"image_id": ["a", "a", "x"], "term": ["cat", "cat", "cat"], "score": pa.array([0.25, 0.75, 1.0], pa.float32())}
    )
    assert terms_of_images(named, ["b", "a"]) == [{}, {"cat": 0.75}]


def test_without_restriction_every_sense_stays() -> None:
    assigned, _ = assign_part(NAMED, ROWS, tables(share=0))
    assert assigned["clusters"].to_pylist() == [[0, 1], [0, 1], [0, 1]]


def test_senses_are_counted_alone_beside_and_removed_and_parts_add_up() -> None:
    both = pa.table({"image_id": ["d"], "term": ["jaguar"], "score": pa.array([1.0], pa.float32())})
    parts = [
        assign_part(NAMED, ROWS, tables())[0],
        assign_part(both, pa.table({"image_id": ["d"]}), tables())[0],
        ASSIGNED.empty_table(),
    ]
    counts = add_up([count_senses(part) for part in parts], ["term", "interest"], SENSES)
    assert counts.equals(
        count_senses(pa.concat_tables(parts)).sort_by([("term", "ascending"), ("interest", "ascending")])
    )
    senses = describe_senses(counts)
    assert senses.to_pylist() == [
        {"term": "jaguar", "interest": "transport", "alone": 2, "beside": 1, "removed": 1},
        {"term": "jaguar", "interest": "animals", "alone": 1, "beside": 1, "removed": 2},
    ]
    assert separated(senses, 1) == {"jaguar": ["transport", "animals"]}
    assert separated(senses, 2) == {}


def test_a_class_says_which_column_of_the_previous_classifier_it_continues() -> None:
    clusters = pa.Table.from_pylist(
        [
            {"cluster": c, "interest": "a", "term": t, "similarity": 1.0}
            for c, t in ((3, "cat"), (3, "kitten"), (8, "dog"))
        ],
        schema=CLUSTERS,
    )
    entries = describe_classes(clusters, {3: 0, 8: 1}, [5, 6], {3: 41})
    assert [(e["label"], e["cluster"], e["previous_label"], e["terms"]) for e in entries] == [
        (0, 3, 41, ["cat", "kitten"]),
        (1, 8, None, ["dog"]),
    ]
