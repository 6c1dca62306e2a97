import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lookalike.artifacts import Artifact
from lookalike.data.corpus import STAGE, CorpusConfig
from lookalike.errors import CorpusError
from lookalike.stages import execute

from .conftest import make_rows


def write_source(folder: str, row_group: int) -> str:
    """A source with every kind of bad record; its ids repeat across row groups."""
    rows = make_rows(60)
    rows[5]["image"], rows[6]["image"], rows[7]["image"] = b"", rows[7]["image"][:100], b"no image at all"
    rows[20]["image_id"] = rows[45]["image_id"] = rows[3]["image_id"]
    rows[21]["image_id"] = None
    rows[30]["title"] = ""
    table = pa.table({key: [row[key] for row in rows] for key in ("image_id", "image", "title", "keywords", "split")})
    uri = f"{folder}/source.parquet"
    pq.write_table(table, uri, row_group_size=row_group)
    return uri


def build(root: str, uri: str, name: str = "c", **settings: object) -> Artifact:
    source = {"uri": uri, "dataset": "shapes", **settings}
    return execute(STAGE, CorpusConfig.model_validate({"sources": [source]}), {}, root, name)


def read(artifact: Artifact) -> list[dict[str, object]]:
    return [row for uri in artifact.files("part-") for row in pq.ParquetFile(uri).read().to_pylist()]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_corpus_is_the_same_for_any_row_groups_and_loses_nothing(tmp_path: object, root: str) -> None:
    small = build(root, write_source(f"{tmp_path}", 7), "small")
    large = build(root, write_source(f"{tmp_path}", 1000), "large")
    assert len(small.files("part-")) == 9
    assert read(small) == read(large)
    assert small.stats == large.stats == {
        "images": 54, "datasets": {"shapes": {"test": 4, "train": 50}}, "quarantine_rows": 7,
        "quarantine": {"image: empty": 1, "image: not_an_image": 1, "image: truncated": 1, "image_id: duplicate": 2,
                       "image_id: null": 1, "title: repaired: empty": 1},
    }  # fmt: skip
    bad = pq.ParquetFile(small.path("quarantine.parquet")).read().to_pylist()
    assert [row["row"] for row in bad] == [5, 6, 7, 20, 21, 30, 45]
    assert {row["source"] for row in bad} == {f"{tmp_path}/source.parquet"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_corpus_without_one_good_record_is_refused_and_harms_nothing(tmp_path: object, root: str) -> None:
    good = build(root, write_source(f"{tmp_path}", 50))
    uri = f"{tmp_path}/bad.parquet"
    pq.write_table(pa.table({"image_id": ["a"], "image": [b"zzz"]}), uri)
    with pytest.raises(CorpusError, match=r"none of the records is acceptable.*not_an_image"):
        build(root, uri)
    assert Artifact.open(good.uri).stats == good.stats


def test_wrong_sources_are_explained_before_any_work(tmp_path: object, root: str) -> None:
    uri = write_source(f"{tmp_path}", 50)
    with pytest.raises(CorpusError, match=r"column 'name', mapped to 'title', is absent.*the file has image_id"):
        build(root, uri, columns={"title": "name"})
    with open(f"{tmp_path}/fake.parquet", "wb") as file:
        file.write(b"not parquet")
    with pytest.raises(CorpusError, match="no readable parquet file"):
        build(root, f"{tmp_path}/fake.parquet")
