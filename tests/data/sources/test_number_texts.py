"""Numbers as ids and texts: the same text in every format, or a refusal; never another number without a word."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lookalike.data.sources import SOURCE_FORMATS, RecordSource
from lookalike.data.sources.columns import raw_values
from lookalike.data.sources.records import RecordLimits, RecordOrigin, check_records
from lookalike.data.sources.texts import read_text
from tests.data.odd_sources import picture

FIELDS = ("image_id", "group", "category", "title")
SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
doubles = st.lists(
    st.integers(-(2**60), 2**60).map(float)
    | st.floats(allow_nan=False)
    | st.sampled_from([2.0**53, 2.0**53 - 1, 712.0]),
    min_size=1,
    max_size=8,
)


def oracle(value: float) -> str | None:
    """What a double may be called, by exact arithmetic: a whole number if no other one is as close to it."""
    if value in (float("inf"), float("-inf")):
        return None
    exact = Decimal(value)
    if exact != exact.to_integral_value():
        return repr(value)
    whole = int(exact)
    return str(whole) if all(float(near) != value for near in (whole - 1, whole + 1)) and abs(whole) < 2**53 else None


def write(path: Path, kind: str, values: list[float]) -> None:
    rows = [{**dict.fromkeys(FIELDS, value), "paint": value, "image_uri": "x"} for value in values]
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        lines = [",".join(repr(value) if isinstance(value, float) else value for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import lance

        lance.write_dataset(pa.Table.from_pylist(rows), str(path), mode="overwrite")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "lance"])
@SETTINGS
@given(values=doubles)
def test_doubles_have_the_same_text_in_every_format(tmp_path: Path, kind: str, values: list[float]) -> None:
    if kind == "lance":
        pytest.importorskip("lance")
        values = values[:2]
    write(tmp_path / f"a.{kind}", kind, values)
    columns = {"attributes": {"paint": "paint"}}
    source = RecordSource.model_validate(
        {"uri": f"{tmp_path}/a.{kind}", "format": kind, "dataset": "d", "columns": columns}
    )
    reader = SOURCE_FORMATS.get(kind)(source, 1000)
    units = [unit for file in reader.files() for unit in reader.units(file, 100)]
    records = [record for unit in units for record in reader.read(unit)]
    for record, value in zip(records, values, strict=True):
        text = oracle(value)
        for field in (*FIELDS, "attributes.paint"):
            assert read_text(record[field], 1000) == (text, set() if text else {"inexact_number"})
        wanted = (text, text, text, text) if text else (f"row {value}", None, None, "")
        fixed = record if text else {**record, "image_id": f"row {value}"}
        limits = RecordLimits(1000, 1000, 1, 1000)
        checked = check_records(
            [{**fixed, "image": picture(1)}], RecordOrigin("f", 0, source, 1), limits=limits, accepted_ids=set()
        )
        (row,) = checked.accepted.to_pylist()
        assert tuple(row[field] for field in FIELDS) == wanted
        assert row["attributes"] == ([{"name": "paint", "value": text}] if text else [])
        told = {(problem["field"], problem["reason"]) for problem in checked.quarantine.to_pylist()}
        repaired = {(field, "repaired: inexact_number") for field in ("group", "category", "title", "attributes")}
        assert told == (set() if text else repaired)


def test_an_id_that_may_be_another_one_is_refused_with_the_remedy() -> None:
    source = RecordSource.model_validate({"uri": "u", "dataset": "d"})
    records = [{"image_id": value, "image": picture(1)} for value in (2.0**53, np.float32(2**24), float("inf"), 7.0)]
    limits = RecordLimits(1000, 1000, 1, 1000)
    checked = check_records(records, RecordOrigin("f", 0, source, 1), limits=limits, accepted_ids=set())
    assert checked.accepted["image_id"].to_pylist() == ["7"]
    assert checked.quarantine["reason"].to_pylist() == ["inexact_number"] * 3
    assert checked.quarantine["image_id"].to_pylist()[0] == "9007199254740992.0"
    assert "write the column as integers or text" in checked.quarantine["detail"][0].as_py()


NUMBERS = [
    *(
        (kind, 7, "7")
        for kind in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.float16(), pa.float32(), pa.float64())
    ),
    *((pa.int64(), value, str(value)) for value in (2**53 + 1, -(2**63), 0)),
    (pa.uint64(), 2**64 - 1, str(2**64 - 1)),
    *((pa.decimal128(30, 2), Decimal(text), wanted) for text, wanted in (("712.00", "712"), ("7.10", "7.10"))),
    (pa.decimal128(38, 0), Decimal(10**37 + 1), str(10**37 + 1)),
    *((pa.float32(), value, text) for value, text in ((0.1, "0.1"), (2**24 - 1, str(2**24 - 1)), (2**24, None))),
    *((pa.float16(), value, text) for value, text in ((np.float16(0.1), "0.1"), (np.float16(2048), None))),
    (pa.float64(), -0.0, "0"),
]


@pytest.mark.parametrize(("kind", "value", "text"), NUMBERS)
def test_numbers_of_every_arrow_type(kind: pa.DataType, value: Any, text: str | None) -> None:
    column = pa.chunked_array([pa.array([value, None], kind)])
    assert [read_text(raw, 100)[0] for raw in raw_values(column)] == [text, None]
    coded = column.dictionary_encode() if not pa.types.is_decimal(kind) and kind != pa.float16() else column
    assert [read_text(raw, 100)[0] for raw in raw_values(coded)] == [text, None]
    (nested, _) = raw_values(pa.chunked_array([pa.array([{"a": [value]}, None], pa.struct([("a", pa.list_(kind))]))]))
    assert read_text(nested["a"][0], 100)[0] == text


@pytest.mark.parametrize(
    ("cells", "texts"),
    [
        (["1.0", "2.0", ""], ["1", "2", None]),  # as programs write a column of doubles
        (["1.0", "2.5"], ["1", "2.5"]),
        (["1.10", "1.0"], ["1.10", "1.0"]),  # versions or sections
        (["0071.0"], ["0071.0"]),
        (["7", "7.0"], ["7", "7.0"]),
        (["a", "1.0"], ["a", "1.0"]),
        (["1e+20", "1.0"], [None, "1"]),
        (["9007199254740993"], ["9007199254740993"]),
        (["0007"], ["0007"]),
    ],
)
def test_a_column_of_a_csv_is_of_doubles_if_all_its_cells_are(
    tmp_path: Path, cells: list[str], texts: list[str | None]
) -> None:
    (tmp_path / "a.csv").write_text(
        "".join(f"{n},x,{cell}\n" for n, cell in [("image_id", "title"), *enumerate(cells)]).replace(
            "x", "image_uri", 1
        )
    )
    source = RecordSource.model_validate({"uri": f"{tmp_path}/a.csv", "format": "csv", "dataset": "d"})
    reader = SOURCE_FORMATS.get("csv")(source, 1000)
    records = list(reader.read({"uri": f"{tmp_path}/a.csv"}))
    assert [read_text(record["title"], 100)[0] for record in records] == texts
