"""Accidents of the corpus stage: killed workers and drivers, a full disk, a damaged file; the result is the same."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from lookalike import storage
from lookalike.artifacts import Artifact, Draft
from lookalike.data.corpus import STAGE, CorpusConfig, plan_units
from lookalike.data.sources.ingest import UnitFiles, check_unit
from lookalike.errors import CorpusError, LookalikeError
from lookalike.stages import fingerprint
from tests.data.conftest import make_rows
from tests.data.test_corpus import build, write_source


def content(artifact: Artifact) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


def many_rows(folder: Path, count: int = 160) -> str:
    """A source that takes some seconds: every record an image of some size, every tenth id repeated."""
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.effect_noise((500, 500), 60 + number % 5).save(buffer, "PNG")
        rows.append(
            {
                "image_id": f"{number - 60 if number % 10 == 9 and number > 60 else number}",
                "image": buffer.getvalue(),
                "title": "t",
                "keywords": [],
                "split": "train",
            }
        )
    return write_source(str(folder), 20, rows)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_damaged_row_group_is_a_clear_error_and_what_was_done_is_kept(tmp_path: Path, root: str) -> None:
    uri = write_source(f"{tmp_path}", 10)
    data = bytearray(Path(uri).read_bytes())
    column = pq.read_metadata(uri).row_group(3).column(1)
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    Path(uri).write_bytes(data)
    with pytest.raises(CorpusError, match=r"source.parquet cannot be read .*replace or remove it, or run again"):
        build(root, uri, rows_per_part=10)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_finished_units_are_not_read_again(tmp_path: Path, root: str) -> None:
    uri = write_source(f"{tmp_path}", 10)
    calm = build(f"{root}/calm", uri, rows_per_part=10)
    config = CorpusConfig.model_validate({"sources": [{"uri": uri, "dataset": "shapes"}], "rows_per_part": 10})
    draft = Draft(root, "corpus", "c", fingerprint(STAGE, config, {}))
    places = UnitFiles(draft.uri, draft.work())
    items = plan_units(config)
    for item in items[:4]:  # an attempt that was killed after four units, and in the fifth
        check_unit(item["number"], json.loads(item["unit"]), config.reader(0), places, config.checks)
    (Path(draft.uri) / "part-000004-0000.parquet.1234.tmp").write_bytes(b"half")
    times = {
        name: os.stat(f"{draft.uri}/{name}").st_mtime_ns
        for name in storage.list_files(draft.uri)
        if name.startswith("part-00000")
    }
    resumed = build(root, uri, rows_per_part=10)
    assert content(resumed) == content(calm)
    assert resumed.stats == calm.stats
    kept = [name[:11] for name, at in times.items() if os.stat(f"{resumed.uri}/{name}").st_mtime_ns == at]
    assert kept == ["part-000000", "part-000001", "part-000003"]  # part 2 loses a duplicate, as ever
    assert sorted(os.listdir(resumed.uri)) == sorted([*content(resumed), "manifest.json"])


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_changes_nothing(tmp_path: Path, root: str) -> None:
    uri = many_rows(tmp_path)
    calm = build(f"{root}/calm", uri, rows_per_part=20)
    killed: list[int] = []

    def kill() -> None:
        while not list(Path(root).glob("corpus/c/*/_work/summaries/*.json")):
            time.sleep(0.01)
        while not killed and not list(Path(root).glob("corpus/c/*/manifest.json")):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it may have ended meanwhile
                    if not killed and child.cmdline()[:1] == ["ray::MapBatches(each)"]:
                        child.kill()
                        killed.append(child.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    accident = build(root, uri, rows_per_part=20)
    thread.join()
    assert killed
    assert (content(accident), accident.stats) == (content(calm), calm.stats)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.usefixtures("ray_session")
def test_a_killed_driver_resumes(tmp_path: Path) -> None:
    uri = many_rows(tmp_path)
    settings = {"sources": [{"uri": uri, "dataset": "shapes"}], "rows_per_part": 20}
    recipe = {
        "name": "r",
        "root": f"{tmp_path}/killed",
        "cluster": {"num_cpus": 1, "object_store_mb": 100},
        "steps": {"c": {"stage": "corpus", "settings": settings}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "lookalike.cli", "corpus", str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        while len(list(tmp_path.glob("killed/corpus/c/*/_work/summaries/*.json"))) < 3:
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
    (draft,) = (tmp_path / "killed/corpus/c").iterdir()
    assert not (draft / "manifest.json").exists()
    time.sleep(3)  # its Ray processes notice that the driver is gone
    before = {path: path.stat().st_mtime_ns for path in draft.glob("part-*.parquet")}
    resumed, calm = build(f"{tmp_path}/killed", uri, rows_per_part=20), build(f"{tmp_path}/calm", uri, rows_per_part=20)
    assert resumed.uri == str(draft)
    assert (content(resumed), resumed.stats) == (content(calm), calm.stats)
    untouched = [path for path, at in before.items() if path.exists() and path.stat().st_mtime_ns == at]
    assert untouched  # finished units without a repeated id are neither read nor written again


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_is_told_and_a_rerun_with_space_completes(tmp_path: Path, small_disk: Path) -> None:
    root = str(small_disk)
    rows = [{**row, "image_id": f"x{row['image_id']}"} for row in make_rows(20)]
    published = build(root, write_source(f"{tmp_path}", 100, rows), "published")
    (tmp_path / "big").mkdir()
    uri = many_rows(tmp_path / "big", 40)  # about 8 MB
    with pytest.raises(LookalikeError, match=r"no space left to write .*run again: finished work is kept"):
        build(root, uri, rows_per_part=4)
    left = [str(path) for path in small_disk.rglob("*.tmp")]
    assert left == []
    assert Artifact.open(published.uri).stats == published.stats
    assert list(small_disk.glob("corpus/c/*/_work/summaries/*.json"))
    subprocess.run(["mount", "-o", "remount,size=64m", root], check=True)
    completed = build(root, uri, rows_per_part=4)
    assert content(completed) == content(build(str(tmp_path / "elsewhere"), uri, rows_per_part=4))
