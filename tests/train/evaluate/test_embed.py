"""The embedding job: the same vectors as the encoder's own, by either path, through accidents, and no damage hidden."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.config import parse_config
from lookalike.errors import ArtifactError, UsageError
from lookalike.stages import StageRun, execute
from lookalike.train.evaluate import embed as module
from lookalike.train.evaluate.embed import STAGE, DecodeFile, EmbedConfig, EmbedFile, embed
from lookalike.train.evaluate.embed_files import part_name, require_finite
from lookalike.vision.encoder import Encoder, read_config
from tests.train.encoders import publish_corpus, publish_encoder

FILES, GROUPS, ROWS = 3, 2, 5


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, list[Artifact]]:
    root = str(tmp_path / "root")
    return {"corpus": [publish_corpus(root, FILES, GROUPS, ROWS)], "encoder": [publish_encoder(root)]}


def settings(**values: Any) -> EmbedConfig:
    return parse_config(EmbedConfig, {"num_actors": 1, "batch_size": 4, **values}, "step 'vectors'")


def run_here(inputs: Mapping[str, list[Artifact]], out: Draft, decode: bool = False, **values: Any) -> None:
    """What the actors do, in this process, without Ray."""
    config, encoder = settings(**values), inputs["encoder"][0]
    actor = EmbedFile(encoder.uri, out.uri, out.work("groups"), config)
    decoder = DecodeFile(read_config(encoder).transform, out.work("groups"), config.where)
    for number, uri in enumerate(inputs["corpus"][0].files("part-", ".parquet")):
        task = {"uri": uri, "number": number, "row_group": None, "pixels": None}
        for each in decoder.groups(task) if decode else [task]:
            actor.embed(each)


def draft(tmp_path: Path, name: str = "vectors") -> Draft:
    return Draft(str(tmp_path / "root"), "embeddings", name, "v" * 20)


def parts(out: Draft) -> dict[str, bytes]:
    return {name: storage.read_bytes(out.path(name)) for name in storage.list_files(out.uri) if name.startswith("part")}


def rows_of(out: Draft) -> list[dict[str, Any]]:
    return [row for name in sorted(parts(out)) for row in pq.read_table(storage.local_path(out.path(name))).to_pylist()]


def corpus_rows(corpus: Artifact) -> list[dict[str, Any]]:
    return [row for uri in corpus.files("part-") for row in pq.read_table(storage.local_path(uri)).to_pylist()]


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("where", [{}, {"view": ["left"]}])
def test_a_part_a_file_holds_the_encoder_s_own_vectors_in_order(
    inputs: dict[str, list[Artifact]], tmp_path: Path, decode: bool, where: dict[str, list[str]]
) -> None:
    out = draft(tmp_path)
    run_here(inputs, out, decode, where=where)
    assert list(parts(out)) == [part_name(n) for n in range(FILES)]
    kept = [row for row in corpus_rows(inputs["corpus"][0]) if not where or row["view"] in where["view"]]
    found = rows_of(out)
    assert [row["image_id"] for row in found] == [row["image_id"] for row in kept]
    assert all(row["title"] == was["title"] for row, was in zip(found, kept, strict=True))
    expected = Encoder.load(inputs["encoder"][0]).encode([row["image"] for row in kept])
    assert np.allclose(np.array([row["vector"] for row in found]), expected, atol=1e-5)


def test_both_paths_write_the_same_bytes(inputs: dict[str, list[Artifact]], tmp_path: Path) -> None:
    outs = [draft(tmp_path, name) for name in ("alone", "fed")]
    for out, decode in zip(outs, (False, True), strict=True):
        run_here(inputs, out, decode)
    assert parts(outs[0]) == parts(outs[1])


@pytest.mark.parametrize("decode", [False, True])
def test_a_corpus_of_an_older_version_is_read(inputs: dict[str, list[Artifact]], tmp_path: Path, decode: bool) -> None:
    now, then = draft(tmp_path, "now"), draft(tmp_path, "then")
    run_here(inputs, now)
    for uri in inputs["corpus"][0].files("part-", ".parquet"):
        table = pq.read_table(storage.local_path(uri)).drop_columns(["attributes"])
        pq.write_table(table, storage.local_path(uri), row_group_size=ROWS)
    run_here(inputs, then, decode)
    assert parts(then) == parts(now)


def test_what_is_done_is_not_done_again(
    inputs: dict[str, list[Artifact]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, out = draft(tmp_path, "calm"), draft(tmp_path)
    run_here(inputs, calm)
    count = 0
    encode = Encoder.encode_pixels

    def dying(self: Encoder, pixels: Any) -> Any:
        nonlocal count
        count += len(pixels)
        if count > 12:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode_pixels", dying)
    with pytest.raises(KeyboardInterrupt):
        run_here(inputs, out)
    assert list(parts(out)) == [part_name(0)]
    monkeypatch.setattr(Encoder, "encode_pixels", encode)
    kept = storage.list_files(out.work("groups"))
    assert len(kept) == 2  # 12 rows into the third row group of five
    before = {name: os.stat(storage.local_path(out.work("groups", name))).st_mtime_ns for name in kept}
    run_here(inputs, out, decode=True)
    after = {name: os.stat(storage.local_path(out.work("groups", name))).st_mtime_ns for name in kept}
    assert before == after
    assert parts(out) == parts(calm)


def test_half_precision_is_stored_and_computed(inputs: dict[str, list[Artifact]], tmp_path: Path) -> None:
    out, exact = draft(tmp_path), draft(tmp_path, "exact")
    run_here(inputs, out, dtype="float16", precision="bfloat16")
    run_here(inputs, exact)
    table = pq.read_table(storage.local_path(out.path(part_name(0))))
    assert str(table.schema.field("vector").type.value_type) == "halffloat"
    half, full = (np.array([row["vector"] for row in rows_of(o)], np.float64) for o in (out, exact))
    cosines = (half * full).sum(axis=1) / np.linalg.norm(half, axis=1) / np.linalg.norm(full, axis=1)
    assert 0.995 < cosines.min() < 1.0 - 1e-7


def test_half_floats_on_a_cpu_are_refused(inputs: dict[str, list[Artifact]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="precision 'float16' needs a GPU; on a CPU set precision=bfloat16 or"):
        Encoder.load(inputs["encoder"][0], precision="float16")


def damage_image(corpus: Artifact, file: int, row: int) -> str:
    uri = corpus.files("part-")[file]
    table = pq.read_table(storage.local_path(uri))
    images = table["image"].to_pylist()
    images[row] = images[row][: len(images[row]) // 2]
    place = table.schema.get_field_index("image")
    pq.write_table(
        table.set_column(place, table.schema.field("image"), [images]), storage.local_path(uri), row_group_size=ROWS
    )
    return uri


@pytest.mark.parametrize("decode", [False, True])
def test_an_image_damaged_since_is_named(inputs: dict[str, list[Artifact]], tmp_path: Path, decode: bool) -> None:
    uri = damage_image(inputs["corpus"][0], file=1, row=7)
    with pytest.raises(ArtifactError, match=rf"image 'id-0017' in row group 1 of {uri}: .*The corpus accepted it"):
        run_here(inputs, draft(tmp_path), decode)


@pytest.mark.parametrize("decode", [False, True])
def test_a_damaged_row_group_is_named(inputs: dict[str, list[Artifact]], tmp_path: Path, decode: bool) -> None:
    uri = inputs["corpus"][0].files("part-")[2]
    path = storage.local_path(uri)
    meta = pq.read_metadata(path).row_group(1).column(1)
    with open(path, "r+b") as file:
        file.seek(meta.data_page_offset)
        file.write(b"\xff" * 64)
    with pytest.raises(ArtifactError, match=rf"{uri}, row group 1 cannot be read: .*if the file is damaged"):
        run_here(inputs, draft(tmp_path), decode)


@pytest.mark.parametrize("decode", [False, True])
def test_a_file_that_is_cut_off_is_named(inputs: dict[str, list[Artifact]], tmp_path: Path, decode: bool) -> None:
    path = Path(storage.local_path(inputs["corpus"][0].files("part-")[0]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=rf"{path} cannot be read"):
        run_here(inputs, draft(tmp_path), decode)


def test_vectors_that_are_not_finite_are_refused_by_image(inputs: dict[str, list[Artifact]]) -> None:
    table = pq.read_table(storage.local_path(inputs["corpus"][0].files("part-")[0]))
    vectors = np.ones((table.num_rows, 3), np.float32)
    vectors[4, 1] = 70_000.0
    require_finite(vectors, table, "float32", "here")
    with pytest.raises(UsageError, match=r"image 'id-0004' in here is not finite in float16; set dtype=float32"):
        require_finite(vectors, table, "float16", "here")
    vectors[2] = np.nan
    with pytest.raises(UsageError, match=r"image 'id-0002' in here is not finite in float32"):
        require_finite(vectors, table, "float32", "here")


def kill_once(config_path: Path) -> None:
    """Die as a worker does that runs out of memory, the first time this is reached."""
    try:
        config_path.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class DyingEmbedFile(EmbedFile):
    """Kills its process in the middle of the second file, once."""

    def _embed(self, task: dict[str, Any], group: int) -> None:
        if (task["number"], group) == (1, 1):
            kill_once(Path(self.work).parent / "killed")
        super()._embed(task, group)


@pytest.mark.ray
@pytest.mark.parametrize("decoders", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_killed_actor_s_work_is_done_again_with_the_same_bytes(
    inputs: dict[str, list[Artifact]], tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, decoders: int
) -> None:
    calm, out = draft(tmp_path, "calm"), draft(tmp_path)
    run_here(inputs, calm)
    storage.make_directory(out.work())
    monkeypatch.setattr(module, "EmbedFile", DyingEmbedFile)
    embed(StageRun(settings(decoders=decoders), inputs, out))
    assert Path(storage.local_path(out.work("killed"))).exists()
    assert parts(out) == parts(calm)
    assert out.stats == {"rows": FILES * GROUPS * ROWS, "dim": 16, "parts": FILES}


@pytest.mark.ray
def test_the_stage_publishes_and_a_worker_s_error_arrives_plain(
    inputs: dict[str, list[Artifact]], tmp_path: Path, ray_session: None
) -> None:
    artifact = execute(STAGE, settings(), inputs, str(tmp_path / "root"), "vectors")
    meta = artifact.read_json("meta.json")
    assert meta == {"dim": 16, "dims": [4, 16], "rows": 30, "encoder": {"fingerprint": "e" * 20, "name": "tiny"}}
    assert [entry.rows for entry in artifact.manifest.files if entry.rows] == [10, 10, 10]
    assert not storage.exists(artifact.path("_work"))
    damage_image(inputs["corpus"][0], file=0, row=0)
    with pytest.raises(ArtifactError, match=r"^image 'id-0000' in row group 0 of"):
        execute(STAGE, settings(seed=2), inputs, str(tmp_path / "root"), "again")
