"""Small files that unpack to a lot cost little memory; what is refused says which bound, and how to raise it."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lookalike.data.sources import bounds
from lookalike.data.sources.bounds import ReadBounds, UnpackedError, limited_memory, open_unpacked
from lookalike.data.sources.image_fetch import fetch_images
from lookalike.data.sources.ingest import take_records
from tests.data.sources.bombs import BOMBS, csv_cells, lance_text, parquet_dictionary, parquet_list
from tests.data.sources.read_alone import read_all

SMALL = {"max_record_bytes": 1 << 16, "max_memory_bytes": 64 << 20}


@pytest.mark.parametrize("name", [name for name in BOMBS if name not in ("rows.parquet", "images.tar.gz")])
def test_what_unpacks_too_far_ends_its_source_or_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(bounds, "FREE_BYTES", 1 << 20)
    kind, settings = BOMBS[name](tmp_path / name, 8)
    found = read_all(str(tmp_path / name), kind, {**settings, "bounds": {**SMALL, "max_ratio": 20}})
    told = " ".join([*found["details"].values(), found["error"] or ""])
    if kind != "parquet":
        assert "bounds.max_r" in told or "header" in told or "array" in told
    assert found["growth_mb"] < 100


def test_a_file_of_more_rows_than_it_can_hold_is_one_record(tmp_path: Path) -> None:
    kind, settings = BOMBS["rows.parquet"](tmp_path / "rows.parquet", 16)
    found = read_all(str(tmp_path / "rows.parquet"), kind, settings)
    assert found["reasons"] == {"claims_too_many_rows": 1}
    assert "raise bounds.max_ratio" in found["details"]["claims_too_many_rows"]


def test_rows_that_need_too_much_memory_are_read_apart_or_refused(tmp_path: Path) -> None:
    """256 rows of 1.5 MB each fit a few at a time; one row of 8 million texts does not."""
    for name, write, megabytes, records, reasons in (
        ("together.parquet", parquet_dictionary, 384, 256, {}),
        ("alone.parquet", parquet_list, 128, 3, {"needs_too_much_memory": 2}),
    ):
        kind, settings = write(tmp_path / name, megabytes)
        done = _alone(tmp_path / name, kind, {**settings, "bounds": SMALL})
        assert done["records"] == records
        assert done["reasons"] == reasons
        assert done["growth_mb"] < 300
    assert "raise bounds.max_memory_bytes" in done["details"]["needs_too_much_memory"]


def test_lance_rows_that_share_a_text_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("lance")
    kind, settings = lance_text(tmp_path / "text.lance", 128)
    done = _alone(tmp_path / "text.lance", kind, {**settings, "bounds": {"max_ratio": 20}})
    assert done["records"] == 256
    assert set(done["reasons"]) == {"unpacks_too_far"}
    assert done["growth_mb"] < 250


def test_the_same_memory_for_a_row_of_any_length(tmp_path: Path) -> None:
    for name, megabytes in (("rows.csv.gz", 192), ("images.tar.gz", 320)):
        kind, settings = BOMBS[name](tmp_path / name, megabytes)
        assert _alone(tmp_path / name, kind, {**settings, "bounds": {"max_ratio": 2000}})["growth_mb"] < 280
    kind, settings = csv_cells(tmp_path / "cells.csv.gz", 64)
    done = _alone(tmp_path / "cells.csv.gz", kind, settings)
    assert done["reasons"] == {"too_long": 1}
    assert done["last"] == ["last"]
    assert done["growth_mb"] < 150


def _alone(path: Path, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What ``read_alone`` prints, from a process of its own."""
    command = [sys.executable, "-m", "tests.data.sources.read_alone", str(path), kind, json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": "platform", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=True, timeout=120)
    return dict(json.loads(done.stdout))


def test_the_limit_of_memory_ends_with_its_block() -> None:
    tight = ReadBounds(max_memory_bytes=64 << 20)
    with pytest.raises(MemoryError), limited_memory(tight):
        bytearray(256 << 20)
    assert len(bytearray(256 << 20)) == 256 << 20


def test_the_ratio_counts_beyond_the_first_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv_cells(tmp_path / "a.csv.gz", 4)
    monkeypatch.setattr(bounds, "FREE_BYTES", 1 << 20)
    with open_unpacked(f"{tmp_path}/a.csv.gz", ReadBounds(max_ratio=2000)) as file:
        assert len(file.read()) > 4 << 20
    with open_unpacked(f"{tmp_path}/a.csv.gz", ReadBounds(max_ratio=20)) as file, pytest.raises(UnpackedError):
        file.read()


def test_batches_hold_so_many_bytes_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("image_fetch", "ingest"):
        monkeypatch.setattr(f"lookalike.data.sources.{module}.BATCH_BYTES", 1000)
    inside = iter([{"image": b"x" * 400}, {"image": {"bytes": b"x" * 600}}, {"image": b"x"}, {"image": None}])
    assert [len(list(take_records(inside))) for _ in range(3)] == [2, 2, 0]
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"y" * 300)
    records: list[dict[str, Any]] = [{"image_uri": f"{number}.png"} for number in range(40)]
    done, rest, counts = 0, records, []
    while rest:
        counts.append(fetch_images(rest, str(tmp_path), 1000))
        rest = rest[counts[-1] :]
        done += counts[-1]
    assert done == 40
    assert all(4 <= count <= 12 for count in counts[:-1])
    assert all(record["image"] == b"y" * 300 for record in records)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_claims_more_than_is_there_costs_nothing(tmp_path: Path, kind: bytes) -> None:
    """512 bytes that claim a long name of a terabyte; tarfile would read it at once."""
    claim = tarfile.TarInfo("a")
    claim.type, claim.size = kind, 1 << 40
    (tmp_path / "a.tar").write_bytes(claim.tobuf(format=tarfile.GNU_FORMAT))
    found = read_all(str(tmp_path / "a.tar"), "webdataset", {})
    assert found["reasons"] == {"damaged_archive": 1}
    assert found["growth_mb"] < 20
