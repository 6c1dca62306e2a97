"""What the steps of the ``labels`` stage share: settings, opened inputs, the draft, and markers of finished steps.

A step reads files and writes files. It returns a few counts, which go into its marker. A step with a marker does not
run again, and inside a step parts that are already written are skipped: a killed driver or worker costs only the parts
that were in flight.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVarTuple

import pyarrow as pa
from pydantic import Field

from lookalike import storage
from lookalike.config import runtime
from lookalike.data.dictionary.scores import DictionaryConfig
from lookalike.data.duplicates.twins import DedupConfig
from lookalike.data.interests.clusters import TermClusterConfig
from lookalike.data.interests.restriction import RestrictionConfig
from lookalike.data.parts import Item, map_parts, part_items, part_name, read_table
from lookalike.data.report.page import ReportConfig
from lookalike.data.text.settings import AnnotationConfig
from lookalike.stages import StageConfig, StageRun
from lookalike.telemetry import get_logger, timed

log = get_logger(__name__)
Inputs = TypeVarTuple("Inputs")
Counts = dict[str, Any]


class LabelsConfig(StageConfig):
    """Settings of all steps."""

    words: bool = True
    """Whether the terms of the records' texts become labels. Without them near-duplicates are found all the same, and
    no image has a label: for pictures without words."""
    annotations: AnnotationConfig = AnnotationConfig()
    dedup: DedupConfig = DedupConfig()
    dictionary: DictionaryConfig = DictionaryConfig()
    clusters: TermClusterConfig = TermClusterConfig()
    restriction: RestrictionConfig = RestrictionConfig()
    feature_dim: int = Field(128, ge=8, le=4096)
    """Size to which the frozen embeddings are projected for the dictionary and the duplicate search."""
    min_images_per_label: int = Field(8, ge=1)
    """Training images a cluster needs to become a class."""
    report: ReportConfig = ReportConfig()
    concurrency: int | None = runtime(None, ge=1)
    """Tasks at a time; None: one per CPU."""


class LabelJob:
    """One run of the stage: its settings, inputs and draft."""

    def __init__(self, run: StageRun[LabelsConfig]) -> None:
        self.config, self.out = run.config, run.out
        self.corpus, self.embeddings = run.one("corpus"), run.one("embeddings")
        self.previous = next(
            (old for old in run.many("previous") if storage.exists(old.path("dictionary.parquet"))), None
        )
        """Labels of an earlier run with words. Clusters that continue keep their ids, unchanged terms their scores."""
        self.parts = part_items(self.corpus.files("part-", ".parquet"))

    def once(self, name: str, step: Callable[["LabelJob", *Inputs], Counts], *inputs: *Inputs) -> Counts:
        """Return the counts of ``step(job, *inputs)``, from its marker when an earlier attempt finished it."""
        marker = self.out.work(f"{name}.json")
        if storage.exists(marker):
            return dict(json.loads(storage.read_bytes(marker)))
        with timed(log, "step", name=name) as fields:
            result = step(self, *inputs)
            fields.update({key: value for key, value in result.items() if isinstance(value, (int, float))})
        storage.write_atomic(marker, json.dumps(result).encode())
        return result

    def map(self, items: list[Item], task: Callable[[Item], pa.Table]) -> Any:
        """``map_parts`` with the configured concurrency."""
        return map_parts(items, task, concurrency=self.config.concurrency)

    def work_items(self, kind: str) -> list[Item]:
        """An item with number and URI for each part in the folder ``kind`` of the work folder, in order."""
        folder = self.out.work(kind)
        names = storage.list_files(folder) if storage.exists(folder) else []
        numbers = sorted(int(name.removeprefix("part-").removesuffix(".parquet")) for name in names)
        return [{"number": number, "uri": storage.join(folder, part_name(number))} for number in numbers]

    def vocabulary(self) -> dict[str, int]:
        """The mined terms: term -> number of training images that propose it."""
        table = read_table(self.out.work("vocabulary.parquet"))
        return dict(zip(table["term"].to_pylist(), table["images"].to_pylist(), strict=True))
