"""CSV of any dialect: the same rows, and no row lost to a quote of another one."""

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lookalike.data.sources import SOURCE_FORMATS, RecordSource
from lookalike.data.sources.reader import DETAIL, UNREADABLE
from lookalike.errors import CorpusError

HYPOTHESIS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=12)
cells = words.filter(lambda text: re.fullmatch(r"-?\d+\.\d+|inf|nan", text) is None) | st.sampled_from(
    ['say "hi"', "a, b", "x; y", "t\tab", "two\nlines", "", "12|3", "'", "1.0 m", "-"]
)
ENCODINGS = [None, "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


def read(path: Path, content: bytes, kind: str = "csv", **settings: Any) -> list[dict[str, Any]]:
    path.write_bytes(content)
    source = RecordSource.model_validate({"uri": str(path), "format": kind, "dataset": "d", **settings})
    reader = SOURCE_FORMATS.get(kind)(source, 1000)
    units = [json.loads(json.dumps(unit)) for file in reader.files() for unit in reader.units(file, 10)]
    return [record for unit in units for record in reader.read(unit)]


def write(rows: list[list[str]], delimiter: str, end: str, quoting: Any) -> str:
    sink = io.StringIO(newline="")
    csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    return sink.getvalue()


@HYPOTHESIS
@given(
    titles=st.lists(cells, min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    encoding=st.sampled_from(ENCODINGS),
    order=st.permutations(["image_id", "image_uri", "title"]),
    name=st.sampled_from(["a.csv", "a.tsv", "a.csv.gz"]),
)
def test_the_same_rows_in_any_dialect(  # noqa: PLR0917
    tmp_path: Path,
    titles: list[str],
    delimiter: str,
    end: str,
    quoting: Any,
    encoding: str | None,
    order: Any,
    name: str,
) -> None:
    rows = [{"image_id": f"r{n}", "image_uri": f"{n}.jpg", "title": title} for n, title in enumerate(titles)]
    text = write([list(order), *([row[field] for field in order] for row in rows)], delimiter, end, quoting)
    content = text.encode(encoding or "utf-8")
    records = read(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert records == [{**row, "title": row["title"] or None} for row in rows]


@HYPOTHESIS
@given(
    faults=st.lists(
        st.sampled_from(["good", "open", "open first", "open last", "stray", "multi"]), min_size=1, max_size=12
    )
)
@example(["good", "good", "open", "good", "good", "stray"])
def test_no_row_is_lost_to_the_quote_of_another_one(tmp_path: Path, faults: list[str]) -> None:
    forms = {
        "good": "r{0},{0}.jpg,title {0}",
        "open": 'r{0},{0}.jpg,"title {0}',
        "open first": '"r{0},{0}.jpg,title',
        "open last": 'r{0},{0}.jpg,"',
        "stray": 'r{0},{0}.jpg,"12" wide"',
        "multi": 'r{0},{0}.jpg,"two\nlines"',
    }
    lines = [forms[fault].format(number) for number, fault in enumerate(faults)]
    records = read(tmp_path / "a.csv", "\n".join(["image_id,image_uri,title", *lines]).encode())
    wanted = {f"r{n}" for n, fault in enumerate(faults) if fault == "good"}
    kept = {record["image_id"] for record in records if UNREADABLE not in record}
    assert wanted <= kept
    refused = [record for record in records if UNREADABLE in record]
    assert len(kept) + len(refused) >= len(faults)  # the halves of a cell that an open quote broke count on their own
    assert all("line " in record[DETAIL] for record in refused)


def test_an_open_quote_says_where_it_opened_and_what_it_took(tmp_path: Path) -> None:
    body = 'image_id,image_uri,title\nr0,0.jpg,a\nr1,1.jpg,"open\n' + "".join(f"r{n},{n}.jpg,t\n" for n in range(2, 8))
    for end, words in ("", "line 3 took 7 lines, up to line 9"), ('r8,8.jpg,"5"" tall"\n', "line 3 took 8 lines"):
        records = read(tmp_path / "a.csv", (body + end).encode())
        assert [n for n, record in enumerate(records) if UNREADABLE in record] == [1]
        assert records[1][UNREADABLE] == "open_quote"
        assert words in records[1][DETAIL]
        assert (records[1]["image_id"], records[1]["image_uri"]) == ("r1", "1.jpg")
    closed = read(tmp_path / "a.csv", (body + 'r8,8.jpg,t"\nr9,9.jpg,t\n').encode())
    assert [record[UNREADABLE] for record in closed if UNREADABLE in record] == ["open_quote"]
    assert [record["image_id"] for record in closed] == [f"r{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'"image_id" ,"image_uri"\na,b\n', r"a.csv, line 1: the header is no CSV .*expected after"),
        (b'\n\nimage_id,"image_uri\na,b\n', r"a.csv, line \d: the header is no CSV .*unexpected end"),
        (b"id;uri\na;b\n", r"the required field 'image_id'; the file has id, uri; .*separated by ';'"),
        (b"id,image_uri\na,b\n", r"the required field 'image_id'; the file has id, image_uri; name one under columns"),
    ],
)
def test_a_header_that_cannot_be_used_is_told_with_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        read(tmp_path / "a.csv", content)


def test_quotes_that_are_characters_like_others(tmp_path: Path) -> None:
    lines = [
        "image_id\timage_uri\ttitle",
        'a\t1.jpg\t"two" words',
        'b\t2.jpg\t12" wide',
        'c\t3.jpg\t"open',
        "d\t4.jpg\tt",
    ]
    content = "\n".join(lines).encode()
    quoted = read(tmp_path / "a.tsv", content)
    assert [record.get(UNREADABLE) for record in quoted] == ["not_csv", None, "open_quote", None]
    assert all("quoted: false" in record[DETAIL] for record in quoted if UNREADABLE in record)
    titles = [record["title"] for record in read(tmp_path / "a.tsv", content, quoted=False)]
    assert titles == ['"two" words', '12" wide', '"open', "t"]


def test_the_line_that_excel_writes_above_the_header(tmp_path: Path) -> None:
    for line in ("sep=;", '"sep=;"'):
        records = read(tmp_path / "a.csv", f"{line}\r\nimage_id;image_uri\r\na;b,c\r\n".encode("utf-16"))
        assert records == [{"image_id": "a", "image_uri": "b,c"}]


def test_names_of_columns_in_white_space_and_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path / "a.csv", b" image_id , image_uri ,x,x\na,b,1,2\n") == [{"image_id": "a", "image_uri": "b"}]
    assert "repeated" not in caplog.text
    records = read(tmp_path / "a.csv", b"image_id,image_uri,title,title\na,b,1,2\n")
    assert records[0]["title"] == "1"
    assert "repeated columns" in caplog.text


def test_other_encodings_by_name_and_what_is_none_is_told(tmp_path: Path) -> None:
    text = "image_id,image_uri,title\na,b,Stuhl gr\u00fcn\n"
    assert read(tmp_path / "a.csv", text.encode("cp1252"), encoding="cp1252")[0]["title"] == "Stuhl gr\u00fcn"
    line = '{"image_id": "a", "image_uri": "b", "title": "\u6905\u5b50"}\n'
    for encoding in ("shift_jis", "utf-16", "utf-16-le", "utf-32-be"):
        named = encoding if encoding == "shift_jis" else None
        assert len(records := read(tmp_path / "a.jsonl", (line * 3).encode(encoding), "jsonl", encoding=named)) == 3
        assert records[2]["title"] == "\u6905\u5b50"
    broken = text.encode("utf-16")[:-6] + b"\x00\xd8\n\x00"
    assert "\udced" in read(tmp_path / "a.csv", broken)[0]["title"]  # which becomes not_utf8
    with pytest.raises(ValueError, match="not an encoding that Python knows"):
        read(tmp_path / "a.csv", b"", encoding="latin-17")


ROWS = [{"image_id": str(n), "image_uri": f"{n}.jpg", "title": 'a [b] {"c"}, \u00e4\n'} for n in range(4)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_json_array_is_read_as_its_objects(
    tmp_path: Path, indent: int | None, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lookalike.data.sources.tables.BUFFER_BYTES", 7)  # objects cross the ends of what is read
    text = json.dumps([*ROWS, 7, []], indent=indent, ensure_ascii=False)
    records = read(tmp_path / "a.jsonl", text.encode(encoding), "jsonl")
    assert records[:4] == ROWS
    assert [record[UNREADABLE] for record in records[4:]] == ["not_an_object"] * 2
    lines = "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n"
    assert read(tmp_path / "a.jsonl", lines.encode(encoding), "jsonl") == ROWS
    with pytest.raises(CorpusError, match=r"a.jsonl, line 3: the array is no JSON"):
        read(tmp_path / "a.jsonl", lines.replace('"1"', '"1').encode(encoding), "jsonl")


def test_lines_of_which_the_first_is_an_array_are_lines(tmp_path: Path) -> None:
    records = read(tmp_path / "a.jsonl", b'[{"image_id": 1}]\n{"image_id": "a", "image_uri": "b"}\n', "jsonl")
    assert [record.get(UNREADABLE) for record in records] == ["not_an_object", None]


def test_a_packed_table_that_breaks_off_is_told_with_its_line(tmp_path: Path) -> None:
    rows = "".join(f"{n},{n}.jpg,{hash(str(n))}\n" for n in range(3000))
    whole = gzip.compress(f"image_id,image_uri,title\n{rows}".encode())
    noise = whole[:-2000] + bytes(500) + whole[-1500:]
    for content in (whole[:-2000], noise):
        with pytest.raises(CorpusError, match=r"a.csv.gz cannot be read .*line \d+"):
            read(tmp_path / "a.csv.gz", content)
