"""Stage ``vectors``: vectors that were made elsewhere, checked and normalised, as an embeddings artifact.

The rows of every file are cut into units. A thread reads one, a few thousand rows at a time, checks it and writes its
part to the draft's work folder; its summary comes last, by which a later attempt knows that the unit is done. Then ids
that occur twice are found by their hashes. Memory holds one piece per thread, whatever the files' size.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from lookalike import storage
from lookalike.artifacts import hash_json
from lookalike.cluster import count_cpus
from lookalike.config import runtime
from lookalike.data.intake import VectorFile, Where, list_sources, open_file
from lookalike.data.intake.accounts import counted, explain_refused, explain_repeated, render_card
from lookalike.data.intake.metadata import Metadata, TableConfig, check_columns, read_table, sources_of
from lookalike.data.intake.units import (
    Repeated,
    Summary,
    Unit,
    UnitFiles,
    UnitRules,
    find_repeated,
    publish_unit,
    repeated_rows,
    write_unit,
)
from lookalike.data.parts import PartWriter, part_name, write_table
from lookalike.data.parts import read_table as read_parquet
from lookalike.data.sources.records import count_reasons
from lookalike.entries import escaped
from lookalike.errors import UsageError
from lookalike.progress import progress_bar
from lookalike.schemas import QUARANTINE
from lookalike.stages import Stage, StageConfig, StageRun
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
KEYS_AT_A_TIME = 4_000_000  # hashes of ids that are compared at a time: some 200 MB


class VectorsConfig(Where, StageConfig):
    """Files of vectors, what is known about them, and what to do about rows that cannot be taken."""

    uri: str | list[str]
    """A file, a folder, or a pattern such as ``part-*.npy``; several are read in the given order, and the files of a
    folder or pattern in the order of their names."""
    table: TableConfig | None = None
    """A table of ids and columns beside the vectors."""
    columns: dict[str, str | None] = {}
    """Column of the embeddings (group, view, split, dataset, category, title) -> column of the table, or of the file if
    there is no table, where the names differ; null leaves it empty."""
    model: str = Field(min_length=1, max_length=200)
    """Name of the model that made the vectors, and its version. Vectors of the same ``model`` and dim may be compared:
    queries of one name are searched in an index of the same name."""
    licence: str | None = None
    """Licence of the vectors, for the card."""
    dims: tuple[int, ...] | None = None
    """Prefixes that may be searched; None: powers of two from 8 on. The full dim is always among them."""
    nested: bool = False
    """The model was trained so that prefixes are embeddings (Matryoshka). Otherwise prefixes are offered all the same,
    and the plan, which measures them, uses those that keep its recall."""
    normalize: bool = True
    """Store every vector at length 1. Answers do not depend on it, as they are by cosine."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored precision of the vectors."""
    on_bad: Literal["stop", "quarantine"] = runtime("stop")
    """``stop`` at the first rows that cannot be taken, or leave them out and list them in ``quarantine.parquet``."""
    rows_per_part: int = Field(65_536, ge=1)
    """Rows of a unit of work, which becomes a part of the embeddings."""
    concurrency: int | None = runtime(None, ge=1)
    """Units at a time; None: one per CPU."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        check_columns(value)
        return value

    @model_validator(mode="after")
    def _rising(self) -> "VectorsConfig":
        dims = self.dims
        if dims is not None and (not dims or list(dims) != sorted({*dims}) or dims[0] < 1):
            raise ValueError(f"dims {list(dims)} are not rising numbers above 0; write each once, smallest first")
        return self

    @property
    def uris(self) -> list[str]:
        """What the user named."""
        return [self.uri] if isinstance(self.uri, str) else self.uri

    @property
    def where(self) -> Where:
        """Where the files hold vectors and ids."""
        return Where(**{name: getattr(self, name) for name in Where.model_fields})


def nested_dims(dim: int, wanted: Sequence[int] | None) -> list[int]:
    """The prefixes to offer, smallest first, the full ``dim`` last; ``UsageError`` if one exceeds it."""
    if wanted is None:
        return [*(1 << power for power in range(3, dim.bit_length()) if 1 << power < dim), dim]
    if too_large := [each for each in wanted if each > dim]:
        raise UsageError(f"dims {list(wanted)} exceed the vectors' {dim}; drop {too_large}")
    return sorted({*wanted, dim})


def model_stamp(model: str, dim: int) -> dict[str, Any]:
    """The ``encoder`` entry of ``meta.json`` for a model that lies elsewhere."""
    return {"fingerprint": hash_json(["vectors", model, dim])[:20], "name": model, "external": True}


def open_all(config: VectorsConfig, work: str | None) -> list[VectorFile]:
    """All files with at least one row; ``UsageError`` unless they agree on dim and on having ids."""
    names = list_sources(config.uris)
    opened = [open_file(name, config.where, work) for name in names]
    files = [file for file in opened if file.num_rows]
    if not files:
        raise UsageError(f"{', '.join(map(escaped, names))} hold no vectors; give files with at least one row")
    for file in files:
        if file.dim != files[0].dim or not file.dim:
            raise UsageError(
                f"{escaped(file.uri)} holds vectors of {file.dim} numbers, {escaped(files[0].uri)} of {files[0].dim}; "
                "all must be of one size above 0: leave out the files of other models"
            )
        if (file.id_column is None) != (files[0].id_column is None):
            raise UsageError(
                f"only one of {escaped(file.uri)} and {escaped(files[0].uri)} has ids; name their column with "
                "id_column, or give a table with the ids of all"
            )
    for note in sorted({f"{file.uri}: {file.note}" for file in files if file.note}):
        log.warning("%s", escaped(note))
    return files


def cut_units(files: Sequence[VectorFile], rows_per_part: int) -> list[Unit]:
    """The units of all files, in order."""
    units: list[Unit] = []
    total = 0
    for number, file in enumerate(files):
        for start in range(0, file.num_rows, rows_per_part):
            stop = min(start + rows_per_part, file.num_rows)
            units.append(Unit(len(units), number, start, stop, total + start))
        total += file.num_rows
    return units


def open_table(config: VectorsConfig, files: Sequence[VectorFile], work: str) -> Metadata | None:
    """The table beside the vectors, read once; ``UsageError`` unless it can be joined."""
    if config.table is None:
        return None
    path = storage.join(work, "table.arrow")
    if not storage.is_local(path):
        raise UsageError(f"a table is joined on a disk, and the root {path} is none; choose a root on a disk")
    if not storage.exists(path):
        read_table(config.table, config.columns, path)
    has_ids = files[0].id_column is not None
    table = Metadata(storage.local_path(path), by_id=False)
    by_id = config.table.join == "id" or (config.table.join == "auto" and has_ids and table.has_ids)
    name, total = escaped(config.table.uri), sum(file.num_rows for file in files)
    if by_id:
        if not (has_ids and table.has_ids):
            lacks = f"the table {name}" if has_ids else escaped(files[0].uri)
            raise UsageError(f"{lacks} has no ids to join by; name their column with id_column, or set join: row")
        table = Metadata(storage.local_path(path), by_id=True)
        if (twice := table.repeated()) is not None:
            raise UsageError(
                f"the table {name} holds the id {twice[0]!r} in rows {twice[1]} and {twice[2]}, and an id has one row; "
                "remove one"
            )
    elif table.num_rows != total:
        raise UsageError(
            f"the table {name} has {table.num_rows} rows, the files hold {total} vectors, and row n describes vector n;"
            " give a row for each vector, or set join: id if both have ids"
        )
    return table


def rules_of(config: VectorsConfig, files: Sequence[VectorFile]) -> UnitRules:
    """How the units are checked and written; ``UsageError`` for a column that a file lacks."""
    sources: dict[str, str] = {}
    if config.table is None:
        for file in files:
            sources = sources_of(list(file.columns), config.columns, escaped(file.uri))
    return UnitRules(files[0].dim, config.dtype, config.normalize, sources)


class Job(NamedTuple):
    """What the steps of a run share."""

    config: VectorsConfig
    files: list[VectorFile]
    units: list[Unit]
    metadata: Metadata | None
    done: UnitFiles

    @property
    def sources(self) -> dict[int, str]:
        """Unit -> file."""
        return {unit.number: self.files[unit.file].uri for unit in self.units}

    @property
    def has_ids(self) -> bool:
        """Whether rows are named by their files or the table, and not by their numbers."""
        return self.files[0].id_column is not None or (self.metadata is not None and self.metadata.has_ids)


def run(run: StageRun[VectorsConfig]) -> None:
    """Check and write all units, remove repeated ids, write ``meta.json``, the card and the quarantine."""
    config, work = run.config, run.out.work()
    files = open_all(config, run.out.work("unpacked"))
    dims = nested_dims(files[0].dim, config.dims)
    job = Job(config, files, cut_units(files, config.rows_per_part), open_table(config, files, work), UnitFiles(work))
    summaries = write_all(job, rules_of(config, files), run.out.name)
    repeated = remove_repeated(job)
    rows = sum(
        publish_unit(number, repeated[number], job.done, run.out.path(part_name(number))) for number in job.sources
    )
    quarantine = write_quarantine(job, repeated, run.out.path("quarantine.parquet"))
    if not rows:
        read = sum(summary["rows"] for summary in summaries)
        raise UsageError(f"none of the {read} vectors can be taken: {counted(quarantine)}")
    lengths = [summary["lengths"] for summary in summaries if summary["lengths"]]
    facts = describe(config, dims, rows) | {"lengths": [min(low for low, _ in lengths), max(top for _, top in lengths)]}
    run.out.write_json("meta.json", facts)
    storage.write_atomic(run.out.path("README.md"), render_card(facts, files, quarantine).encode())
    run.out.stats.update(rows=rows, dim=dims[-1], files=len(files), refused=dict(quarantine))
    log.info("vectors %s", fields(rows=rows, dim=dims[-1], normalized=config.normalize))
    if quarantine:
        log.warning("rows left out %s", fields(**quarantine, listed=run.out.path("quarantine.parquet")))
    if not config.nested and len(dims) > 1:
        log.warning("not trained nested %s", fields(dims=dims, effect="the plan measures which prefixes are any good"))


def write_all(job: Job, rules: UnitRules, name: str) -> list[Summary]:
    """Summaries of all units, in order; raises ``UsageError`` for bad rows if they stop the stage."""

    def work(unit: Unit) -> Summary:
        summary = write_unit(unit, job.files[unit.file], job.metadata, job.done, rules)
        if summary["refused"] and job.config.on_bad == "stop":
            raise UsageError(explain_refused(unit, summary, job.done))
        bar.update(unit.stop - unit.start)
        return summary

    total = sum(unit.stop - unit.start for unit in job.units)
    with (
        progress_bar(f"vectors {name}", total, unit="vector") as bar,
        ThreadPoolExecutor(job.config.concurrency or count_cpus()) as pool,
    ):
        try:
            return list(pool.map(work, job.units))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def remove_repeated(job: Job) -> dict[int, list[Repeated]]:
    """Unit -> rows whose id stands before them; the first such row raises ``UsageError`` if bad rows stop the stage."""
    found: dict[int, list[Repeated]] = defaultdict(list)
    if job.has_ids:
        for again in find_repeated(list(job.sources), job.done, KEYS_AT_A_TIME):
            if job.config.on_bad == "stop":
                raise UsageError(explain_repeated(again, job.sources))
            found[again.unit].append(again)
    return found


def write_quarantine(job: Job, repeated: dict[int, list[Repeated]], target: str) -> Counter[str]:
    """Write all refused rows, in the order of files and rows; return their number by reason."""
    counts: Counter[str] = Counter()
    with PartWriter(lambda _: target, QUARANTINE) as writer:
        for number, source in job.sources.items():
            refused = read_parquet(job.done.of("quarantine", number))
            table = pa.concat_tables([refused, repeated_rows(repeated[number], source, job.sources)]).sort_by("row")
            writer.write(table)
            counts.update(count_reasons(table))
    if not writer.uris:
        write_table(target, QUARANTINE.empty_table())
    return counts


def describe(config: VectorsConfig, dims: list[int], rows: int) -> dict[str, Any]:
    """``meta.json`` of the embeddings."""
    return {
        "dim": dims[-1],
        "dims": dims,
        "rows": rows,
        "encoder": model_stamp(config.model, dims[-1]),
        "licence": config.licence,
        "nested": config.nested,
        "normalized": config.normalize,
        "dtype": config.dtype,
    }


def preview(run: StageRun[VectorsConfig]) -> list[str]:
    """What would be read, and how much would be written."""
    files = open_all(run.config, None)
    dims, rules = nested_dims(files[0].dim, run.config.dims), rules_of(run.config, files)
    total = sum(file.num_rows for file in files)
    size = total * rules.dim * (2 if run.config.dtype == "float16" else 4)
    lines = [f"{escaped(file.uri)}: {file.num_rows} vectors of {file.dim}, {file.kind}" for file in files[:20]]
    return [*lines, f"{total} vectors in all, about {size / 1e6:.0f} MB to write; dims {', '.join(map(str, dims))}"]


def sources(config: VectorsConfig) -> list[str]:
    """Files whose content is part of the fingerprint."""
    return [*list_sources(config.uris), *([] if config.table is None else [storage.absolute(config.table.uri)])]


STAGE: Stage[VectorsConfig] = Stage(
    name="vectors",
    kind="embeddings",
    config=VectorsConfig,
    run=run,
    sources=sources,
    resumable=True,
    preview=preview,
)
