"""Metadata of rows, as the prefix store reads it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lookalike.retrieval.shard_meta import ROWS_FILE, ShardMeta
from lookalike.retrieval.store import PrefixStore
from lookalike.retrieval.store_writer import write_store


@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_are_read_as_the_table_holds_them(tmp_path: Path, chunks: int) -> None:
    values = {"image_id": ["a", "b", "c"], "title": [None, "two", "three"], "year": [1, None, 3]}
    table = pa.concat_tables([pa.table(values).slice(n * 3 // chunks, 3 // chunks) for n in range(chunks)])
    meta = ShardMeta(num_rows=3, row_offset=0, dims=(2,), shortlist_dims=())
    store = PrefixStore(str(tmp_path), write_store(str(tmp_path), meta, table, [(np.arange(3), np.eye(3, 2) + 1)]))
    with pa.OSFile(f"{tmp_path}/{ROWS_FILE}", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    del store.table
    assert len(store.table.to_batches()) == chunks
    assert store.read_rows(np.array([2, 0])) == [
        {"image_id": "c", "title": "three", "year": "3"},
        {"image_id": "a", "year": "1"},
    ]
    assert store.read_rows(np.array([1]), ["title"]) == [{"title": "two"}]
