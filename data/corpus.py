"""Stage ``corpus``: from raw records to checked rows (``schemas.CORPUS``) and a quarantine with reasons.

Every source is cut into units of work. A task reads one unit, checks its records and writes its part of the corpus, its
ids, its quarantine rows and, last, a summary, by which a later attempt knows that the unit is done. Then the ids (never
an image) are shuffled, and of records with the same id all but the first are removed from their units. Records are in
the order of the recipe's sources, then of file names, then of the records in a file; neither the number of tasks nor
the order in which they finish matters.
"""

import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from lookalike.cluster import ensure_ray
from lookalike.config import runtime
from lookalike.data.parts import Item, PartWriter, blocks_of, map_parts, num_partitions, write_table
from lookalike.data.sources import SOURCE_FORMATS, Reader, RecordSource
from lookalike.data.sources.ingest import (
    IDS,
    Summary,
    UnitChecks,
    UnitFiles,
    check_unit,
    drop_repeated,
    find_repeated,
    problems_of_unit,
)
from lookalike.data.sources.records import REPAIRED, RecordLimits, count_reasons
from lookalike.errors import CorpusError
from lookalike.progress import progress_bar, track
from lookalike.sampling import stable_keys
from lookalike.schemas import QUARANTINE
from lookalike.stages import Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger, timed

log = get_logger(__name__)
QUARANTINE_ROWS = 65_536  # rows of a row group of the quarantine
IDS_PER_BUCKET = 1_000_000  # in the shuffle that finds repeated ids; a task holds one bucket

_SUMMARY_ROW = pa.schema([("summary", pa.string())])


class CorpusConfig(StageConfig):
    """Sources, and bounds of acceptable records."""

    sources: list[RecordSource] = Field(min_length=1)
    """Read in this order; of acceptable records with the same id the first stays."""
    max_bytes: int = Field(20_000_000, ge=1)
    """Most bytes of an encoded image."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Most pixels, width times height. The header is checked, so a decompression bomb is refused before decoding."""
    min_side_px: int = Field(8, ge=1)
    """Smallest side of an image, pixels."""
    max_text_chars: int = Field(10_000, ge=100)
    """Most characters of a text field, or of all terms of a list together; longer ones are cut."""
    rows_per_part: int = Field(2048, ge=1)
    """Records of a unit of work, about; no file of the corpus has more than twice as many rows."""
    concurrency: int | None = runtime(None, ge=1)
    """Tasks at a time; None: one per CPU."""

    def reader(self, source: int) -> Reader:
        """The reader of source number ``source``."""
        settings = self.sources[source]
        return SOURCE_FORMATS.get(settings.format)(settings, self.max_bytes)

    @property
    def checks(self) -> UnitChecks:
        """How a task checks and writes a unit."""
        limits = RecordLimits(self.max_bytes, self.max_pixels, self.min_side_px, self.max_text_chars)
        return UnitChecks(limits, self.seed, 2 * self.rows_per_part)


def plan_units(config: CorpusConfig) -> list[Item]:
    """One small item per unit, in record order; raises ``CorpusError`` if a source cannot be read as described."""
    items: list[Item] = []
    for source in range(len(config.sources)):
        reader = config.reader(source)
        with ThreadPoolExecutor(8) as pool:  # mostly waits for the store
            for units in pool.map(lambda uri: list(reader.units(uri, config.rows_per_part)), reader.files()):  # noqa: B023
                items += [
                    {"number": len(items) + place, "source": source, "unit": json.dumps(unit)}
                    for place, unit in enumerate(units)
                ]
    if not items:
        raise CorpusError(f"the sources hold no records: {', '.join(s.uri for s in config.sources)}")
    return items


def _remove_repeated(items: list[Item], images: int, files: UnitFiles, config: CorpusConfig) -> dict[int, Counter[str]]:
    """Unit -> rows removed from it, by split. The first shuffle moves all ids, the second only repeated ones."""
    buckets = max(1, images // IDS_PER_BUCKET)

    def bucketed(item: Item) -> pa.Table:
        ids = files.read("ids", item["number"], IDS)
        keys = stable_keys(ids["image_id"].to_pylist()) % np.uint64(buckets)
        return ids.append_column("bucket", pa.array(keys.astype(np.int64)))

    ids = map_parts(items, bucketed, concurrency=config.concurrency)
    by_bucket = ids.groupby("bucket", num_partitions=num_partitions(items, buckets))
    repeated = by_bucket.map_groups(find_repeated, batch_format="pyarrow").materialize()
    removed: dict[int, Counter[str]] = {}
    if repeated.count():
        by_unit = repeated.groupby("unit", num_partitions=num_partitions(items))
        drop = partial(drop_repeated, files=files)
        for block in blocks_of(by_unit.map_groups(drop, batch_format="pyarrow", concurrency=config.concurrency)):
            for row in block.to_pylist():
                removed.setdefault(row["unit"], Counter())[row["split"]] += row["rows"]
    return removed


def merge_quarantine(
    summaries: Sequence[Summary], repeated: Container[int], files: UnitFiles, target: str
) -> Counter[str]:
    """Stream the problems of all units into one file, in record order; return the number of rows by reason.

    Row numbers, which counted within units, now count within files.
    """
    counts: Counter[str] = Counter()
    place, first_row = ("", -1), 0
    waiting: list[pa.Table] = []
    with PartWriter(lambda _: target, QUARANTINE) as writer:
        for summary in track(summaries, "quarantine", len(summaries), "unit"):
            here = (summary["file"], summary["source"])
            place, first_row = here, first_row if here == place else 0
            if summary["quarantined"] or summary["number"] in repeated:
                problems = problems_of_unit(summary["number"], files)
                counts.update(count_reasons(problems))
                place_of_row = problems.schema.get_field_index("row")
                waiting.append(problems.set_column(place_of_row, "row", pc.add(problems["row"], first_row)))
            first_row += summary["records"]
            if sum(table.num_rows for table in waiting) >= QUARANTINE_ROWS:
                writer.write(pa.concat_tables(waiting))
                waiting = []
        writer.write(pa.concat_tables([*waiting, QUARANTINE.empty_table()]))
    if not writer.uris:
        write_table(target, QUARANTINE.empty_table())
    return counts


def _check_all(items: list[Item], config: CorpusConfig, files: UnitFiles) -> list[Summary]:
    """The summaries of all units, in order."""

    def check(item: Item) -> pa.Table:
        reader = config.reader(item["source"])
        summary = check_unit(item["number"], json.loads(item["unit"]), reader, files, config.checks)
        return pa.table([[json.dumps({**summary, "source": item["source"]})]], schema=_SUMMARY_ROW)

    summaries: list[Summary] = []
    with timed(log, "records checked", units=len(items)), progress_bar("corpus", len(items), "unit") as bar:
        for block in blocks_of(map_parts(items, check, concurrency=config.concurrency)):
            summaries += [json.loads(text) for text in block["summary"].to_pylist()]
            bar.update(block.num_rows)
    return sorted(summaries, key=lambda summary: int(summary["number"]))


def run(run: StageRun[CorpusConfig]) -> None:
    """Check all sources and write the corpus; raises ``CorpusError`` if no record is acceptable."""
    config, files = run.config, UnitFiles(run.out.uri, run.out.work())
    items = plan_units(config)
    ensure_ray()
    summaries = _check_all(items, config, files)
    with timed(log, "repeated ids dropped") as more:
        images = sum(sum(summary["accepted"].values()) for summary in summaries)
        repeated = _remove_repeated(items, images, files, config)
        more["rows"] = sum(splits.total() for splits in repeated.values())
    counts = merge_quarantine(summaries, repeated, files, run.out.path("quarantine.parquet"))
    run.out.stats = tally(config, summaries, repeated, counts)
    if not run.out.stats["images"]:
        raise CorpusError(
            f"none of the {run.out.stats['records']} records is acceptable; reasons: "
            f"{run.out.stats['refused']}; check columns and limits"
        )
    log.info("corpus %s", fields(records=run.out.stats["records"], images=run.out.stats["images"]))


def tally(
    config: CorpusConfig, summaries: Sequence[Summary], repeated: Mapping[int, Counter[str]], counts: Counter[str]
) -> dict[str, Any]:
    """The statistics of the stage: each record is an image or was refused for one reason; only images have repairs."""
    datasets: dict[str, Counter[str]] = {}
    for summary in summaries:
        splits = datasets.setdefault(config.sources[summary["source"]].dataset, Counter())
        splits.update(summary["accepted"])
        splits.subtract(repeated.get(summary["number"], Counter()))
    images = sum(splits.total() for splits in datasets.values())
    records = sum(summary["records"] for summary in summaries)
    repairs = {reason: n for reason, n in sorted(counts.items()) if REPAIRED in reason}
    refused = {reason: n for reason, n in sorted(counts.items()) if reason not in repairs}
    assert records == images + sum(refused.values()), f"{records} records, {images} images, refused {refused}"
    return {
        "records": records,
        "images": images,
        "refused": refused,
        "quarantine_rows": counts.total(),
        "repaired": {reason.replace(REPAIRED, ""): n for reason, n in repairs.items()},
        "datasets": {
            name: {split: n for split, n in sorted(splits.items()) if n} for name, splits in sorted(datasets.items())
        },
    }


def _sources(config: CorpusConfig) -> list[str]:
    return [source.uri for source in config.sources]


STAGE: Stage[CorpusConfig] = Stage("corpus", "corpus", CorpusConfig, run, sources=_sources, resumable=True, version=3)
