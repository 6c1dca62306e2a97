"""What a corpus will hold in the columns by which later steps choose rows and classes, told before it is made."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.data.sources.columns import GATHERED
from lookalike.data.sources.reader import UNREADABLE, Reader, Record, RecordSource
from lookalike.data.sources.texts import read_attributes, read_text
from lookalike.outlook import Outlook

MAX_SECONDS = 20.0  # a longer look would cost more than it saves
MAX_CHARS = 10_000
ROWS = 65_536
TEXTS = ("split", "view", "category", "group")
GROUPED = "category of a group"
"""Column of an outlook: categories, counted on rows with a group."""
ATTRIBUTE = "attribute"
"""Column of an outlook: names of attributes. The values of one are ``attribute.<name>``."""


def survey_sources(readers: Sequence[Reader]) -> Outlook:
    """The outlook of a corpus from its sources; without its values if reading them would take long."""
    counts = _Counts()
    deadline = time.monotonic() + MAX_SECONDS
    for reader in readers:
        reader.only = frozenset([*TEXTS, "attributes"])
        counts.add("dataset", reader.source.dataset, 0)
        for record in _records(reader):
            counts.add_record(record, reader.source)
            if time.monotonic() > deadline:
                return {}
    return counts.outlook()


def _records(reader: Reader) -> Iterator[Record]:
    for uri in reader.files():
        for unit in reader.units(uri, ROWS):
            yield from reader.records(unit)


def survey_corpus(corpus: Artifact) -> Outlook:
    """The outlook of a published corpus; of its data sets and splits alone if reading more would take long."""
    datasets: Mapping[str, Mapping[str, int]] = corpus.stats["datasets"]
    splits: Counter[str] = Counter()
    for of_dataset in datasets.values():
        splits.update(of_dataset)
    exact = {"dataset": {name: sum(rows.values()) for name, rows in datasets.items() if rows}, "split": splits}
    counts = _Counts()
    deadline = time.monotonic() + MAX_SECONDS
    for uri in corpus.files("part-", ".parquet"):
        filesystem, path = storage.arrow_filesystem(uri)
        table = pq.read_table(path, columns=[*TEXTS, "attributes"], filesystem=filesystem)
        counts.add_rows(table)
        if time.monotonic() > deadline:
            return exact
    return {**counts.outlook(), **exact}


class _Counts:
    """Column -> value -> rows."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in ("dataset", *TEXTS, GROUPED, ATTRIBUTE)}

    def add(self, column: str, value: str, rows: int = 1) -> None:
        self._counts.setdefault(column, Counter())[value] += rows

    def add_record(self, record: Record, source: RecordSource) -> None:
        """Count a raw record as the corpus row that it becomes if it is accepted."""
        if UNREADABLE in record:
            return
        row = {name: read_text(record.get(name), MAX_CHARS)[0] or source.constants.get(name) for name in TEXTS}
        gathered = {name.removeprefix(GATHERED): value for name, value in record.items() if name.startswith(GATHERED)}
        self.add("dataset", source.dataset)
        self._add_row(row, read_attributes(record.get("attributes"), MAX_CHARS, gathered)[0])
        if row["split"] is None:
            self.add("split", "train")
            if source.test_fraction:
                self.add("split", "test")

    def add_rows(self, rows: pa.Table) -> None:
        for row in rows.to_pylist():
            self._add_row(row, row["attributes"] or ())

    def _add_row(self, row: Mapping[str, Any], attributes: Iterable[Mapping[str, str]]) -> None:
        for name in TEXTS:
            if row[name]:
                self.add(name, row[name])
        if row["category"] and row["group"]:
            self.add(GROUPED, row["category"])
        for name, value in {(entry["name"], entry["value"]) for entry in attributes}:
            self.add(ATTRIBUTE, name)
            self.add(f"{ATTRIBUTE}.{name}", value)

    def outlook(self) -> Outlook:
        return self._counts
