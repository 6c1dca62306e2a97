"""Readers: the same records whatever the format, wherever the cuts fall, and damage that is told, not swallowed."""

import csv
import gzip
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike import storage
from lookalike.data.sources import SOURCE_FORMATS, RecordSource
from lookalike.data.sources.image_fetch import fetch_images
from lookalike.data.sources.parquet import cut_groups
from lookalike.data.sources.reader import UNREADABLE, Reader
from lookalike.data.sources.tables import open_buffered, read_lines
from lookalike.data.sources.webdataset import group_members, read_members
from lookalike.entries import walk
from lookalike.errors import CorpusError, UsageError
from lookalike.vision.images import ImageError

ROWS = [
    {
        "image_id": f"id-{n:03d}",
        "image": f"bytes {n}".encode(),
        "title": f'title {n}, "quoted"\nline',
        "file_name": f"{'ab'[n % 2]}/{n:03d}.png",
    }
    for n in range(37)
]
Write = Callable[[str], None]


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path)
        return
    yield "memory://sources"
    fsspec.filesystem("memory").store.clear()


def put(uri: str, content: bytes) -> str:
    fs, path = storage.resolve(uri)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, content)
    return uri


def reader(uri: str, kind: str, **settings: Any) -> Reader:
    source = RecordSource.model_validate({"uri": uri, "format": kind, "dataset": "d", **settings})
    return SOURCE_FORMATS.get(kind)(source, 1000)


def read(uri: str, kind: str, rows_per_part: int = 1000, **settings: Any) -> list[dict[str, Any]]:
    """All records of a source, read unit by unit as tasks do (a unit goes through JSON), with images fetched."""
    opened = reader(uri, kind, **settings)
    units = [unit for file in opened.files() for unit in opened.units(file, rows_per_part)]
    records = [record for unit in units for record in opened.read(json.loads(json.dumps(unit)))]
    fetch_images(records, opened.base, 1000)
    return records


def text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def write_parquet(rows: list[dict[str, Any]], row_group: int = 10) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=row_group)
    return sink.getvalue()


def write_csv(rows: list[dict[str, Any]]) -> bytes:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


def write_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_tar(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def images(root: str) -> None:
    for row in ROWS:
        put(f"{root}/{row['file_name']}", row["image"])


def table_rows() -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("image_id", "title", "file_name")} for row in ROWS]


def as_parquet(root: str) -> dict[str, Any]:
    half = len(ROWS) // 2
    put(f"{root}/one.parquet", write_parquet(ROWS[:half]))
    put(f"{root}/two.parquet", write_parquet(ROWS[half:]))
    return {"uri": root, "kind": "parquet"}


def as_struct(root: str) -> dict[str, Any]:
    rows = [
        {"meta": {"id": row["image_id"], "title": row["title"]}, "image": {"bytes": row["image"], "path": "x.png"}}
        for row in ROWS
    ]
    return {
        "uri": put(f"{root}/hf.parquet", write_parquet(rows)),
        "kind": "parquet",
        "columns": {"image_id": "meta.id", "title": "meta.title"},
    }


def as_struct_of_paths(root: str) -> dict[str, Any]:
    images(root)
    rows = [{**row, "image": {"bytes": None, "path": row["file_name"]}} for row in ROWS]
    return {"uri": put(f"{root}/hf.parquet", write_parquet(rows)), "kind": "parquet"}


def as_uris(root: str) -> dict[str, Any]:
    images(f"{root}/pictures")
    uri = put(f"{root}/tables/rows.parquet", write_parquet(table_rows()))
    return {"uri": uri, "kind": "parquet", "columns": {"image_uri": "file_name"}, "base_uri": f"{root}/pictures"}


def as_table(
    name: str, write: Callable[[list[dict[str, Any]]], bytes], kind: str, **columns: str
) -> Callable[[str], dict[str, Any]]:
    """A table of one file, beside the images that it names; a ``folder`` is read as such."""

    def build(root: str) -> dict[str, Any]:
        images(root)
        uri = put(f"{root}/{name}", write(table_rows()))
        return {"uri": root if kind == "folder" else uri, "kind": kind, "columns": columns}

    return build


def nested_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return write_jsonl([{**row, "title": None, "meta": {"title": row["title"]}} for row in rows])


def packed_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress(write_jsonl(rows))


def as_webdataset(root: str) -> dict[str, Any]:
    members = []
    for row in ROWS:
        members += [
            (f"x/{row['image_id']}.json", json.dumps({"image_id": row["image_id"]}).encode()),
            (f"x/{row['image_id']}.PNG", row["image"]),
            (f"x/{row['image_id']}.txt", row["title"].encode()),
        ]
    put(f"{root}/shard-0.tar", write_tar(members[:30]))
    put(f"{root}/shard-1.tar.gz", write_tar(members[30:], "w:gz"))
    return {"uri": root, "kind": "webdataset"}


LAYOUTS = [
    as_parquet,
    as_struct,
    as_struct_of_paths,
    as_uris,
    as_webdataset,
    JSONL := as_table("rows.jsonl", nested_jsonl, "jsonl", image_uri="file_name", title="meta.title"),
    as_table("rows.jsonl.gz", packed_jsonl, "jsonl", image_uri="file_name"),
    as_table("rows.csv", write_csv, "csv", image_uri="file_name"),
    as_table("metadata.jsonl", write_jsonl, "folder"),
    as_table("metadata.csv", write_csv, "folder"),
    METADATA := as_table("metadata.parquet", write_parquet, "folder"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows_per_part", [1, 7, 1000])
def test_every_format_gives_the_same_records_for_any_cuts(
    root: str, layout: Callable[[str], dict[str, Any]], rows_per_part: int
) -> None:
    records = read(**layout(root), rows_per_part=rows_per_part)
    got = [(text(r["image_id"]), r["image"], text(r["title"])) for r in records]
    assert got == [(row["image_id"], row["image"], row["title"]) for row in ROWS]


def test_units_are_about_as_large_as_asked(root: str) -> None:
    for number, layout in enumerate((as_parquet, JSONL, METADATA)):
        where = layout(f"{root}/{number}")
        opened = reader(where.pop("uri"), where.pop("kind"), **where)
        sizes = [len(list(opened.read(unit))) for file in opened.files() for unit in opened.units(file, 6)]
        assert sum(sizes) == len(ROWS)
        assert max(sizes) <= 12


def test_lance(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    uri = f"{tmp_path}/rows.lance"
    lance.write_dataset(pa.Table.from_pylist(ROWS), uri, max_rows_per_file=10)
    before = reader(uri, "lance")
    units = [unit for file in before.files() for unit in before.units(file, 8)]
    lance.write_dataset(pa.Table.from_pylist(ROWS[:1]), uri, mode="append")  # later than the plan: not read
    records = [record for unit in units for record in before.read(unit)]
    assert [(text(r["image_id"]), r["image"]) for r in records] == [(r["image_id"], r["image"]) for r in ROWS]
    with pytest.raises(CorpusError, match="not a readable Lance data set"):
        read(f"{tmp_path}/absent.lance", "lance")


def test_a_damaged_lance_data_set_is_told_whatever_its_library_raises(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    uri = f"{tmp_path}/rows.lance"
    lance.write_dataset(pa.Table.from_pylist(ROWS), uri)
    for file in sorted(path for path in Path(uri).rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for damage in (b"", whole[:-20], whole[:-24] + b"\x99" * 8 + whole[-16:], b"\xff" * len(whole)):
            file.write_bytes(damage)
            try:
                read(uri, "lance")
            except CorpusError as error:
                assert "not a readable Lance data set" in str(error)  # noqa: PT017
        file.write_bytes(whole)
    assert len(read(uri, "lance")) == len(ROWS)


def test_lance_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lance", None)
    with pytest.raises(UsageError, match=r"pip install 'lookalike\[lance\]'"):
        read(f"{tmp_path}/rows.lance", "lance")


def test_a_folder_without_a_table_is_its_images(root: str) -> None:
    for name in ("b/2.jpg", "a/x/1.PNG", "c.gif", "a-b/0.webp", "d::e.jpg", "notes.txt", ".hidden/3.jpg", "a/.4.jpg"):
        put(f"{root}/{name}", name.encode())
    for rows_per_part in (1, 2, 100):
        records = read(root, "folder", rows_per_part)
        assert [(r["image_id"], r.get("category"), r["image"].decode()) for r in records] == [
            ("a/x/1.PNG", "a/x", "a/x/1.PNG"),
            ("a-b/0.webp", "a-b", "a-b/0.webp"),
            ("b/2.jpg", "b", "b/2.jpg"),
            ("c.gif", None, "c.gif"),
            ("d::e.jpg", None, "d::e.jpg"),
        ]
    mapped = read(root, "folder", columns={"group": "folder"})
    assert [r["group"] for r in mapped if "group" in r] == ["a/x", "a-b", "b"]


names = st.lists(st.sampled_from(["a", "b", "a-", "c.d", "Z"]), min_size=1, max_size=4).map("/".join)


@settings(max_examples=60)
@given(st.sets(names, min_size=1, max_size=12), st.integers(1, 5))
def test_ranges_of_a_walk_cover_each_file_once(paths: set[str], size: int) -> None:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    files = sorted(name + ".x" for name in paths)
    for name in files:
        fs.pipe_file(f"/walk/{name}", b"")
    whole = [entry.name for entry in walk(fs, "/walk")]
    assert whole == sorted(files, key=lambda name: name.split("/"))
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert [entry.name for piece in pieces for entry in walk(fs, "/walk", piece[0], piece[-1])] == whole


@settings(max_examples=200)
@given(
    st.lists(st.binary(max_size=6).filter(lambda line: b"\n" not in line and b"\r" not in line), max_size=8),
    st.booleans(),
    st.sets(st.integers(1, 40), max_size=6),
)
def test_byte_ranges_split_a_file_into_its_lines(lines: list[bytes], ended: bool, cuts: set[int]) -> None:
    content = b"\n".join(lines) + (b"\n" if ended else b"")
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    got = [line for start, stop in pairwise(edges) for line in read_lines(io.BytesIO(content), start, stop)]
    assert got == content.splitlines()


@settings(max_examples=200)
@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 12))
def test_row_groups_are_cut_without_gap_or_overlap(sizes: list[int], rows_per_part: int) -> None:
    ranges = list(cut_groups(sizes, rows_per_part))
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(sum(sizes)))
    assert all(0 < stop - start <= 2 * rows_per_part for start, stop in ranges)


def test_broken_lines_are_records_with_a_reason(root: str) -> None:
    good = b'{"image_id": "a", "image_uri": "x"}'
    deep = b"[" * 90
    lines = [good, b"{not json", b"[1, 2]", b"", b"   ", b'{"image_id": "' + b"y" * 1000 + b'"}', deep, good]
    for kept in range(2):
        uri = put(f"{root}/{kept}.jsonl", b"\n".join(lines) + b"\r\n" * kept)
        records = read(uri, "jsonl", rows_per_part=1, bounds={"max_record_bytes": 100})
        assert [r.get(UNREADABLE) for r in records] == [None, "not_json", "not_an_object", "too_long", "not_json", None]


def test_broken_csv_rows_are_records_with_a_reason(root: str) -> None:
    body = b'image_id,image_uri\na,x\nb\n"c"d,x\n\nd,x,y\ne,\n"open,x\nf,x\n'
    records = read(put(f"{root}/rows.csv", body), "csv")
    reasons = [r.get(UNREADABLE) for r in records]
    assert reasons == [None, "wrong_number_of_cells", "not_csv", "wrong_number_of_cells", None, "open_quote", None]
    assert records[4]["image_id"] == "e"


def test_separators_and_byte_order_marks(root: str) -> None:
    uri = put(f"{root}/rows.tsv", "\ufeffimage_id\timage_uri\na,b\tx\n".encode())
    assert read(uri, "csv")[0]["image_id"] == "a,b"


@pytest.mark.parametrize("cut", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_tar_keeps_what_is_whole_and_says_so(root: str, cut: float, packed: bool) -> None:
    members = [(f"{n}.{kind}", bytes([n]) * 700) for n in range(20) for kind in ("png", "cls")]
    data = write_tar(members, "w:gz" if packed else "w")
    whole = len(data) if packed else 40 * 1536  # without the zero blocks at the end
    records = read(put(f"{root}/a.tar", data[: int(whole * cut)]), "webdataset")
    assert [r.get(UNREADABLE) for r in records] == [None] * (len(records) - 1) + ["damaged_archive"]
    assert all(r["image"] == bytes([n]) * 700 for n, r in enumerate(records[:-1]))
    assert packed or len(records) > 20 * cut - 3


def test_a_tar_cut_between_members_or_damaged_inside_is_not_taken_for_its_end(root: str) -> None:
    data = write_tar([(f"{n}.png", bytes(512)) for n in range(6)])
    cut = read(put(f"{root}/cut.tar", data[: 3 * 1024]), "webdataset")
    assert [UNREADABLE in r for r in cut] == [False, False, True]
    noise = bytearray(data)
    noise[3 * 1024 : 3 * 1024 + 512] = b"\x07" * 512
    assert [UNREADABLE in r for r in read(put(f"{root}/noise.tar", bytes(noise)), "webdataset")][-1]
    assert [r.get(UNREADABLE) for r in read(put(f"{root}/text.tar", b"no tar " * 500), "webdataset")] == [
        "damaged_archive"
    ]


def test_members_of_a_webdataset_record(root: str) -> None:
    members = [
        ("a.b/1.jpg", b"jpg"),
        ("a.b/1.json", b'{"title": "t", "image": "no", "m": {"k": 1}}'),
        ("a.b/1.seg.png", b"mask"),
        ("a.b/2.webp", b"x" * 5000),
        ("a.b/2.cls", b"7"),
        ("a.b/3.txt", b"alone"),
        ("a.b/4.jpg", b"jpg"),
        ("a.b/4.json", b"{"),
    ]
    records = read(put(f"{root}/a.tar", write_tar(members)), "webdataset", columns={"group": "m.k"})
    assert records[0] == {"image_id": "a.b/1", "image": b"jpg", "title": "t", "group": 1}
    assert (len(records[1]["image"]), records[1]["category"]) == (1001, b"7")  # cut at the limit, to be refused
    assert (records[2]["image"].reason, "--sort=name" in str(records[2]["image"])) == ("null", True)
    assert (records[3][UNREADABLE], records[3]["image_id"]) == ("not_json", "a.b/4")


def test_images_are_fetched_or_the_reason_is_told(root: str) -> None:
    put(f"{root}/in/a.png", b"x" * 50)
    put(f"{root}/in/b c#.png", b"y")
    wanted = [
        "a.png",
        "./a.png",
        f"{root}/in/a.png",
        "b c#.png",
        "gone.png",
        "../in/a.png",
        "zz://a/b",
        b"\xff",
        "",
        None,
    ]
    records: list[dict[str, Any]] = [{"image_uri": uri} for uri in wanted]
    records.append({"image": b"own", "image_uri": "gone.png"})
    fetch_images(records, f"{root}/in", 20)
    got = [r.get("image").reason if isinstance(r.get("image"), ImageError) else r.get("image") for r in records]
    assert got == [b"x" * 21] * 3 + [b"y", "not_found", "bad_uri", "bad_uri", "bad_uri", None, None, b"own"]


def test_a_store_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        calls = 0

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            Failing.calls += 1
            if path == "flaky" and Failing.calls > 1:
                return b"late"
            raise RuntimeError("503")

    monkeypatch.setattr("lookalike.storage.resolve", lambda uri: (Failing(), uri.rpartition("/")[2]))
    records: list[dict[str, Any]] = [{"image_uri": "flaky"}]
    fetch_images(records, "memory://s", 20)
    assert records[0]["image"] == b"late"
    records = [{"image_uri": "dead"}]
    Failing.calls = 0
    fetch_images(records, "memory://s", 20)
    assert (records[0]["image"].reason, Failing.calls) == ("unreachable", 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": {"titel": "t"}}, "did you mean 'title'"),
        ({"columns": {"attributes": {" ": "t"}}}, "names 'attributes. ', which is not a corpus field"),
        ({"constants": {"image": "t"}}, "names 'image', which is"),
        ({"format": "parket"}, "did you mean 'parquet'"),
        ({"colums": {}}, "colums"),
        ({"dataset": ".."}, "should match pattern"),
        ({"dataset": "a/b"}, "should match pattern"),
    ],
)
def test_a_wrong_recipe_is_explained(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RecordSource.model_validate({"uri": "x", "dataset": "d", **settings})


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        (
            "a.jsonl",
            b'{"image_id": 1, "image_uri": "u", "m": {"titl": 2}}\n',
            "jsonl",
            "'m.title', mapped to 'title', is",
        ),
        ("a.csv", b"id,m.title\n1,2\n", "csv", "no column for the required field 'image_id'; the file has id, m.title"),
        ("a.tar", write_tar([("1.jpg", b"")]), "webdataset", "'m.title', mapped to 'title', is absent"),
        ("a.parquet", b"nonsense", "parquet", "not a readable parquet file"),
        (
            "a.parquet",
            write_parquet([{"image_id": "a"}]).replace(b"image_id", b"image\xff\xfed"),
            "parquet",
            "not a readable parquet file .*codec",
        ),
        ("a.txt", b"", "jsonl", "has no jsonl file.*names end in .jsonl"),
    ],
)
def test_sources_that_do_not_fit_are_refused_before_any_work(
    root: str, name: str, content: bytes, kind: str, words: str
) -> None:
    put(f"{root}/{name}", content)
    with pytest.raises(CorpusError, match=words):
        read(root, kind, columns={"title": "m.title"})


@pytest.mark.parametrize(
    ("field", "kind", "words"),
    [
        ("image", pa.list_(pa.int32()), "needs binary, or a struct"),
        ("title", pa.list_(pa.string()), "needs a string"),
        ("keywords", pa.int32(), "needs a list of strings"),
        ("image_uri", pa.int32(), "needs a string"),
        ("annotations", pa.list_(pa.int8()), "needs a list of structs .term, score"),
        ("interactions", pa.float32(), "needs a list of structs .term, weight"),
        ("attributes", pa.int32(), "needs a list of structs .name, value"),
        ("attributes", pa.list_(pa.string()), "needs a list of structs .name, value"),
        ("attributes", pa.list_(pa.struct([("term", pa.string())])), "needs a list of structs .name, value"),
        ("attributes.colour", pa.map_(pa.string(), pa.int8()), "needs a string or a list of strings"),
    ],
)
def test_a_column_that_cannot_hold_its_field_is_refused(root: str, field: str, kind: pa.DataType, words: str) -> None:
    columns = {"image_id": ["a"], "image": [b""], "image_uri": ["u"]} | {field: pa.array([None], kind)}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    with pytest.raises(CorpusError, match=rf"column '{field}' is .*the field '{field}' {words}"):
        read(put(f"{root}/a.parquet", sink.getvalue()), "parquet", columns={field: field})


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_columns_are_gathered_from_tables_without_a_schema(root: str, kind: str) -> None:
    content = {
        "csv": b"image_id,image_uri,paint,attributes\na,u,red,x\nb,u,,y\n",
        "jsonl": b'{"image_id": "a", "image_uri": "u", "paint": "red", "attributes": {"x": 1}}\n'
        b'{"image_id": "b", "image_uri": "u", "paint": null}\n',
    }[kind]
    put(f"{root}/a.{kind}", content)
    first, second = read(root, kind, columns={"attributes": {"colour": "paint"}})
    assert (first["attributes.colour"], second.get("attributes.colour")) == ("red", None)
    assert first.get("attributes") is None


def test_an_unpackable_file_is_an_error_of_its_own(root: str) -> None:
    uri = put(f"{root}/a.jsonl.gz", b"not gzip")
    with pytest.raises(CorpusError, match="cannot be read"), open_buffered(uri) as file:
        file.read()


def test_several_images_of_a_key_are_refused_until_one_is_mapped(root: str) -> None:
    members = [("a.jpg", b"jpg"), ("a.png", b"png"), ("a.txt", b"t"), ("b.png", b"one"), ("b.mask.png", b"mask")]
    uri = put(f"{root}/a.tar", write_tar(members))
    several, single = read(uri, "webdataset")
    assert (several["image"].reason, single["image"]) == ("several_images", b"one")
    assert "map one, for example columns: {image: jpg}" in str(several["image"])
    assert [r["image"] for r in read(uri, "webdataset", columns={"image": "png"})] == [b"png", b"one"]
    (told,) = read(put(f"{root}/b.tar", write_tar([("a.png", b"1"), ("a.png", b"2")])), "webdataset")
    assert (told[UNREADABLE], told["image_id"]) == ("repeated_member", "a")


@settings(max_examples=80, deadline=None)
@given(st.permutations([(f"{n}.{kind}", f"{n}{kind}".encode()) for n in "abc" for kind in ("png", "txt")]))
def test_members_in_any_order_give_a_caption_to_its_image_or_say_so(members: list[tuple[str, bytes]]) -> None:
    records = list(group_members(read_members(io.BytesIO(write_tar(members)), 1000, Counter())))
    whole = [record for record in records if UNREADABLE not in record]
    for record in whole:
        key = record["__key__"]
        assert record.get("image", f"{key}png".encode()) == f"{key}png".encode()
        assert record.get("txt", f"{key}txt".encode()) == f"{key}txt".encode()
    assert {record["__key__"] for record in whole if "image" in record} == set("abc")
    captioned = sum("txt" in record and "image" in record for record in whole)
    alone = [record for record in records if UNREADABLE in record or "image" not in record]
    assert len(alone) == 3 - captioned
    assert {record[UNREADABLE] for record in alone if UNREADABLE in record} <= {"scattered_key"}
    assert all("tar --sort=name" in record["detail"] for record in alone if UNREADABLE in record)


def test_a_column_that_occurs_twice_is_refused_if_it_is_read(root: str) -> None:
    columns = [pa.array(["a"]), pa.array([b"x"]), pa.array(["b"]), pa.array(["c"])]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, names=["image_id", "image", "x", "x"]), sink)
    assert [r["image_id"] for r in read(put(f"{root}/a.parquet", sink.getvalue()), "parquet")] == [b"a"]
    pq.write_table(pa.table(columns, names=["image_id", "image", "x", "image_id"]), sink := io.BytesIO())
    with pytest.raises(CorpusError, match="there are several columns 'image_id', mapped to 'image_id'; rename"):
        read(put(f"{root}/a.parquet", sink.getvalue()), "parquet")


def test_links_devices_and_hidden_members_of_a_tar_are_accounted_for(root: str) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, kind in (
            ("a.png", tarfile.LNKTYPE),
            ("b.png", tarfile.FIFOTYPE),
            ("._c.png", None),
            ("d", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind or tarfile.REGTYPE, "x.png"
            tar.addfile(member)
    opened = reader(put(f"{root}/a.tar", sink.getvalue()), "webdataset")
    records = list(opened.read({"uri": f"{root}/a.tar"}))
    assert [(r[UNREADABLE], r["image_id"]) for r in records] == [("not_a_file", "a"), ("not_a_file", "b")]
    assert opened.passed_over == {"(hidden)": 1}


@pytest.mark.parametrize("pack", ["plain", "whole", "each", "pieces"])
def test_archives_joined_by_cat_are_read_to_the_last(root: str, pack: str) -> None:
    archives = [write_tar([(f"{n}.png", bytes([n]) * 600), (f"{n}.cls", b"7")]) for n in range(4)]
    joined = b"".join(archives)
    content = {
        "plain": joined,
        "whole": gzip.compress(joined),
        "each": b"".join(map(gzip.compress, archives)),
        "pieces": b"".join(gzip.compress(joined[at : at + 5000]) for at in range(0, len(joined), 5000)),
    }[pack]
    records = read(put(f"{root}/a.tar", content), "webdataset")
    assert [(text(r["image_id"]), r["image"]) for r in records] == [(str(n), bytes([n]) * 600) for n in range(4)]
    cut = read(put(f"{root}/b.tar", content[:-100] if pack != "plain" else joined + b"x" * 512), "webdataset")
    assert [r.get(UNREADABLE) for r in cut][-1] == "damaged_archive"


def test_files_of_other_endings_and_odd_entries_of_a_folder_of_tables_are_counted(tmp_path: Path) -> None:
    images(str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(write_jsonl(table_rows()))
    (tmp_path / ".hidden").write_bytes(b"")
    os.symlink("nowhere", tmp_path / "old.jsonl")
    opened = reader(str(tmp_path), "jsonl", columns={"image_uri": "file_name"})
    assert opened.files() == [f"{tmp_path}/rows.jsonl"]
    assert opened.passed_over == {".png": len(ROWS), "(hidden)": 1}
    (told,) = opened.records(json.loads(json.dumps(opened.rest())))
    assert (told[UNREADABLE], told["image_id"], told["image_uri"]) == (
        "dangling_link",
        "old.jsonl",
        f"{tmp_path}/old.jsonl",
    )
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(
        CorpusError, match=r"has no jsonl file .37 of .png; 1 of .hidden.; old.jsonl: dangling_link, its"
    ):
        reader(str(tmp_path), "jsonl").files()


def test_a_file_named_in_white_space_is_read_itself(tmp_path: Path) -> None:
    (tmp_path / " a.png").write_bytes(b"exact")
    (tmp_path / "a.png").write_bytes(b"other")
    records: list[dict[str, Any]] = [{"image_uri": name} for name in (" a.png", "a.png", " a.png ")]
    fetch_images(records, str(tmp_path), 20)
    assert [record["image"] for record in records] == [b"exact", b"other", b"other"]
