"""Inputs of other projects' bug reports; each is named beside its case."""

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lookalike.data.corpus import CorpusConfig
from lookalike.errors import CorpusError
from lookalike.vision.images import decode
from tests.data.odd_sources import picture
from tests.data.test_corpus import run_here


class Told(NamedTuple):
    """What became of a source: ids that were kept, reasons by id, files passed over, and a part of the details."""

    kept: list[str]
    refused: list[tuple[str | None, str]]
    passed_over: dict[str, int]
    words: str = ""


def tar(folder: Path, members: list[tuple[str, bytes]]) -> dict[str, str]:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return {"uri": f"{folder}/a.tar", "format": "webdataset"}


def dots_in_a_folder(folder: Path) -> dict[str, Any]:
    return tar(folder, [("some/22.0/1.png", picture(1)), ("some/22.0/2.png", picture(2))])


def dots_in_names(folder: Path) -> dict[str, Any]:
    members = [("22.05.png", picture(1)), ("Track 2.0 (Clean).jpg", picture(2)), ("ok.png", picture(3))]
    return tar(folder, members)


def keys_that_are_not_adjacent(folder: Path) -> dict[str, Any]:
    return tar(folder, [("0.png", picture(0)), ("1.png", picture(1)), ("0.txt", b"a"), ("1.txt", b"b")])


def a_table_of_another_name(folder: Path) -> dict[str, Any]:
    (folder / "metadata1000.jsonl").write_text('{"file_name": "0.png"}')
    (folder / "0.png").write_bytes(picture(0))
    return {"uri": str(folder), "format": "folder"}


def images_without_a_row(folder: Path) -> dict[str, Any]:
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png"}\n{"file_name": "gone.png"}')
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    return {"uri": str(folder), "format": "folder"}


def empty_packed_files(folder: Path) -> dict[str, Any]:
    (folder / "a.png").write_bytes(picture(1))
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(b'{"image_id": "1", "image_uri": "a.png"}\n'))
    (folder / "3.jsonl").write_bytes(b"")
    return {"uri": str(folder), "format": "jsonl"}


def pattern_signs_in_paths(folder: Path) -> dict[str, Any]:
    place = folder / "br[1] {x} a*b 100%41 q? #1 ~"
    place.mkdir()
    (place / "rows[0].jsonl").write_text('{"image_id": "1", "image_uri": "i[0]*?.png"}')
    (place / "i[0]*?.png").write_bytes(picture(1))
    return {"uri": f"{place}/rows[0].jsonl", "format": "jsonl"}


def rows_of_failed_downloads(folder: Path) -> dict[str, Any]:
    table = pa.table({"key": ["0", "1", "2"], "jpg": pa.array([picture(1), None, picture(2)[:40]], pa.binary())})
    table = table.append_column("error_message", pa.array([None, "HTTP Error 404", None]))
    pq.write_table(table, folder / "a.parquet")
    return {"uri": f"{folder}/a.parquet", "format": "parquet", "columns": {"image_id": "key", "image": "jpg"}}


REPORTS: list[tuple[Callable[[Path], dict[str, Any]], Told]] = [
    # huggingface/datasets 7150
    (dots_in_a_folder, Told(["some/22.0/1", "some/22.0/2"], [], {})),
    # webdataset/webdataset 237, huggingface/datasets 7144
    (dots_in_names, Told(["ok"], [("22", "null"), ("Track 2", "null")], {}, "rename such files")),
    # ray-project/ray 65044
    (keys_that_are_not_adjacent, Told(["0", "1"], [("0", "scattered_key"), ("1", "scattered_key")], {}, "--sort=name")),
    # huggingface/datasets 6777
    (a_table_of_another_name, Told(["0.png"], [], {".jsonl": 1})),
    # huggingface/datasets 4311
    (images_without_a_row, Told(["1.png"], [("gone.png", "not_found")], {".png": 2}, "gone.png")),
    # ray-project/ray 47378
    (empty_packed_files, Told(["1"], [(None, "no_records"), (None, "no_records")], {".png": 1}, "fill or remove it")),
    # fsspec/filesystem_spec 838 and 1476
    (pattern_signs_in_paths, Told(["1"], [], {})),
    # rom1504/img2dataset 224, huggingface/datasets 6470
    (rows_of_failed_downloads, Told(["0"], [("1", "null"), ("2", "not_an_image")], {})),
]


@pytest.mark.parametrize(("write", "told"), REPORTS)
def test_what_others_lost_is_kept_or_told(tmp_path: Path, write: Callable[[Path], dict[str, Any]], told: Told) -> None:
    (tmp_path / "in").mkdir()
    config = CorpusConfig.model_validate({"sources": [{"dataset": "d", **write(tmp_path / "in")}]})
    rows, stats, quarantine = run_here(config, f"{tmp_path}/out")
    assert [row["image_id"] for row in rows] == told.kept
    assert [(row["image_id"], row["reason"]) for row in quarantine] == told.refused
    assert stats["passed_over"] == told.passed_over
    assert stats["records"] == len(told.kept) + len(told.refused)
    assert all(told.words in row["detail"] for row in quarantine)


def test_an_archive_of_dotted_names_alone_says_so(tmp_path: Path) -> None:
    source = tar(tmp_path, [("x/22.05.png", picture(1)), ("x/22.06.png", picture(2))])
    config = CorpusConfig.model_validate({"sources": [{"dataset": "d", **source}]})
    with pytest.raises(CorpusError, match=r"a key ends at the first dot .* so \.05\.png is a member; .* rename"):
        run_here(config, f"{tmp_path}/out")


def test_gray_of_16_bits_is_scaled_and_transparency_of_one_bit_is_white() -> None:
    gray = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16  # python-pillow/Pillow 2574, 3796 and 6765
    sink = io.BytesIO()
    Image.fromarray(gray).save(sink, "PNG")
    red = np.asarray(decode(sink.getvalue()))[..., 0]
    np.testing.assert_allclose(red, gray / 257, atol=1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 2, 1, 0, 0, 0, 0))  # python-pillow/Pillow 9281
    rows = chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))  # a white one and a black one
    for hidden, black in ((0, 255), (1, 0)):
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", bytes([0, hidden])) + rows + chunk(b"IEND", b"")
        assert np.asarray(decode(data))[..., 0].tolist() == [[255] * 8, [black] * 8]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
