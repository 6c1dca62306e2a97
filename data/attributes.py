"""Attributes of records (colour, material) as classes: which values are frequent enough, and the class of each row."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

COUNTS = pa.schema([("name", pa.string()), ("value", pa.string()), ("images", pa.int64())])
"""Number of images with a value of an attribute."""
Pairs = list[tuple[str, str]]
AttributeClasses = Mapping[str, list[str]]
"""Attribute -> those of its values that are classes; both in order."""


def pairs_of(rows: pa.Table) -> list[Pairs]:
    """Sorted (name, value) pairs of each corpus row; none if an older corpus lacks the column."""
    if "attributes" not in rows.column_names:
        return [[] for _ in range(rows.num_rows)]
    return [
        sorted({(entry["name"], entry["value"]) for entry in entries or ()})
        for entries in rows["attributes"].to_pylist()
    ]


def count_values(rows: pa.Table) -> pa.Table:
    """``COUNTS`` of a part; parts add up."""
    counts = Counter(pair for pairs in pairs_of(rows) for pair in pairs)
    keys = sorted(counts)
    return pa.table([[n for n, _ in keys], [v for _, v in keys], [counts[key] for key in keys]], schema=COUNTS)


def frequent_values(counts: pa.Table, min_images: int) -> pa.Table:
    """The rows of complete ``COUNTS`` with at least ``min_images`` images."""
    return counts.select(COUNTS.names).filter(pc.greater_equal(counts["images"], min_images))


def choose_classes(frequent: pa.Table) -> dict[str, list[str]]:
    """The classes of each attribute, in alphabetical order; an attribute with a single class is left out."""
    classes: dict[str, list[str]] = {}
    for entry in frequent.sort_by([("name", "ascending"), ("value", "ascending")]).to_pylist():
        classes.setdefault(entry["name"], []).append(entry["value"])
    return {name: values for name, values in classes.items() if len(values) > 1}


def classes_of_rows(rows: pa.Table, classes: AttributeClasses) -> list[list[int]]:
    """The class of each row for every attribute of ``classes``, in order; -1 if the row states none of its classes.

    If a row has several values of an attribute (a sofa in red and blue), the first that is a class counts.
    """
    class_of = {
        (name, value): (place, number)
        for place, (name, values) in enumerate(classes.items())
        for number, value in enumerate(values)
    }
    columns = []
    for pairs in pairs_of(rows):
        row = [-1] * len(classes)
        for place, number in (class_of[pair] for pair in reversed(pairs) if pair in class_of):
            row[place] = number
        columns.append(row)
    return columns


def count_known(rows: pa.ChunkedArray) -> NDArray[np.int64]:
    """Images with a class, per attribute [num_attributes], in the column ``attributes`` of shards."""
    lists = rows.combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    return np.asarray((flat.reshape(len(lists), -1) >= 0).sum(axis=0), np.int64) if len(flat) else np.zeros(0, np.int64)
