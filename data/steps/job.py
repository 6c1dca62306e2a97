"""What the steps of the ``labels`` stage share: settings, the opened inputs, the draft, and markers of finished steps.

A step reads files and writes files; what it returns is small (counts) and goes into its marker. A step that has a
marker is not run again, and within a step parts that are written are not redone: a killed driver or worker costs the
parts that were in flight.
"""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pydantic import Field

from lookalike import storage
from lookalike.config import runtime
from lookalike.data.dictionary.scores import DictionaryConfig
from lookalike.data.duplicates.twins import DedupConfig
from lookalike.data.interests.clusters import ClusterConfig
from lookalike.data.interests.interests import RestrictionConfig
from lookalike.data.parts import Item, map_parts, part_items, read_table
from lookalike.data.report.report import ReportConfig
from lookalike.data.text.settings import AnnotationConfig
from lookalike.stages import StageConfig, StageRun
from lookalike.telemetry import get_logger, timed

log = get_logger(__name__)


class LabelsConfig(StageConfig):
    """Settings of the seven steps."""

    annotations: AnnotationConfig = AnnotationConfig()
    dedup: DedupConfig = DedupConfig()
    dictionary: DictionaryConfig = DictionaryConfig()
    clusters: ClusterConfig = ClusterConfig()
    restriction: RestrictionConfig = RestrictionConfig()
    feature_dim: int = Field(128, ge=8, le=4096)
    """Size to which the frozen embeddings are projected for the dictionary and the duplicate search."""
    min_images_per_label: int = Field(8, ge=1)
    """Training images a cluster needs to become a class."""
    report: ReportConfig = ReportConfig()
    concurrency: int | None = runtime(None, ge=1)
    """Tasks at a time; None: as many as there are CPUs."""


class LabelJob:
    """One run of the stage over its draft."""

    def __init__(self, run: StageRun[LabelsConfig]) -> None:
        self.config, self.out = run.config, run.out
        self.corpus, self.embeddings = run.one("corpus"), run.one("embeddings")
        self.previous = next(iter(run.many("previous")), None)
        """Labels of an earlier run, whose cluster ids are carried over."""
        self.parts = part_items(self.corpus.files("part-", ".parquet"))

    def once(self, name: str, step: Callable[["LabelJob"], dict[str, Any]]) -> dict[str, Any]:
        """The step's small result, from its marker when an earlier attempt finished it."""
        marker = self.out.work(f"{name}.json")
        if storage.exists(marker):
            return dict(json.loads(storage.read_bytes(marker)))
        with timed(log, "step", name=name) as more:
            result = step(self)
            more.update({key: value for key, value in result.items() if isinstance(value, (int, float))})
        storage.write_atomic(marker, json.dumps(result).encode())
        return result

    def map(self, items: list[Item], task: Callable[[Item], pa.Table]) -> Any:
        """``map_parts`` with the configured concurrency."""
        return map_parts(items, task, concurrency=self.config.concurrency)

    def work_parts(self, kind: str) -> list[str]:
        """URIs of the parts of a kind in the work folder, in order."""
        folder = self.out.work(kind)
        return [storage.join(folder, name) for name in storage.list_files(folder)] if storage.exists(folder) else []

    def vocabulary(self) -> dict[str, int]:
        """Term -> training images that propose it, of the terms that enough images propose."""
        table = read_table(self.out.work("vocabulary.parquet"))
        return dict(zip(table["term"].to_pylist(), table["images"].to_pylist(), strict=True))
