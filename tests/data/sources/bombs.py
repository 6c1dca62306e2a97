"""Small files that unpack to a lot: each function writes one and returns its reader's format and settings."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Written = tuple[str, dict[str, Any]]
BLOCK = 1 << 20


def csv_cells(path: Path, megabytes: int) -> Written:
    """A row of empty cells without end, then a good one."""
    with gzip.open(path, "wb", 1) as file:
        file.write(b"image_id,image_uri\n")
        for _ in range(megabytes):
            file.write(b"," * BLOCK)
        file.write(b"\nlast,x.png\n")
    return "csv", {}


def csv_quote(path: Path, megabytes: int) -> Written:
    """A quote that is never closed, over many lines."""
    with gzip.open(path, "wb", 1) as file:
        file.write(b'image_id,image_uri\n"a')
        for _ in range(megabytes):
            file.write((b"b" * 127 + b"\n") * (BLOCK // 128))
    return "csv", {}


def csv_rows(path: Path, megabytes: int) -> Written:
    """Rows of 4 MB each."""
    with gzip.open(path, "wb", 1) as file:
        file.write(b"image_id,image_uri,title\n")
        for number in range(megabytes // 4):
            file.write(b"%d,x.png,%s\n" % (number, b"t" * (4 * BLOCK - 100)))
    return "csv", {}


def csv_header(path: Path, megabytes: int) -> Written:
    """A first line without end."""
    with gzip.open(path, "wb", 1) as file:
        for _ in range(megabytes):
            file.write(b"a" * BLOCK)
    return "csv", {}


def json_line(path: Path, megabytes: int) -> Written:
    """A line of nested lists, then a good one."""
    with gzip.open(path, "wb", 1) as file:
        file.write(b'{"image_id": "first", "image_uri": "x.png"}\n{"a": [')
        for _ in range(megabytes):
            file.write(b"[]," * (BLOCK // 3))
        file.write(b'1]}\n{"image_id": "last", "image_uri": "x.png"}\n')
    return "jsonl", {}


def json_array(path: Path, megabytes: int) -> Written:
    """An array of one value without end."""
    with gzip.open(path, "wb", 1) as file:
        file.write(b'[{"image_id": "first", "image_uri": "x.png"}, {"a": [')
        for _ in range(megabytes):
            file.write(b"[]," * (BLOCK // 3))
    return "jsonl", {}


def tar_texts(path: Path, megabytes: int) -> Written:
    """A record with many long members, then a good one."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for number in range(megabytes // 8):
            _member(tar, f"a.t{number}", bytes(8 * BLOCK))
        _member(tar, "last.png", b"x")
    return "webdataset", {}


def tar_images(path: Path, megabytes: int) -> Written:
    """Images of 16 MB each."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for number in range(megabytes // 16):
            _member(tar, f"{number}.png", bytes(16 * BLOCK))
    return "webdataset", {}


def tar_header(path: Path, megabytes: int) -> Written:
    """A name that takes a header without end."""
    with tarfile.open(path, "w:gz", compresslevel=1, format=tarfile.PAX_FORMAT) as tar:
        _member(tar, "first.png", b"x")
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {"path": "p" * (megabytes * BLOCK)}
        tar.addfile(info)
    return "webdataset", {}


def parquet_dictionary(path: Path, megabytes: int) -> Written:
    """Rows that share one long text."""
    text, rows = "x" * (megabytes * BLOCK // 256), 256
    ids = pa.array([f"i{number}" for number in range(rows)])
    titles = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    table = pa.table({"image_id": ids, "image_uri": ids, "title": titles.cast(pa.string())})
    pq.write_table(table, path, compression="zstd")
    return "parquet", {}


def parquet_list(path: Path, megabytes: int) -> Written:
    """A row with a list of many empty texts, between others."""
    words = [["a"], [""] * (megabytes * BLOCK // 16), ["b"]]
    ids = pa.array(["first", "middle", "last"])
    table = pa.table({"image_id": ids, "image_uri": ids, "keywords": pa.array(words, pa.list_(pa.string()))})
    pq.write_table(table, path, compression="zstd")
    return "parquet", {}


def parquet_rows(path: Path, megabytes: int) -> Written:
    """More rows than any file of its size may claim: the same row again and again."""
    rows = megabytes * BLOCK // 8
    column = pa.array([b"x"]).take(pa.array([0]).take(pa.nulls(rows, pa.int64()).fill_null(0)))
    pq.write_table(pa.table({"image_id": column, "image_uri": column}), path, compression="zstd")
    return "parquet", {}


def lance_text(path: Path, megabytes: int) -> Written:
    """Rows of a Lance data set that share one long text."""
    import lance

    rows = 256
    ids = pa.array([f"i{number}" for number in range(rows)])
    titles = pa.array(["x" * (megabytes * BLOCK // rows)] * rows, pa.large_string())
    lance.write_dataset(pa.table({"image_id": ids, "image_uri": ids, "title": titles}), str(path))
    return "lance", {}


def _member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


BOMBS: dict[str, Callable[[Path, int], Written]] = {
    "cells.csv.gz": csv_cells,
    "quote.csv.gz": csv_quote,
    "header.csv.gz": csv_header,
    "rows.csv.gz": csv_rows,
    "line.jsonl.gz": json_line,
    "array.jsonl.gz": json_array,
    "texts.tar.gz": tar_texts,
    "images.tar.gz": tar_images,
    "header.tar.gz": tar_header,
    "dictionary.parquet": parquet_dictionary,
    "list.parquet": parquet_list,
    "rows.parquet": parquet_rows,
}
