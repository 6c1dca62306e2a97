import io
import struct
import zlib
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from lookalike.data.records import Limits, Origin, check_records, count_reasons, resolve_columns
from lookalike.errors import CorpusError

LIMITS = Limits(max_bytes=100_000, max_pixels=1_000_000, min_side_px=4)
ORIGIN = Origin("file.parquet", 0, 0, "set", 0.0, 1)


def png(size: tuple[int, int] = (16, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 59 bytes whose header promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def check(table: pa.Table, repeated: dict[str, int] | None = None, origin: Origin = ORIGIN) -> tuple[Any, Any]:
    columns = resolve_columns({}, table.schema, "source")
    checked = check_records(table, columns, origin, limits=LIMITS, repeated=repeated or {})
    return checked.accepted.to_pylist(), [(r["row"], r["field"], r["reason"]) for r in checked.quarantine.to_pylist()]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (None, "null"), (b"hello world", "not_an_image"), (png()[:60], "truncated"),
     (bomb(), "too_large"), (b"x" * 100_001, "too_many_bytes"), (png((20, 2)), "too_small")],
)  # fmt: skip
def test_bad_images_are_quarantined_with_the_reason(data: bytes | None, reason: str) -> None:
    accepted, problems = check(pa.table({"image_id": ["good", "bad"], "image": pa.array([png(), data], pa.binary())}))
    assert [row["image_id"] for row in accepted] == ["good"]
    assert (accepted[0]["width"], accepted[0]["height"]) == (16, 12)
    assert problems == [(1, "image", reason)]


def test_null_and_repeated_ids_are_refused_and_the_first_stays() -> None:
    table = pa.table({"image_id": ["a", None, "", "a", "b"], "image": [png()] * 5})
    accepted, problems = check(table, {"a": 0})
    assert [row["image_id"] for row in accepted] == ["a", "b"]
    assert problems == [(1, "image_id", "null"), (2, "image_id", "null"), (3, "image_id", "duplicate")]


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_titles_that_are_empty_or_not_utf8_are_repaired_and_reported(kind: pa.DataType) -> None:
    titles = pa.array([b"ok", b"\xff\xfe", b"", None], pa.binary())
    if kind == pa.string():  # invalid bytes behind a string type, as careless writers leave them
        titles = pa.Array.from_buffers(pa.string(), 4, titles.buffers())
    accepted, problems = check(pa.table({"image_id": list("abcd"), "image": [png()] * 4, "title": titles}))
    assert [row["title"] for row in accepted] == ["ok", "", "", ""]
    assert problems == [(1, "title", "repaired: not_utf8"), (2, "title", "repaired: empty"),
                        (3, "title", "repaired: empty")]  # fmt: skip


def test_no_title_column_is_no_problem() -> None:
    accepted, problems = check(pa.table({"image_id": ["a"], "image": [png()]}))
    assert accepted[0]["title"] is None
    assert problems == []


def test_types_are_brought_into_form() -> None:
    group = pa.array(["g"]).dictionary_encode()
    table = pa.table({"image_id": [7], "image": [png()], "keywords": ["red, sofa,"], "group": group})
    accepted, _ = check(table)
    assert (accepted[0]["image_id"], accepted[0]["keywords"], accepted[0]["group"]) == ("7", ["red", "sofa"], "g")


def test_split_of_a_group_is_one_and_by_hash() -> None:
    ids = [f"i{n}" for n in range(400)]
    table = pa.table({"image_id": ids, "image": [png()] * 400, "group": [f"g{n // 4}" for n in range(400)]})
    accepted, _ = check(table, origin=ORIGIN._replace(test_fraction=0.3))
    split_of = {}
    for row in accepted:
        assert split_of.setdefault(row["group"], row["split"]) == row["split"]
    assert 15 <= sum(split == "test" for split in split_of.values()) <= 45


def test_a_split_keeps_its_own_name() -> None:
    accepted, problems = check(pa.table({"image_id": ["a"], "image": [png()], "split": ["catalog"]}))
    assert ([row["split"] for row in accepted], problems) == (["catalog"], [])


@pytest.mark.parametrize(
    ("mapping", "columns", "words"),
    [({"titel": "t"}, ["image_id", "image"], "did you mean 'title'"),
     ({"title": "nam"}, ["image_id", "image", "name"], "'nam', mapped to 'title', is absent .did you mean 'name'"),
     ({}, ["id", "image"], "required field 'image_id'; the file has id, image")],
)  # fmt: skip
def test_wrong_columns_name_what_exists_and_the_remedy(mapping: dict[str, str], columns: list[str], words: str) -> None:
    schema = pa.schema([(name, pa.binary() if name == "image" else pa.string()) for name in columns])
    with pytest.raises(CorpusError, match=words):
        resolve_columns(mapping, schema, "source s")


def test_a_column_of_an_impossible_type_is_refused() -> None:
    schema = pa.schema([("image_id", pa.string()), ("image", pa.list_(pa.int32()))])
    with pytest.raises(CorpusError, match="'image' needs binary"):
        resolve_columns({}, schema, "s")


def test_reasons_are_counted() -> None:
    table = pa.table({"image_id": list("abc"), "image": pa.array([b"", b"", b"zz"], pa.binary())})
    checked = check_records(table, resolve_columns({}, table.schema, "s"), ORIGIN, limits=LIMITS, repeated={})
    assert count_reasons(checked.quarantine) == {"image: empty": 2, "image: not_an_image": 1}
