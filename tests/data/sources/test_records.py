import io
import math
import struct
import zlib
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lookalike.data.sources import RecordSource
from lookalike.data.sources.columns import arrow_records, resolve, resolve_schema
from lookalike.data.sources.records import RecordLimits, RecordOrigin, check_records, count_reasons
from lookalike.data.sources.texts import read_attributes, read_scored, read_text, read_words
from lookalike.errors import CorpusError
from lookalike.vision.encoder import to_bytes
from lookalike.vision.images import ImageError
from tests.vision.test_decoder import scans_of

LIMITS = RecordLimits(max_bytes=100_000, max_pixels=1_000_000, min_side_px=4, max_text_chars=1000)


def origin(**settings: Any) -> RecordOrigin:
    return RecordOrigin("file.parquet", 0, RecordSource.model_validate({"uri": "u", "dataset": "set", **settings}), 1)


def png(size: tuple[int, int] = (16, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
FLOATS_BEYOND_ONE = to_bytes(Image.new("F", (8, 8), 1.5), "TIFF")


def bomb() -> bytes:
    """A PNG of 59 bytes whose header promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def check_list(records: list[dict[str, Any]], **settings: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    checked = check_records(records, origin(**settings), limits=LIMITS, accepted_ids=set())
    assert checked.accepted.num_rows == len(checked.rows)
    return checked.accepted.to_pylist(), [(r["row"], r["field"], r["reason"]) for r in checked.quarantine.to_pylist()]


def check(table: pa.Table, **settings: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    return check_list(list(arrow_records(table, resolve_schema({}, table.schema, "source"))), **settings)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (None, "null"),
        (b"hello world", "not_an_image"),
        (png()[:60], "truncated"),
        (bomb(), "too_large"),
        (b"x" * 100_001, "too_many_bytes"),
        (png((20, 2)), "too_small"),
        (scans_of(64, 200), "too_many_scans"),
        (FLOATS_BEYOND_ONE, "no_value_range"),
    ],
)
def test_bad_images_are_quarantined_with_the_reason(data: bytes | None, reason: str) -> None:
    accepted, problems = check(pa.table({"image_id": ["good", "bad"], "image": pa.array([png(), data], pa.binary())}))
    assert [row["image_id"] for row in accepted] == ["good"]
    assert (accepted[0]["width"], accepted[0]["height"]) == (16, 12)
    assert problems == [(1, "image", reason)]


def test_null_and_repeated_ids_are_refused_and_the_first_acceptable_one_stays() -> None:
    table = pa.table({"image_id": ["a", None, "", "a", "b", "b"], "image": [PNG] * 4 + [b""] + [PNG]})
    records = arrow_records(table, {"image_id": "image_id", "image": "image"})
    checked = check_records(list(records), origin(), limits=LIMITS, accepted_ids=set())
    assert checked.accepted["image_id"].to_pylist() == ["a", "b"]
    assert checked.rows == [0, 5]
    assert checked.quarantine["row"].to_pylist() == [1, 2, 3, 4]
    assert count_reasons(checked.quarantine) == {"image_id: null": 2, "image_id: duplicate": 1, "image: empty": 1}


def test_ids_that_cannot_be_ids() -> None:
    ids = [{"a": 1}, "x\x00", "y" * 1025, "\udc80", "ok", 7]
    accepted, problems = check_list([{"image_id": value, "image": PNG} for value in ids], id_prefix="p/")
    assert [row["image_id"] for row in accepted] == ["p/ok", "p/7"]
    assert [reason for _, _, reason in problems] == ["wrong_type", "control_characters", "too_long", "not_utf8"]


def test_a_record_without_an_image_says_why() -> None:
    images = [None, ImageError("not_found", "gone"), "a string", {"bytes": b""}]
    accepted, problems = check_list([{"image_id": f"i{n}", "image": image} for n, image in enumerate(images)])
    assert accepted == []
    assert [reason for _, _, reason in problems] == ["null", "not_found", "wrong_type", "wrong_type"]
    assert check_list([{"unreadable": "not_json"}])[1] == [(0, "record", "not_json")]


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_titles_that_are_empty_or_not_utf8_are_repaired_and_reported(kind: pa.DataType) -> None:
    titles = pa.array([b"ok", b"\xff\xfe", b"", None], pa.binary())
    if kind == pa.string():  # invalid bytes behind a string type, as careless writers leave them
        titles = pa.Array.from_buffers(pa.string(), 4, titles.buffers())
    accepted, problems = check(pa.table({"image_id": list("abcd"), "image": [png()] * 4, "title": titles}))
    assert [row["title"] for row in accepted] == ["ok", "", "", ""]
    assert problems == [
        (1, "title", "repaired: not_utf8"),
        (2, "title", "repaired: empty"),
        (3, "title", "repaired: empty"),
    ]


def test_types_are_brought_into_form() -> None:
    group = pa.array(["g"]).dictionary_encode()
    table = pa.table({"image_id": [7], "image": [png()], "keywords": ["red, sofa,"], "group": group})
    (row,), problems = check(table)
    assert (row["image_id"], row["keywords"], row["group"], row["title"]) == ("7", ["red", "sofa"], "g", None)
    assert problems == []


def test_split_of_a_group_is_one_and_by_hash() -> None:
    ids = [f"i{n}" for n in range(400)]
    table = pa.table({"image_id": ids, "image": [png()] * 400, "group": [f"g{n // 4}" for n in range(400)]})
    accepted, _ = check(table, test_fraction=0.3)
    split_of = {}
    for row in accepted:
        assert split_of.setdefault(row["group"], row["split"]) == row["split"]
    assert 15 <= sum(split == "test" for split in split_of.values()) <= 45


@pytest.mark.parametrize(
    ("mapping", "columns", "words"),
    [
        ({"title": "nam"}, ["image_id", "image", "name"], "'nam', mapped to 'title', is absent .did you mean 'name'"),
        ({}, ["id", "image"], "required field 'image_id'; the file has id, image"),
        ({}, ["image_id", "uri"], "required field 'image' or 'image_uri'; the file has image_id, uri"),
    ],
)
def test_wrong_columns_name_what_exists_and_the_remedy(mapping: dict[str, str], columns: list[str], words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        resolve(mapping, columns, "source s")


def test_a_column_mapped_to_nothing_is_not_read() -> None:
    assert set(resolve({"split": None}, ["image_id", "image", "split"], "source s")) == {"image_id", "image"}


@pytest.mark.parametrize(
    ("raw", "text", "problems"),
    [
        ("caf\u00e9 \U0001f600\U0001f3fd\u200d\U0001f33e", None, set()),  # emoji with a joiner
        ("\u0643\u0631\u0633\u064a \u200fsofa \u05db\u05d9\u05e1\u05d0", None, set()),  # right to left, with its mark
        ("\u6905\u5b50 chair \u0441\u0442\u0443\u043b\ttab\nline", None, set()),  # mixed scripts, white space
        ("so\x00fa\x1b[0m\x85\x7f", "sofa[0m", {"control_characters"}),
        ("a\ud800b", "ab", {"control_characters"}),
        (" " * 5, "", set()),
        ("x" * 1_000_000, "x" * 1000, {"too_long"}),
        (b"caf\xe9", None, {"not_utf8"}),
        ("caf\udce9", None, {"not_utf8"}),
        ({"a": 1}, None, {"wrong_type"}),
        (["a"], None, {"wrong_type"}),
        (7, "7", set()),
        (True, "true", set()),
        (float("nan"), None, set()),
        (None, None, set()),
    ],
)
def test_texts_of_every_kind(raw: Any, text: str | None, problems: set[str]) -> None:
    if text is None and not problems and isinstance(raw, str):
        text = raw.strip()
    assert read_text(raw, 1000) == (text, problems)


@settings(max_examples=300)
@given(st.one_of(st.text(st.characters(), max_size=30), st.binary(max_size=30)), st.integers(1, 20))
def test_any_text_comes_out_clean(raw: str | bytes, most: int) -> None:
    text, problems = read_text(raw, most)
    if text is None:
        assert problems == {"not_utf8"}
    else:
        assert text.encode().decode() == text
        assert len(text) <= most
        assert not any(ord(c) < 32 and c not in "\t\n\v\f\r" for c in text)


@pytest.mark.parametrize(
    "raw", [["red", "sofa, two seats", None, " "], [b"red", b"sofa, two seats"], '["red", "sofa, two seats"]']
)
def test_words_of_every_form(raw: Any) -> None:
    assert read_words(raw, 100) == (["red", "sofa, two seats"], set())


def test_words_out_of_form() -> None:
    assert read_words("red, sofa ,[x", 100) == (["red", "sofa", "[x"], set())
    assert read_words("[not json", 100) == (["[not json"], set())
    assert read_words(7, 100) == ([], {"wrong_type"})
    assert read_words(["a", {"b": 1}, b"\xff"], 100) == (["a"], {"wrong_type", "not_utf8"})
    words, problems = read_words(["word"] * 1000, 22)
    assert (words, problems) == (["word"] * 5 + ["wo"], {"too_long"})


SCORES = [{"term": "sofa", "score": 0.9}, {"term": "red chair", "score": 1.0}]


@pytest.mark.parametrize(
    "raw",
    [
        SCORES,
        [("sofa", 0.9), ("red chair", 1.0)],
        {"sofa": 0.9, "red chair": 1},
        ["sofa:0.9", "red chair"],
        [b"sofa : .9", b"red chair:1"],
        "sofa:0.9, red chair",
        '{"sofa": 0.9, "red chair": 1.0}',
        '["sofa:0.9", "red chair"]',
        b'[{"term": "sofa", "score": 0.9}, {"term": "red chair", "score": "1"}]',
        '[["sofa", 0.9], ["red chair", 1]]',
    ],
)
def test_scored_terms_of_every_form(raw: Any) -> None:
    assert read_scored(raw, 100, "score", 1.0) == (SCORES, set())


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.struct([("term", pa.string()), ("score", pa.float64())])), pa.map_(pa.string(), pa.float64())]
)
def test_scored_terms_of_nested_columns(kind: pa.DataType) -> None:
    raw = SCORES if pa.types.is_list(kind) else [("sofa", 0.9), ("red chair", 1.0)]
    table = pa.table({"image_id": ["a", "b"], "image": [PNG] * 2, "annotations": pa.array([raw, None], kind)})
    accepted, problems = check(table)
    assert [[e["term"] for e in row["annotations"]] for row in accepted] == [["sofa", "red chair"], []]
    assert accepted[0]["annotations"][0]["score"] == pytest.approx(0.9)
    assert (accepted[0]["interactions"], problems) == ([], [])


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, None, "much", [1]])
def test_a_number_that_is_none_loses_its_term(bad: Any) -> None:
    raw = [{"term": "a", "weight": bad}, {"term": "b", "weight": 3}]
    assert read_scored(raw, 100, "weight") == ([{"term": "b", "weight": 3.0}], {"bad_weight"})


def test_scores_over_one_are_lowered_and_weights_are_not() -> None:
    assert read_scored({"a": 1.5}, 100, "score", 1.0) == ([{"term": "a", "score": 1.0}], {"bad_score"})
    assert read_scored({"a": 1.5}, 100, "weight") == ([{"term": "a", "weight": 1.5}], set())
    assert read_scored({"a": 1e39}, 100, "weight") == ([], {"bad_weight"})  # no float32
    assert read_scored(["a:nan", "b:-1", "c:2"], 100, "weight")[0] == [{"term": "c", "weight": 2.0}]


STATED = [{"name": "colour", "value": "blue"}, {"name": "colour", "value": "red"}, {"name": "size", "value": "2"}]


@pytest.mark.parametrize(
    "raw",
    [
        {"size": 2, "colour": ["red", "blue"]},
        {"size": "2", "colour": [" blue", "red ", "red", "", None]},
        STATED[::-1],
        [("colour", "blue"), ("size", 2), ("colour", "red")],
        '{"colour": ["blue", "red"], "size": 2}',
        b'[{"name": "size", "value": "2"}, {"name": "colour", "value": "red"}, {"name": "colour", "value": "blue"}]',
    ],
)
def test_attributes_of_every_form(raw: Any) -> None:
    assert read_attributes(raw, 100) == (STATED, set())


@pytest.mark.parametrize(
    ("raw", "kept", "problems"),
    [
        (None, [], set()),
        ("", [], set()),
        ({}, [], set()),
        ([None], [], set()),
        ({"a": None, "": "b", "c": " "}, [], set()),
        (7, [], {"wrong_type"}),
        ("red, blue", [], {"wrong_type"}),
        ("[not json", [], {"wrong_type"}),
        ([{"colour": "red"}], [], {"wrong_type"}),
        ({"a": {"b": 1}, "c": 1}, [("c", "1")], {"wrong_type"}),
        ({"a": [["b"]]}, [], {"wrong_type"}),
        (b"\xff", [], {"not_utf8"}),
        ({"a": b"\xff", "b": b"x"}, [("b", "x")], {"not_utf8"}),
        ({"co\x00l": "re\x1bd"}, [("col", "red")], {"control_characters"}),
        ({"a": "x" * 1_000_000, "b": "red"}, [("b", "red")], {"too_long"}),
        ({"x" * 101: "red"}, [], {"too_long"}),
        ({"a": float("nan"), "b": True}, [("b", "true")], set()),
    ],
)
def test_attributes_out_of_form(raw: Any, kept: list[tuple[str, str]], problems: set[str]) -> None:
    assert read_attributes(raw, 100) == ([{"name": n, "value": v} for n, v in kept], problems)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.text("ab", max_size=4), st.text("cd", max_size=6)), max_size=20), st.integers(1, 40))
def test_attributes_fit_and_do_not_depend_on_their_order(pairs: list[tuple[str, str]], most: int) -> None:
    entries, problems = read_attributes(pairs, most)
    assert (entries, problems) == read_attributes(pairs[::-1] + pairs, most)
    found = [(entry["name"], entry["value"]) for entry in entries]
    wanted = {(name, value) for name, value in pairs if name and value}
    assert found == sorted(set(found))
    assert set(found) <= wanted
    assert sum(len(name) + len(value) for name, value in found) <= most
    assert set(found) == wanted or problems == {"too_long"}


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())])),
        pa.map_(pa.string(), pa.list_(pa.string())),
        pa.struct([("colour", pa.list_(pa.string())), ("size", pa.int8()), ("shape", pa.string())]),
        pa.string(),
    ],
)
def test_attributes_of_columns_are_a_part_of_the_row(kind: pa.DataType) -> None:
    raw: Any = {"colour": ["red", "blue"], "size": 2}
    if pa.types.is_list(kind):
        raw = STATED
    elif pa.types.is_map(kind):
        raw = [("colour", ["red", "blue"]), ("size", ["2"])]
    elif pa.types.is_string(kind):
        raw = '{"size": "2", "colour": ["red", "blue"]}'
    table = pa.table({"image_id": ["a", "b"], "image": [PNG] * 2, "attributes": pa.array([raw, None], kind)})
    accepted, problems = check(table)
    assert [row["attributes"] for row in accepted] == [STATED, []]
    assert problems == []
    assert check_list([{"image_id": "a", "image": PNG}])[0][0]["attributes"] == []


def test_a_bad_attribute_is_a_repair_of_its_record() -> None:
    accepted, problems = check_list([{"image_id": "a", "image": PNG, "attributes": {"a": "b", "c": {}}}])
    assert accepted[0]["attributes"] == [{"name": "a", "value": "b"}]
    assert problems == [(0, "attributes", "repaired: wrong_type")]


def test_plain_columns_are_gathered_as_attributes() -> None:
    table = pa.table(
        {
            "image_id": ["a", "b"],
            "image": [PNG] * 2,
            "paint": ["red", None],
            "year": [1999, 2000],
            "tags": [["x", "y"], []],
            "attributes": ['{"colour": "blue"}', '{"old": "1"}'],
        }
    )
    mapping = {"attributes": {"colour": "paint", "made in": "year", "tag": "tags"}}
    source = origin(columns=mapping).source
    assert RecordSource.model_validate(source.model_dump()) == source  # as a manifest has it
    records = list(arrow_records(table, resolve_schema(source.columns, table.schema, "source")))
    made = [[(e["name"], e["value"]) for e in row["attributes"]] for row in check_list(records)[0]]
    assert made == [[("colour", "red"), ("made in", "1999"), ("tag", "x"), ("tag", "y")], [("made in", "2000")]]
    beside = RecordSource.model_validate(
        {"uri": "u", "dataset": "d", "columns": {"attributes.colour": "paint"}}
    ).columns
    records = list(arrow_records(table, resolve_schema(beside, table.schema, "source")))
    made = [[(e["name"], e["value"]) for e in row["attributes"]] for row in check_list(records)[0]]
    assert made == [[("colour", "blue"), ("colour", "red")], [("old", "1")]]
    with pytest.raises(CorpusError, match=r"column 'pint', mapped to 'attributes.colour', is absent .did you"):
        resolve({"attributes.colour": "pint"}, table.column_names, "source s")


def test_constants_fill_what_is_missing_and_nothing_else() -> None:
    rows = [
        {"image_id": "a", "image": PNG, "licence": "by", "split": "catalog"},
        {"image_id": "b", "image": PNG, "locale": ""},
    ]
    accepted, problems = check_list(rows, constants={"licence": "cc0", "locale": "en", "split": "test"})
    found = [(row["licence"], row["locale"], row["split"]) for row in accepted]
    assert found == [("by", "en", "catalog"), ("cc0", "en", "test")]
    assert problems == []


bad_or_good = st.fixed_dictionaries(
    {
        "image_id": st.sampled_from(["a", "b", "c", None, "", b"\xff", 3]),
        "image": st.sampled_from([PNG, b"", None, "x"]),
    },
    optional={
        "title": st.sampled_from(["t", "", None, "\x00"]),
        "keywords": st.sampled_from([None, 3, "a,b"]),
        "annotations": st.sampled_from([{"a": 2}, "x:0.5", 9]),
        "attributes": st.sampled_from([{"a": 2}, "x", 9, [["a", {}]]]),
        "unreadable": st.just("not_json"),
    },
)


@settings(max_examples=100)
@given(st.lists(bad_or_good, max_size=12))
def test_each_record_is_accepted_or_refused_by_one_row(records: list[dict[str, Any]]) -> None:
    accepted, problems = check_list(records)
    refused = Counter(row for row, _, reason in problems if not reason.startswith("repaired: "))
    assert set(refused.values()) <= {1}
    assert len(records) == len(accepted) + len(refused)
    assert not set(refused) & {row for row, _, reason in problems if reason.startswith("repaired: ")}
