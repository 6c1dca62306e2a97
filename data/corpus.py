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
from itertools import chain, groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.cluster import ensure_ray
from lookalike.config import runtime
from lookalike.data.parts import Item, PartWriter, blocks_of, map_parts, num_partitions, write_table
from lookalike.data.sources import SOURCE_FORMATS, Reader, RecordSource, Unit
from lookalike.data.sources.ingest import (
    IDS,
    Summary,
    UnitChecks,
    UnitFiles,
    check_unit,
    drop_repeated,
    find_repeated,
    keys_of_names,
    problems_of_unit,
)
from lookalike.data.sources.reader import PASSED_OVER, REFUSED
from lookalike.data.sources.records import REPAIRED, RecordLimits, count_reasons
from lookalike.data.sources.survey import survey_corpus, survey_sources
from lookalike.entries import escaped
from lookalike.errors import CorpusError
from lookalike.outlook import Outlook
from lookalike.progress import progress_bar, track
from lookalike.sampling import stable_keys
from lookalike.schemas import QUARANTINE
from lookalike.stages import Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger, timed
from lookalike.vision.formats import unusual_formats

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
    """One small item per unit, in record order; raises ``CorpusError`` if a source cannot be read as described.

    A file without a unit gets one without records, so that it is accounted for.
    """
    units: list[tuple[int, Unit]] = []
    nothing: list[str] = []
    for source in range(len(config.sources)):
        reader = config.reader(source)
        files = reader.files()
        with ThreadPoolExecutor(8) as pool:  # mostly waits for the store
            cut = pool.map(lambda uri: list(reader.units(uri, config.rows_per_part)), files)  # noqa: B023
            found = [some or [{"uri": uri, REFUSED: []}] for uri, some in zip(files, cut, strict=True)]
        rest = reader.rest()
        units += [(source, unit) for unit in [*chain.from_iterable(found), *([] if rest is None else [rest])]]
        nothing.append(reader.source.uri + reader.others())
    if all(REFUSED in unit for _, unit in units):
        raise CorpusError(f"the sources hold no records: {', '.join(nothing)}; give files that this format reads")
    return [
        {"number": number, "source": source, "unit": json.dumps(unit)} for number, (source, unit) in enumerate(units)
    ]


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

    Row numbers, which counted within units, now count within files. A file without records gets a row.
    """
    counts: Counter[str] = Counter()
    waiting: list[pa.Table] = []
    units = track(summaries, "quarantine", len(summaries), "unit")
    with PartWriter(lambda _: target, QUARANTINE) as writer:
        for (file, _), group in groupby(units, key=lambda summary: (summary["file"], summary["source"])):
            first_row, accounted = 0, False
            for summary in group:
                if summary["quarantined"] or summary["number"] in repeated:
                    problems = problems_of_unit(summary["number"], files)
                    place_of_row = problems.schema.get_field_index("row")
                    waiting.append(problems.set_column(place_of_row, "row", pc.add(problems["row"], first_row)))
                first_row += summary["records"]
                accounted = accounted or summary["records"] > 0 or summary[PASSED_OVER] is not None
            if not accounted:
                waiting.append(_file_without_records(file))
            if sum(table.num_rows for table in waiting) >= QUARANTINE_ROWS:
                counts.update(_write(writer, waiting))
        counts.update(_write(writer, waiting))
    if not writer.uris:
        write_table(target, QUARANTINE.empty_table())
    return counts


def _write(writer: PartWriter, waiting: list[pa.Table]) -> Counter[str]:
    """Write the tables and empty the list; return the number of rows by reason."""
    table = pa.concat_tables([*waiting, QUARANTINE.empty_table()])
    writer.write(table)
    waiting.clear()
    return Counter(count_reasons(table))


def _file_without_records(file: str) -> pa.Table:
    row = {"source": escaped(file), "row": 0, "field": "record", "reason": "no_records", "uri": escaped(file)}
    return pa.Table.from_pylist([{**row, "detail": "the file holds no record; fill or remove it"}], schema=QUARANTINE)


def explain_refusals(quarantine: str, refused: Mapping[str, int]) -> str:
    """``reason: number (an example's detail)`` of each reason."""
    filesystem, path = storage.arrow_filesystem(quarantine)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        rows = file.read_row_group(0).to_pylist() if file.num_row_groups else []
    details = {f"{row['field']}: {row['reason']}": row["detail"] for row in reversed(rows)}
    return "; ".join(
        f"{reason}: {count}" + (f" ({detail})" if (detail := details.get(reason)) else "")
        for reason, count in refused.items()
    )


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
    run.out.stats = tally(config, summaries, repeated, counts, count_left_out(config, summaries, files))
    if not run.out.stats["images"]:
        reasons = explain_refusals(run.out.path("quarantine.parquet"), run.out.stats["refused"])
        raise CorpusError(f"none of the {run.out.stats['records']} records is acceptable: {reasons}")
    log.info("corpus %s", fields(**{name: run.out.stats[name] for name in ("records", "images", "quarantine_rows")}))
    if run.out.stats["passed_over"]:
        log.warning("files passed over by their endings %s", fields(**run.out.stats["passed_over"]))


def count_left_out(config: CorpusConfig, summaries: Sequence[Summary], files: UnitFiles) -> Counter[str]:
    """Ending -> files of folders with a table that the table does not name. Holds 8 bytes per name."""
    counts: Counter[str] = Counter()
    for source in range(len(config.sources)):
        if (reader := config.reader(source)).has_table():
            keys = [keys_of_names(summary["number"], files) for summary in summaries if summary["source"] == source]
            counts += reader.left_out(np.unique(np.concatenate(keys)))
    return counts


def tally(
    config: CorpusConfig,
    summaries: Sequence[Summary],
    repeated: Mapping[int, Counter[str]],
    counts: Counter[str],
    left_out: Counter[str],
) -> dict[str, Any]:
    """The statistics of the stage: each record is an image or was refused for one reason; only images have repairs.

    ``passed_over``: files of the sources that no record stands for, by ending. A file without records counts as one.
    """
    datasets: dict[str, Counter[str]] = {}
    for summary in summaries:
        splits = datasets.setdefault(config.sources[summary["source"]].dataset, Counter())
        splits.update(summary["accepted"])
        splits.subtract(repeated.get(summary["number"], Counter()))
    images = sum(splits.total() for splits in datasets.values())
    records = sum(summary["records"] for summary in summaries) + counts["record: no_records"]
    passed_over = sum((Counter(summary[PASSED_OVER]) for summary in summaries), left_out)
    repairs = {reason: n for reason, n in sorted(counts.items()) if REPAIRED in reason}
    refused = {reason: n for reason, n in sorted(counts.items()) if reason not in repairs}
    assert records == images + sum(refused.values()), f"{records} records, {images} images, refused {refused}"
    return {
        "records": records,
        "images": images,
        "refused": refused,
        "quarantine_rows": counts.total(),
        "passed_over": dict(sorted(passed_over.items())),
        "repaired": {reason.replace(REPAIRED, ""): n for reason, n in repairs.items()},
        "datasets": {
            name: {split: n for split, n in sorted(splits.items()) if n} for name, splits in sorted(datasets.items())
        },
    }


def _sources(config: CorpusConfig) -> list[str]:
    return [source.uri for source in config.sources]


def foresee(config: CorpusConfig, given: Mapping[str, Mapping[str, Outlook]], made: Artifact | None) -> Outlook:
    """See ``Stage.foresee``: what the corpus holds, or what its sources do, as far as that is told soon."""
    if made is not None:
        return survey_corpus(made)
    return survey_sources([config.reader(source) for source in range(len(config.sources))])


STAGE: Stage[CorpusConfig] = Stage(
    "corpus",
    "corpus",
    CorpusConfig,
    run,
    sources=_sources,
    environment=unusual_formats,
    resumable=True,
    foresee=foresee,
    version=4,
)
