"""Stage ``corpus``: raw image records to checked rows in ``schemas.CORPUS``, and a quarantine with reasons.

Two passes over row groups. The first reads ids only and finds the repeated ones (the one shuffle); the second checks
every record and writes one part a row group. The order of records is that of the recipe's sources, their files by
name and the rows within, so the result does not depend on the number of blocks.
"""

from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from lookalike import storage
from lookalike.cluster import ensure_ray
from lookalike.config import Config, runtime
from lookalike.data.parts import (
    Item,
    blocks_of,
    broadcast,
    map_parts,
    num_partitions,
    part_name,
    read_table,
    write_table,
)
from lookalike.data.records import Limits, Origin, check_records, count_reasons, read_ids, resolve_columns
from lookalike.errors import CorpusError
from lookalike.schemas import QUARANTINE
from lookalike.stages import Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger, timed

log = get_logger(__name__)
BATCH_ROWS = 1024  # rows decoded at a time within a row group

_IDS = pa.schema([("image_id", pa.string()), ("order", pa.int64())])
_COUNTS = pa.schema([("split", pa.string()), ("dataset", pa.string()), ("rows", pa.int64())])


class Source(Config):
    """One set of raw records."""

    uri: str
    """A parquet file, or a folder whose parquet files are read in the order of their names."""
    format: Literal["parquet"] = "parquet"
    """How the records are stored."""
    dataset: str = Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9_.-]+$")
    """What the rows are called downstream."""
    columns: dict[str, str] = Field(default={})
    """Corpus field -> column of the source, where the names differ."""
    test_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of groups (images, where there is no group) held out when a row names no split of its own."""


class CorpusConfig(StageConfig):
    """What to read and what to accept."""

    sources: list[Source] = Field(min_length=1)
    """Read in this order: of records with the same id the first stays."""
    max_bytes: int = Field(20_000_000, ge=1)
    """Bytes of one encoded image."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Width times height; checked in the header, so a decompression bomb is refused before it is decoded."""
    min_side_px: int = Field(8, ge=1)
    """Shorter side of an acceptable image, pixels."""
    concurrency: int | None = runtime(None, ge=1)
    """Tasks at a time; None: as many as there are CPUs."""


def plan_row_groups(config: CorpusConfig) -> list[Item]:
    """One item a row group, in record order, with the columns its source resolves to. Raises ``CorpusError``."""
    items: list[Item] = []
    order = 0
    for position, source in enumerate(config.sources):
        files = [name for name in storage.list_files(source.uri) if name == "" or name.endswith(".parquet")]
        if not files:
            raise CorpusError(f"source {source.uri} has no parquet file; give a parquet file or a folder of them")
        for name in files:
            uri = storage.join(source.uri, name) if name else source.uri
            metadata = _metadata(uri)
            columns = resolve_columns(source.columns, metadata.schema.to_arrow_schema(), f"source {uri}")
            first_row = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                items.append({"number": len(items), "uri": uri, "row_group": group, "first_row": first_row,
                              "order": order, "source": position, "columns": list(columns.items())})  # fmt: skip
                first_row += rows
                order += rows
    return items


def _metadata(uri: str) -> Any:
    filesystem, path = storage.arrow_filesystem(uri)
    try:
        return pq.read_metadata(path, filesystem=filesystem)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"source {uri} is no readable parquet file ({error}); replace or remove it") from None


def find_repeated(items: list[Item], concurrency: int | None) -> dict[str, int]:
    """Id -> order of its first record, for the ids that several records have."""
    from ray.data.aggregate import Count, Min

    def ids(item: Item) -> pa.Table:
        columns = dict(item["columns"])
        column = _file(item).read_row_group(item["row_group"], columns=[columns["image_id"]]).column(0)
        values = read_ids(column)
        orders = pa.array(range(item["order"], item["order"] + len(values)), pa.int64())
        table = pa.table([pa.array(values, pa.string()), orders], schema=_IDS)
        return table.filter(table["image_id"].is_valid())

    counted = map_parts(items, ids, concurrency=concurrency).groupby("image_id", num_partitions(items)).aggregate(
        Min("order", alias_name="first"), Count(alias_name="records"))  # fmt: skip
    repeated = counted.map_batches(lambda table: table.filter(pc.greater(table["records"], 1)), batch_format="pyarrow",
                                   batch_size=None)  # fmt: skip
    return {row["image_id"]: row["first"] for block in blocks_of(repeated) for row in block.to_pylist()}


def _file(item: Item) -> pq.ParquetFile:
    filesystem, path = storage.arrow_filesystem(item["uri"])
    return pq.ParquetFile(path, filesystem=filesystem)


def _check_row_group(item: Item, config: CorpusConfig, repeated: dict[str, int], out: str, work: str) -> pa.Table:
    source = config.sources[item["source"]]
    limits = Limits(config.max_bytes, config.max_pixels, config.min_side_px)
    columns = dict(item["columns"])
    accepted, refused, row = [], [], item["first_row"]
    batches = _file(item).iter_batches(BATCH_ROWS, row_groups=[item["row_group"]], columns=list(set(columns.values())))
    for batch in batches:
        order = item["order"] + row - item["first_row"]
        origin = Origin(item["uri"], row, order, source.dataset, source.test_fraction, config.seed)
        checked = check_records(pa.Table.from_batches([batch]), columns, origin, limits=limits, repeated=repeated)
        accepted.append(checked.accepted)
        refused.append(checked.quarantine)
        row += batch.num_rows
    name = part_name(item["number"])
    table = pa.concat_tables(accepted) if accepted else None
    if table is not None and table.num_rows:
        write_table(storage.join(out, name), table, row_group_size=BATCH_ROWS)
    if any(problems.num_rows for problems in refused):
        write_table(storage.join(work, name), pa.concat_tables(refused))
    return _count(table)


def _count(table: pa.Table | None) -> pa.Table:
    if table is None or not table.num_rows:
        return _COUNTS.empty_table()
    counts = table.group_by(["split", "dataset"]).aggregate([([], "count_all")])
    return counts.rename_columns(["split", "dataset", "rows"]).cast(_COUNTS)


def merge_quarantine(work: str, target: str) -> tuple[int, dict[str, int]]:
    """Join the parts' problems into one file, streaming; (rows, reason counts)."""
    filesystem, path = storage.arrow_filesystem(target)
    reasons: dict[str, int] = {}
    rows = 0
    with pq.ParquetWriter(path, QUARANTINE, filesystem=filesystem, compression="zstd") as writer:
        for name in storage.list_files(work) if storage.exists(work) else []:
            table = read_table(storage.join(work, name))
            writer.write_table(table)
            rows += table.num_rows
            for reason, count in count_reasons(table).items():
                reasons[reason] = reasons.get(reason, 0) + count
    return rows, dict(sorted(reasons.items()))


def run(run: StageRun[CorpusConfig]) -> None:
    """Check all sources and write the corpus; raises ``CorpusError`` when nothing is acceptable."""
    config, out, work = run.config, run.out.uri, run.out.work("quarantine")
    items = plan_row_groups(config)
    if not items:
        raise CorpusError(f"the sources hold no record: {', '.join(s.uri for s in config.sources)}")
    ensure_ray()
    with timed(log, "ids checked", row_groups=len(items)) as more:
        repeated = find_repeated(items, config.concurrency)
        more["repeated"] = len(repeated)
    shared = broadcast(repeated)

    def check(item: Item) -> pa.Table:
        return _check_row_group(item, config, shared(), out, work)

    counts: dict[str, dict[str, int]] = {}
    with timed(log, "records checked"):
        for block in blocks_of(map_parts(items, check, concurrency=config.concurrency)):
            for entry in block.to_pylist():
                dataset = counts.setdefault(entry["dataset"], {})
                dataset[entry["split"]] = dataset.get(entry["split"], 0) + entry["rows"]
    bad, reasons = merge_quarantine(work, run.out.path("quarantine.parquet"))
    accepted = sum(sum(splits.values()) for splits in counts.values())
    if not accepted:
        raise CorpusError(f"none of the records is acceptable; reasons: {reasons}; check columns and limits")
    datasets = {name: dict(sorted(splits.items())) for name, splits in sorted(counts.items())}
    run.out.stats = {"images": accepted, "datasets": datasets, "quarantine_rows": bad, "quarantine": reasons}
    log.info("corpus %s", fields(images=accepted, quarantined=bad))


def _sources(config: CorpusConfig) -> list[str]:
    return [source.uri for source in config.sources]


STAGE: Stage[CorpusConfig] = Stage("corpus", "corpus", CorpusConfig, run, sources=_sources)
