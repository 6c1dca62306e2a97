"""Attributes of records (colour, material) as classes: which values are frequent enough, and each row's class."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

COUNTS = pa.schema([("name", pa.string()), ("value", pa.string()), ("images", pa.int64())])
"""Images of a value of an attribute."""
Pairs = list[tuple[str, str]]
AttributeClasses = Mapping[str, Sequence[str]]
"""Attribute -> its values that are classes; both in order."""


def pairs_of(rows: pa.Table) -> list[Pairs]:
    """(name, value) of each corpus row, by name, then value; none where an older corpus has no such column."""
    if "attributes" not in rows.column_names:
        return [[] for _ in range(rows.num_rows)]
    return [
        sorted({(entry["name"], entry["value"]) for entry in entries or ()})
        for entries in rows["attributes"].to_pylist()
    ]


def count_values(rows: pa.Table) -> pa.Table:
    """``COUNTS`` of a part. Parts add up."""
    counts = Counter(pair for pairs in pairs_of(rows) for pair in pairs)
    keys = sorted(counts)
    return pa.table([[n for n, _ in keys], [v for _, v in keys], [counts[key] for key in keys]], schema=COUNTS)


def frequent_values(counts: pa.Table, min_images: int) -> pa.Table:
    """The rows of complete ``COUNTS`` that may be classes."""
    return counts.select(COUNTS.names).filter(pc.greater_equal(counts["images"], min_images))


def choose_classes(frequent: pa.Table) -> dict[str, list[str]]:
    """The classes of each attribute, values and names by the alphabet; one with a single class has nothing to tell."""
    classes: dict[str, list[str]] = {}
    for entry in frequent.sort_by([("name", "ascending"), ("value", "ascending")]).to_pylist():
        classes.setdefault(entry["name"], []).append(entry["value"])
    return {name: values for name, values in classes.items() if len(values) > 1}


def classes_of_rows(rows: pa.Table, classes: AttributeClasses) -> list[list[int]]:
    """Each row's class of every attribute of ``classes``, in their order; -1 where it states none that is a class.

    A row with several values of an attribute (a sofa in red and blue) takes the first that is a class.
    """
    known = {
        (name, value): (place, number)
        for place, (name, values) in enumerate(classes.items())
        for number, value in enumerate(values)
    }
    found = []
    for pairs in pairs_of(rows):
        row = [-1] * len(classes)
        for place, number in (known[pair] for pair in reversed(pairs) if pair in known):
            row[place] = number
        found.append(row)
    return found


def count_known(rows: pa.ChunkedArray) -> NDArray[np.int64]:
    """Images with a class of each attribute, [num_attributes], of the column ``attributes`` of shards."""
    lists = rows.combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    return np.asarray((flat.reshape(len(lists), -1) >= 0).sum(axis=0), np.int64) if len(flat) else np.zeros(0, np.int64)
