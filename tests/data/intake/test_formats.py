"""Every format gives the vectors that were written, whatever the units; tables are joined by row and by id."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from lookalike.artifacts import Artifact
from lookalike.data.vectors import STAGE, VectorsConfig
from lookalike.errors import UsageError
from lookalike.stages import execute

NUM, DIM = 700, 16
Numbers = np.ndarray[Any, np.dtype[Any]]
NAMES = [f"p-{n:03d}" for n in range(NUM)]


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    found: Numbers = np.random.default_rng(6).normal(size=(NUM, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def take_in(tmp_path: Path, uri: Any, name: str = "v", **settings: Any) -> Artifact:
    config = VectorsConfig(uri=str(uri), **{"model": "m", "rows_per_part": 150, **settings})
    return execute(STAGE, config, {}, str(tmp_path / "root"), name)


def read(artifact: Artifact) -> tuple[list[str], Numbers, pa.Table]:
    table = pa.concat_tables(pq.read_table(uri) for uri in artifact.files("part-", ".parquet"))
    return table["image_id"].to_pylist(), np.stack([np.asarray(row) for row in table["vector"].to_pylist()]), table


def as_table(numbers: Numbers) -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), DIM).cast(pa.list_(pa.float32()))
    return pa.table({"vec": vectors, "id": NAMES, "category": [f"c{n % 3}" for n in range(NUM)]})


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=90)


def write_hf(folder: Path, table: pa.Table) -> Path:
    folder.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 400), table.slice(400)), strict=True):
        write_stream(folder / name, part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_file(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=90)
    return path


def write_feather(path: Path, table: pa.Table) -> Path:
    pyarrow.feather.write_feather(table, str(path), compression="lz4", chunksize=90)
    return path


def write_lance(path: Path, table: pa.Table) -> Path:
    lance = pytest.importorskip("lance")
    lance.write_dataset(table, str(path), max_rows_per_file=300)
    return path


def write_arrow_stream(path: Path, table: pa.Table) -> Path:
    write_stream(path, table)
    return path


TABLES: dict[str, tuple[str, Callable[[Path, pa.Table], Path]]] = {
    "Arrow with a footer": ("x.arrow", write_file),
    "Arrow stream": ("x.arrow", write_arrow_stream),
    "Feather": ("x.feather", write_feather),
    "Hugging Face": ("dataset", write_hf),
    "Lance": ("x.lance", write_lance),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("rows_per_part", [37, 5000])
def test_a_table_is_taken_in_whatever_its_format(
    kind: str, rows_per_part: int, numbers: Numbers, tmp_path: Path
) -> None:
    name, write = TABLES[kind]
    path = write(tmp_path / name, as_table(numbers))
    ids, vectors, table = read(take_in(tmp_path, path, rows_per_part=rows_per_part))
    assert ids == NAMES
    assert np.allclose(vectors, numbers, atol=1e-6)
    assert table["category"].to_pylist() == [f"c{n % 3}" for n in range(NUM)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_an_npz_is_taken_in(save: Any, order: str, numbers: Numbers, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", emb=np.asarray(numbers, order=order), other=np.zeros(3))
    with pytest.raises(UsageError, match="holds the arrays emb, other; set array to one"):
        take_in(tmp_path, tmp_path / "x.npz")
    _, vectors, _ = read(take_in(tmp_path, tmp_path / "x.npz", array="emb"))
    assert np.allclose(vectors, numbers, atol=1e-6)


def write_npy(path: Path, table: pa.Table) -> Path:
    np.save(path, np.stack(table["vec"].to_pylist()).astype(np.float32))
    return path


def write_npz(path: Path, table: pa.Table) -> Path:
    np.savez_compressed(path, x=np.stack(table["vec"].to_pylist()).astype(np.float32))
    return path


def write_parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path, row_group_size=200)
    return path


DAMAGED: dict[str, Callable[[Path, pa.Table], Path]] = {
    "x.npy": write_npy,
    "x.npz": write_npz,
    "x.parquet": write_parquet,
    "x.arrow": write_file,
    "x.feather": write_feather,
    "stream.arrow": write_arrow_stream,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused_by_name_or_leaves_vectors(name: str, numbers: Numbers, tmp_path: Path) -> None:
    """Bytes changed at random and files cut off end in an error for users, never in one of a library."""
    path = DAMAGED[name](tmp_path / name, as_table(numbers))
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    told = 0
    for number in range(25):
        content = bytearray(whole)
        if number % 3 == 0:
            del content[int(generator.integers(len(content))) :]
        else:
            region = (
                len(content) if number % 3 == 1 else min(400, len(content))
            )  # headers and footers, half of the time
            for place in generator.integers(0, region, 4).tolist():
                content[-place - 1 if number % 2 else place] = int(generator.integers(256))
        path.write_bytes(bytes(content))
        try:
            _, vectors, _ = read(take_in(tmp_path, path, name=f"v{number}"))
        except UsageError as error:
            told += name in str(error)
            continue
        told += bool(np.isfinite(vectors).all())
    assert told == 25


def flat(numbers: Numbers) -> Any:
    index = faiss.IndexFlatIP(DIM)
    index.add(numbers)
    return index


def ivf(numbers: Numbers, ids: Any = None) -> Any:
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, 8, faiss.METRIC_INNER_PRODUCT)
    index.own_fields = False
    index.train(numbers)
    if ids is None:
        index.add(numbers)
    else:
        index.add_with_ids(numbers, ids)
    return index


def with_ids(numbers: Numbers) -> Any:
    index = faiss.IndexIDMap2(faiss.IndexFlatL2(DIM))
    index.add_with_ids(numbers, np.arange(NUM) * 3 + 5)
    return index


FAISS: dict[str, tuple[Callable[[Numbers], Any], Callable[[int], int]]] = {
    "flat": (flat, lambda row: row),
    "IVF": (ivf, lambda row: row),
    "flat with ids": (with_ids, lambda row: 3 * row + 5),
    "IVF with ids": (lambda x: ivf(x, np.arange(NUM)[::-1] * 3 + 5), lambda row: 3 * (NUM - 1 - row) + 5),
}


@pytest.mark.parametrize("kind", FAISS)
def test_an_index_of_faiss_gives_back_its_vectors(kind: str, numbers: Numbers, tmp_path: Path) -> None:
    make, id_of = FAISS[kind]
    faiss.write_index(make(numbers), str(tmp_path / "x.faiss"))
    ids, vectors, _ = read(take_in(tmp_path, tmp_path / "x.faiss"))
    found = dict(zip(ids, vectors, strict=True))
    assert set(found) == {str(id_of(row)) for row in range(NUM)}
    assert np.allclose([found[str(id_of(row))] for row in range(NUM)], numbers, atol=1e-6)


def test_an_index_of_faiss_that_keeps_no_vectors_is_refused_by_name(numbers: Numbers, tmp_path: Path) -> None:
    for description in ("HNSW8", "PQ4x4np", "IVF4,SQ8"):
        index = faiss.index_factory(DIM, description)
        index.train(numbers)
        index.add(numbers)
        faiss.write_index(index, str(tmp_path / "x.faiss"))
        with pytest.raises(UsageError, match=rf"x\.faiss is a {type(index).__name__}, .*give an IndexFlat"):
            take_in(tmp_path, tmp_path / "x.faiss")
    (tmp_path / "cut.faiss").write_bytes(b"IxFI\x10")
    with pytest.raises(UsageError, match=r"cut\.faiss is not a whole index of FAISS"):
        take_in(tmp_path, tmp_path / "cut.faiss")


def write_text(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        cells = [[str(value) for value in row.values()] for row in rows]
        lines = [delimiter.join(line) for line in [list(rows[0]), *cells]]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.feather"])
def test_a_table_beside_the_vectors_gives_ids_and_columns_by_row(name: str, numbers: Numbers, tmp_path: Path) -> None:
    rows = [{"sku": f"{n:04d}", "caption": f"thing {n}", "group": f"g{n % 5}"} for n in range(NUM)]
    path = tmp_path / name
    if path.suffix in (".parquet", ".feather"):
        table = pa.Table.from_pylist(rows)
        write = write_feather if path.suffix == ".feather" else lambda p, t: pq.write_table(t, p, row_group_size=64)
        write(path, table)
    else:
        write_text(path, rows, "\t" if path.suffix == ".tsv" else ",")
    np.save(tmp_path / "x.npy", numbers)
    settings = {"table": {"uri": str(path), "id_column": "sku"}, "columns": {"title": "caption"}}
    ids, vectors, made = read(take_in(tmp_path, tmp_path / "x.npy", **settings))
    assert ids == [f"{n:04d}" for n in range(NUM)]  # 0007 stays a text
    assert made["title"].to_pylist() == [f"thing {n}" for n in range(NUM)]
    assert made["group"].to_pylist() == [f"g{n % 5}" for n in range(NUM)]
    assert np.allclose(vectors, numbers, atol=1e-6)


def test_a_table_in_utf_16_is_read(numbers: Numbers, tmp_path: Path) -> None:
    """As spreadsheets write it."""
    text = "id;title\n" + "".join(f"n{n};st\N{LATIN SMALL LETTER U WITH DIAERESIS}ck {n}\n" for n in range(NUM))
    (tmp_path / "t.csv").write_bytes(text.encode("utf-16"))
    np.save(tmp_path / "x.npy", numbers)
    ids, _, made = read(take_in(tmp_path, tmp_path / "x.npy", table={"uri": str(tmp_path / "t.csv")}))
    assert (ids[3], made["title"][3].as_py()) == ("n3", "st\N{LATIN SMALL LETTER U WITH DIAERESIS}ck 3")


@pytest.mark.parametrize("state", ["[]", '"x"', "{}", '{"_data_files": [1]}', '{"_data_files": 3}', "no JSON"])
def test_a_damaged_state_of_a_data_set_is_told(tmp_path: Path, state: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(UsageError, match="is not readable as a data set of Hugging Face"):
        take_in(tmp_path, tmp_path / "set")


def test_a_table_is_joined_by_id_where_both_have_ids(numbers: Numbers, tmp_path: Path) -> None:
    pq.write_table(as_table(numbers), tmp_path / "x.parquet")
    order = np.random.default_rng(3).permutation(NUM)
    rows = [{"id": NAMES[n], "title": f"thing {n}"} for n in order]
    table = write_text(tmp_path / "t.csv", [*rows, {"id": "p-999", "title": "of no vector"}])
    ids, _, made = read(take_in(tmp_path, tmp_path / "x.parquet", table={"uri": table}))
    assert ids == NAMES
    assert made["title"].to_pylist() == [f"thing {n}" for n in range(NUM)]
    short = write_text(tmp_path / "short.csv", [row for row in rows if row["id"] != "p-005"])
    with pytest.raises(UsageError, match=r"row 5 \('p-005'\): image_id not_in_table: the table has no row of this id"):
        take_in(tmp_path, tmp_path / "x.parquet", table={"uri": short})
    left = take_in(tmp_path, tmp_path / "x.parquet", table={"uri": short}, on_bad="quarantine")
    assert read(left)[0] == [name for name in NAMES if name != "p-005"]


def test_a_table_that_cannot_be_joined_is_refused(numbers: Numbers, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbers)
    rows = [{"id": f"n{n}", "title": f"thing {n}"} for n in range(NUM)]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"uri": write_text(tmp_path / "few.csv", rows[1:])}, "has 699 rows, the files hold 700 vectors"),
        ({"uri": write_text(tmp_path / "a.csv", rows), "join": "id"}, r"x\.npy has no ids to join by"),
        ({"uri": write_text(tmp_path / "b.csv", rows), "id_column": "idd"}, r"no column 'idd' \(did you mean 'id'\?\)"),
        ({"uri": str(tmp_path / "gone.csv")}, "gone.csv"),
        ({"uri": write_text(tmp_path / "c.jsonl", [{"x": 1}])}, "neither ids nor a column of group, view"),
        ({"uri": write_text(tmp_path / "d.csv", [{"id": "a,b", "title": "t"}])}, "line 2: 3 cells for 2 columns"),
        ({"uri": str(tmp_path / "e.csv")}, "has two columns 'title'; rename or remove one"),
    ]
    (tmp_path / "e.csv").write_text("id,title,title\na,b,c\n")
    for table, words in cases:
        with pytest.raises(UsageError, match=words):
            take_in(tmp_path, tmp_path / "x.npy", table=table)
    pq.write_table(as_table(numbers), tmp_path / "x.parquet")
    twice = write_text(tmp_path / "twice.csv", [{"id": NAMES[0], "title": "a"}, *rows, {"id": NAMES[0], "title": "b"}])
    with pytest.raises(UsageError, match="holds the id 'p-000' in rows 0 and 701"):
        take_in(tmp_path, tmp_path / "x.parquet", table={"uri": twice})


def test_columns_that_hold_no_vectors_are_told_apart(numbers: Numbers, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = as_table(numbers)
    cases: list[tuple[pa.Table, dict[str, Any], str]] = [
        (table.append_column("tags", pa.array([[1]] * NUM)), {}, r"several columns of lists \(vec, tags\)"),
        (table.drop_columns(["vec"]), {}, "no column with lists of numbers"),
        (table, {"vector_column": "vek"}, r"no column 'vek' \(did you mean 'vec'\?\)"),
        (table, {"vector_column": "id"}, "column 'id' is string, and vectors are lists of numbers"),
        (table, {"columns": {"title": "caption"}}, "has no column 'caption'"),
    ]
    for made, settings, words in cases:
        pq.write_table(made, path)
        with pytest.raises(UsageError, match=words):
            take_in(tmp_path, path, **settings)
    with pytest.raises(ValueError, match="columns names 'price'"):
        take_in(tmp_path, path, columns={"price": "price"})


def test_a_dataset_of_hugging_face_with_splits_or_an_order_apart_is_refused(numbers: Numbers, tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    write_hf(both / "train", as_table(numbers))
    (both / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(UsageError, match="holds the splits train, test; give the folder of one"):
        take_in(tmp_path, both)
    state = both / "train" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(UsageError, match="flatten_indices"):
        take_in(tmp_path, both / "train")
    state.write_text(json.dumps({"_data_files": [{"filename": "../../secret.arrow"}]}))
    with pytest.raises(UsageError, match="lies outside the folder"):
        take_in(tmp_path, both / "train")
