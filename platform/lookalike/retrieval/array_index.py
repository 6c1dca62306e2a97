"""Search over an array in this process, without artifacts or a service: the same store, index types and plans."""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lookalike import arguments
from lookalike.errors import ArgumentError, UsageError
from lookalike.retrieval.index_meta import EncoderRef, IndexMeta
from lookalike.retrieval.index_types import SHORTLISTS, ShortlistOptions
from lookalike.retrieval.ranking import NO_ROW, Floats
from lookalike.retrieval.shard_meta import ShardMeta
from lookalike.retrieval.shard_searcher import ShardSearcher
from lookalike.retrieval.shortlist import build_shortlist, shortlist_name
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.store_writer import write_store
from lookalike.retrieval.vectors import row_slices

BATCH_ROWS = 65536
"""Rows that are written at a time."""
MODEL = "of an array"


class ArrayShard(ShardSearcher):
    """A shard whose rows are in the order of an array, so that ids are not sorted."""

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.store.table["image_id"].to_pylist())}

    def find(self, image_id: str) -> int:
        """Row of an id, -1 if there is none."""
        return self._places.get(image_id, NO_ROW)


def index_array(
    vectors: npt.ArrayLike,
    ids: Sequence[str] | None,
    columns: Mapping[str, Sequence[str | None]] | None,
    *,
    dims: Sequence[int] | None,
    shortlist: str | None,
) -> tuple[IndexMeta, ShardSearcher]:
    """The index of ``vectors`` [n, D] in a temporary folder that lives as long as the shard; see ``Searcher.of``."""
    rows = _check_vectors(vectors)
    table = _make_table(len(rows), ids, columns or {})
    nested = tuple(sorted({*(dims or ()), rows.shape[1]}))
    if nested[-1] > rows.shape[1]:
        raise UsageError(f"dims {list(dims or ())} exceed the vectors' {rows.shape[1]}; drop {nested[-1]}")
    kind, covered = shortlist or "flat", (nested[:-1] or nested) if shortlist else ()
    SHORTLISTS.get(kind)
    folder = tempfile.TemporaryDirectory(prefix="lookalike-array-")
    meta = ShardMeta(num_rows=len(rows), row_offset=0, dims=nested, shortlist=kind, shortlist_dims=covered)
    places = np.arange(len(rows))
    batches = ((places[part], rows[part]) for part in row_slices(len(rows), BATCH_ROWS))
    meta = write_store(folder.name, meta, table, batches)
    store = PrefixStore(folder.name, meta)
    for dim in covered:
        built = build_shortlist(kind, store.unit_prefix(dim), ShortlistOptions())
        built.save(f"{folder.name}/{shortlist_name(dim, kind)}")
    names = tuple(table.column_names)
    index = IndexMeta(
        num_rows=len(rows),
        dims=nested,
        shards=("shard-00000",),
        shard_rows=(len(rows),),
        dtype=meta.dtype,
        shortlist=kind,
        shortlist_dims=covered,
        columns=names,
        encoder=EncoderRef(fingerprint=MODEL, external=True),
    )
    return index, ArrayShard(store, folder)


def _check_vectors(vectors: npt.ArrayLike) -> Floats:
    rows = arguments.to_float32("vectors", arguments.check_array("vectors", vectors))
    if rows.ndim != 2 or 0 in rows.shape:
        raise UsageError(f"vectors have shape {list(rows.shape)}; give one or more rows of equal size, [n, D]")
    norms = np.linalg.norm(rows, axis=1)
    if len(bad := np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))):
        raise UsageError(
            f"vectors[{bad[0]}] holds NaN or infinity, or is all zeros, as {len(bad)} of {len(rows)} rows; "
            "leave them out"
        )
    return rows


def _make_table(num_rows: int, ids: Sequence[str] | None, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    names = [str(row) for row in range(num_rows)] if ids is None else arguments.list_texts("ids", ids)
    found: dict[str, Sequence[Any]] = {"image_id": names}
    for name, values in columns.items():
        if name == "image_id":
            raise UsageError("the column 'image_id' holds the ids; give them as ids")
        found[name] = values
    for name, values in found.items():
        if isinstance(values, str) or len(values) != num_rows:
            shown = arguments.show(values) if isinstance(values, str) else f"{len(values)} values"
            raise ArgumentError(f"{name}: {shown} for {num_rows} vectors; give one each")
        if wrong := [value for value in values if not isinstance(value, str | None)]:
            raise ArgumentError(f"{name} holds {arguments.show(wrong[0])}; give texts")
    if len(set(names)) < num_rows:
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise UsageError(f"the id {arguments.show(twice)} stands twice; ids are unique")
    return pa.table({name: pa.array(list(values), pa.string()) for name, values in found.items()})
