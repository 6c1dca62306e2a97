"""``lookalike show``: the facts of an artifact and its lineage; a broken ancestor is told by the exit code."""

import json
from pathlib import Path

import pytest

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.cli import main
from lookalike.stages import execute
from tests.platform.conftest import NUMBER, SUM, NumberConfig, SumConfig


@pytest.fixture
def total(tmp_path: Path) -> Artifact:
    numbers = [execute(NUMBER, NumberConfig(value=v), {}, str(tmp_path), f"n{v}") for v in (1, 2)]
    return execute(SUM, SumConfig(scale=3), {"numbers": numbers}, str(tmp_path), "total")


def test_show_prints_facts_and_lineage(total: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", total.uri, "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"sum 'total'  {total.uri}"
    assert "    sum.json  2 bytes" in lines
    assert "  scale: 3" in lines
    tree = lines[lines.index("lineage") + 1 :]
    assert [line.rsplit("  ", 1)[0] for line in tree] == [
        f"  this: sum 'total' {total.manifest.fingerprint}",
        *(
            f"    numbers: number 'n{v}' {Artifact.open(uri).manifest.fingerprint}"
            for v, (_, _, uri) in zip((1, 2), total.parents(), strict=True)
        ),
    ]


def test_show_json_is_the_manifest(total: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", total.uri, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == total.manifest.model_dump(mode="json")


def test_a_lost_ancestor_is_shown_and_exits_3(total: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    storage.remove_tree(next(uri for _, _, uri in total.parents()))
    assert main(["show", total.uri]) == 3
    out = capsys.readouterr().out
    assert "numbers: BROKEN: no artifact at" in out
    assert "numbers: number 'n2'" in out


def test_damage_and_absence_exit_3(total: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    storage.write_atomic(total.path("sum.json"), b"0")
    assert main(["show", total.uri]) == 3
    assert "is damaged: sum.json has 1 bytes, expected 2" in capsys.readouterr().err
    assert main(["show", total.uri + "x"]) == 3
    assert "it is not there" in capsys.readouterr().err
