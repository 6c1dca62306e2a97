"""The stage ``vectors``: every format gives the vectors that NumPy has, and each bad row is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lookalike.artifacts import Artifact
from lookalike.data.vectors import STAGE, VectorsConfig
from lookalike.errors import UsageError
from lookalike.stages import execute

NUM, DIM = 1000, 24
Numbers = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return np.random.default_rng(5).normal(size=(NUM, DIM)).astype(np.float32) * 3


def take_in(tmp_path: Path, uri: Any, name: str = "v", **settings: Any) -> Artifact:
    config = VectorsConfig(uri=uri, **{"model": "some-model", "rows_per_part": 300, **settings})
    return execute(STAGE, config, {}, str(tmp_path / "root"), name)


def read(artifact: Artifact) -> pa.Table:
    return pa.concat_tables(pq.read_table(uri) for uri in artifact.files("part-", ".parquet"))


def matrix(table: pa.Table) -> Numbers:
    return np.stack([np.asarray(row) for row in table["vector"].to_pylist()])


def unit(numbers: Numbers) -> Numbers:
    wide = numbers.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def save(path: Path, numbers: Numbers) -> str:
    np.save(path, numbers)
    return str(path)


STORED: dict[str, Callable[[Numbers], Numbers]] = {
    "float16": lambda x: x.astype(np.float16),
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "big-endian": lambda x: x.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "Fortran order, big-endian": lambda x: np.asfortranarray(x.astype(">f8")),
    "huge numbers": lambda x: x.astype(np.float64) * 1e200,
    "tiny numbers": lambda x: x.astype(np.float64) * 1e-200,
}


@pytest.mark.parametrize("stored", STORED)
def test_an_array_is_taken_in_whatever_its_format(stored: str, numbers: Numbers, tmp_path: Path) -> None:
    given = STORED[stored](numbers)
    table = read(take_in(tmp_path, save(tmp_path / "x.npy", given)))
    assert table["image_id"].to_pylist() == [str(row) for row in range(NUM)]
    wanted = unit(given.astype(np.float64) / np.abs(given.astype(np.float64)).max())
    assert np.allclose(matrix(table), wanted, atol=1e-6)


def test_what_was_taken_in_is_stated(numbers: Numbers, tmp_path: Path) -> None:
    artifact = take_in(tmp_path, save(tmp_path / "x.npy", numbers), licence="CC-BY-4.0")
    meta = artifact.read_json("meta.json")
    assert artifact.manifest.kind == "embeddings"
    assert (meta["dim"], meta["dims"], meta["rows"]) == (DIM, [8, 16, 24], NUM)
    assert meta["encoder"]["name"] == "some-model"
    assert (meta["encoder"]["external"], meta["nested"], meta["normalized"]) == (True, False, True)
    card = Path(artifact.path("README.md")).read_text()
    for said in ("some-model", "CC-BY-4.0", "not trained nested", "length 1"):
        assert said in card
    again = take_in(tmp_path, save(tmp_path / "y.npy", numbers), name="queries")
    assert again.read_json("meta.json")["encoder"] == meta["encoder"]  # one model and size: they may be compared
    other = take_in(tmp_path, str(tmp_path / "x.npy"), name="other", model="another")
    assert other.read_json("meta.json")["encoder"]["fingerprint"] != meta["encoder"]["fingerprint"]


def test_vectors_stay_as_they_are_if_asked(numbers: Numbers, tmp_path: Path) -> None:
    table = read(take_in(tmp_path, save(tmp_path / "x.npy", numbers), normalize=False, dtype="float16"))
    assert table.schema.field("vector").type == pa.list_(pa.float16(), DIM)
    assert np.array_equal(matrix(table).astype(np.float16), numbers.astype(np.float16))


def list_column(kind: str, numbers: Numbers) -> Any:
    flat = pa.array(numbers.reshape(-1))
    fixed = pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1])
    if kind == "fixed":
        return fixed
    if kind == "tensor":
        return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [numbers.shape[1]]), fixed)
    return fixed.cast({"list": pa.list_, "large": pa.large_list}[kind](pa.float32()))


@pytest.mark.parametrize("kind", ["list", "large", "fixed", "tensor"])
def test_a_parquet_column_is_taken_in_with_its_ids_and_columns(kind: str, numbers: Numbers, tmp_path: Path) -> None:
    columns = {"id": np.arange(NUM) * 7, "emb": list_column(kind, numbers), "title": [f"t {n}" for n in range(NUM)]}
    pq.write_table(pa.table({**columns, "price": np.arange(NUM)}), tmp_path / "x.parquet", row_group_size=170)
    table = read(take_in(tmp_path, str(tmp_path / "x.parquet")))
    assert table["image_id"].to_pylist() == [str(row * 7) for row in range(NUM)]
    assert table["title"].to_pylist() == [f"t {n}" for n in range(NUM)]
    assert table["group"].null_count == NUM
    assert np.allclose(matrix(table), unit(numbers), atol=1e-6)


def test_files_of_a_folder_and_a_pattern_come_in_the_order_of_their_names(numbers: Numbers, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number, rows in enumerate(np.array_split(numbers, 3)):
        save(folder / f"part-{number}.npy", rows)
    save(folder / "part-9.npy", np.empty((0, DIM), np.float32))  # an empty part is none
    (folder / "notes.txt").write_text("not a vector")
    for name, uri in (("folder", str(folder)), ("pattern", f"{folder}/part-*.npy")):
        table = read(take_in(tmp_path, uri, name=name))
        assert table["image_id"].to_pylist() == [str(row) for row in range(NUM)]
        assert np.allclose(matrix(table), unit(numbers), atol=1e-6)


def spoil(numbers: Numbers) -> Numbers:
    bad = numbers.copy()
    bad[7, 3], bad[401], bad[999, 0] = np.nan, 0, -np.inf
    return bad


def test_rows_that_are_no_vectors_stop_the_stage_and_are_named(numbers: Numbers, tmp_path: Path) -> None:
    uri = save(tmp_path / "x.npy", spoil(numbers))
    with pytest.raises(UsageError) as told:
        take_in(tmp_path, uri)
    message = str(told.value)
    assert f"{uri}: 1 of the rows 0 to 299 cannot be taken: row 7: vector not_finite: number 3 is nan" in message
    assert "on_bad=quarantine" in message


def test_rows_that_are_no_vectors_go_to_the_quarantine_with_their_reason(numbers: Numbers, tmp_path: Path) -> None:
    uri = save(tmp_path / "x.npy", spoil(numbers))
    with pytest.raises(UsageError):
        take_in(tmp_path, uri)
    artifact = take_in(tmp_path, uri, on_bad="quarantine")  # goes on with the same draft
    good = np.setdiff1d(np.arange(NUM), [7, 401, 999])
    table = read(artifact)
    assert table["image_id"].to_pylist() == [str(row) for row in good]
    assert np.allclose(matrix(table), unit(numbers[good]), atol=1e-6)
    quarantine = pq.read_table(artifact.path("quarantine.parquet")).to_pylist()
    assert [(row["row"], row["field"], row["reason"], row["source"]) for row in quarantine] == [
        (7, "vector", "not_finite", uri),
        (401, "vector", "zero", uri),
        (999, "vector", "not_finite", uri),
    ]
    assert artifact.stats["refused"] == {"vector: not_finite": 2, "vector: zero": 1}


def test_lists_of_other_sizes_nulls_and_bad_ids_are_named(numbers: Numbers, tmp_path: Path) -> None:
    lists: list[Any] = [row.tolist() for row in numbers[:6]]
    lists[1], lists[2], lists[3] = lists[1][:-1], None, [None, *lists[3][1:]]
    pq.write_table(pa.table({"id": ["a", "b", "c", "d", None, "a"], "v": lists}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"row 1 \('b'\): vector wrong_size: it has 23 numbers, the others have 24"):
        take_in(tmp_path, str(tmp_path / "x.parquet"))
    artifact = take_in(tmp_path, str(tmp_path / "x.parquet"), on_bad="quarantine")
    assert read(artifact)["image_id"].to_pylist() == ["a"]
    rows = pq.read_table(artifact.path("quarantine.parquet")).to_pylist()
    assert [(row["row"], row["field"], row["reason"]) for row in rows] == [
        (1, "vector", "wrong_size"),
        (2, "vector", "null"),
        (3, "vector", "null"),
        (4, "image_id", "null"),
        (5, "image_id", "duplicate"),
    ]
    assert "row 0 of" in rows[4]["detail"]


def test_the_size_of_most_lists_counts_and_not_that_of_the_first(numbers: Numbers, tmp_path: Path) -> None:
    lists = [[], numbers[0, :4].tolist(), *(row.tolist() for row in numbers[1:9])]
    pq.write_table(pa.table({"v": pa.array(lists, pa.list_(pa.float64()))}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"row 0: vector wrong_size: it has 0 numbers, the others have 24.*row 1"):
        take_in(tmp_path, str(tmp_path / "x.parquet"))
    table = read(take_in(tmp_path, str(tmp_path / "x.parquet"), on_bad="quarantine"))
    assert np.allclose(matrix(table), unit(numbers[1:9]), atol=1e-6)


def test_an_id_in_two_files_is_named_with_both_rows(numbers: Numbers, tmp_path: Path) -> None:
    uris = []
    for number, ids in enumerate((["a", "b", "c"], ["d", "b"])):
        vectors = list(numbers[: len(ids)])
        pq.write_table(pa.table({"id": ids, "v": vectors}), tmp_path / f"{number}.parquet")
        uris.append(str(tmp_path / f"{number}.parquet"))
    with pytest.raises(UsageError) as told:
        take_in(tmp_path, uris)
    assert f"the id 'b' stands in row 1 of {uris[0]} and in row 1 of {uris[1]}" in str(told.value)
    assert read(take_in(tmp_path, uris, on_bad="quarantine"))["image_id"].to_pylist() == ["a", "b", "c", "d"]


WRONG: dict[str, tuple[Callable[[Numbers], Any], str]] = {
    "one axis": (lambda x: x[0], r"one list of 24 numbers.*reshape\(1, -1\)"),
    "three axes": (lambda x: x.reshape(NUM, 4, 6), r"shape \(1000, 4, 6\)"),
    "objects": (lambda x: np.array([*map(list, x), [1.0]], object), "never unpickled"),
    "int8": (lambda x: x.astype(np.int8), "int8, whose scale the file does not say; set integers=true"),
    "uint8": (lambda x: x.astype(np.uint8), "uint8: packed bits"),
    "complex": (lambda x: x.astype(np.complex64), "complex64"),
    "bool": (lambda x: x > 0, "holds bool"),
    "text": (lambda x: x.astype(str), "holds str"),
    "bfloat16": (lambda x: x.astype(np.float16).view("V2"), "bfloat16"),
    "no rows": (lambda x: x[:0], "hold no vectors"),
    "no numbers": (lambda x: x[:, :0], r"shape \(1000, 0\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_array_that_holds_no_vectors_is_refused_with_the_rule(wrong: str, numbers: Numbers, tmp_path: Path) -> None:
    make, words = WRONG[wrong]
    with pytest.raises(UsageError, match=words):
        take_in(tmp_path, save(tmp_path / "x.npy", make(numbers)))


def test_integers_are_taken_where_the_user_says_so(numbers: Numbers, tmp_path: Path) -> None:
    scaled = np.round(numbers / np.abs(numbers).max() * 127).astype(np.int8)
    table = read(take_in(tmp_path, save(tmp_path / "x.npy", scaled), integers=True))
    assert np.allclose(matrix(table), unit(scaled), atol=1e-6)


def test_files_that_are_damaged_missing_or_of_another_kind_are_named(numbers: Numbers, tmp_path: Path) -> None:
    whole = Path(save(tmp_path / "x.npy", numbers)).read_bytes()
    cases = {"cut.npy": whole[:-1], "empty.npy": b"", "text.npy": b"1,2,3", "cut.parquet": b"PAR1"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            take_in(tmp_path, str(tmp_path / name))
    with pytest.raises(UsageError, match=r"nothing at .*gone\.npy"):
        take_in(tmp_path, str(tmp_path / "gone.npy"))
    (tmp_path / "x.h5").write_bytes(b"")
    with pytest.raises(UsageError, match=r"not read from files of this ending; endings that are read: \.arrow"):
        take_in(tmp_path, str(tmp_path / "x.h5"))
    other = save(tmp_path / "other.npy", numbers[:, :8])
    with pytest.raises(UsageError, match=rf"{other} holds vectors of 8 numbers, .*x\.npy of 24"):
        take_in(tmp_path, [str(tmp_path / "x.npy"), other])


def test_a_run_that_was_interrupted_goes_on_with_the_next_unit(
    numbers: Numbers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike.data.intake.arrays import NpyFile

    uri, read_rows, begun = save(tmp_path / "x.npy", numbers), NpyFile.pieces, []

    def pieces(self: NpyFile, start: int, stop: int, rows: int) -> Any:
        begun.append(start)
        if start == 600 and begun.count(600) == 1:
            raise KeyboardInterrupt
        return read_rows(self, start, stop, rows)

    monkeypatch.setattr(NpyFile, "pieces", pieces)
    with pytest.raises(KeyboardInterrupt):
        take_in(tmp_path, uri, concurrency=1)
    table = read(take_in(tmp_path, uri, concurrency=1))
    assert begun[:3] == [0, 300, 600]
    assert (begun.count(0), begun.count(300), begun.count(600)) == (1, 1, 2)
    assert np.allclose(matrix(table), unit(numbers), atol=1e-6)


def test_dims_are_powers_of_two_or_as_asked(numbers: Numbers, tmp_path: Path) -> None:
    uri = save(tmp_path / "x.npy", numbers)
    assert take_in(tmp_path, uri, dims=(4, 12)).read_json("meta.json")["dims"] == [4, 12, 24]
    with pytest.raises(UsageError, match=r"dims \[8, 48\] exceed the vectors' 24; drop \[48\]"):
        take_in(tmp_path, uri, dims=(8, 48))


def test_a_preview_says_what_would_be_read_and_writes_nothing(numbers: Numbers, tmp_path: Path) -> None:
    from lookalike.recipe import Recipe

    step = {"stage": "vectors", "settings": {"uri": save(tmp_path / "x.npy", numbers), "model": "m"}}
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({"name": "r", "root": str(tmp_path / "root"), "steps": {"v": step}}))
    lines = Recipe.load(str(file)).preview("v")
    assert lines[0].endswith("x.npy: 1000 vectors of 24, float32")
    assert "1000 vectors in all" in lines[1]
    assert not (tmp_path / "root").exists()
