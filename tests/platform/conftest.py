"""Two toy stages that publish in microseconds, and roots on a disk and in memory."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from pydantic import Field

from lookalike import storage
from lookalike.config import runtime
from lookalike.stages import STAGES, Input, Stage, StageConfig, StageRun


class NumberConfig(StageConfig):
    value: int = Field(1, ge=0)
    """Written to the artifact."""
    source: str | None = None
    """A raw file whose content counts."""
    workers: int = runtime(1, ge=1)
    """Changes nothing of the result."""


class SumConfig(StageConfig):
    scale: int = Field(1, ge=1)
    """Factor of the sum."""


def write_number(run: StageRun[NumberConfig]) -> None:
    run.out.write_json("number.json", run.config.value)
    run.out.stats["value"] = run.config.value


def write_sum(run: StageRun[SumConfig]) -> None:
    total = sum(artifact.read_json("number.json") for artifact in run.many("numbers"))
    run.out.write_json("sum.json", total * run.config.scale)


def _sources(config: NumberConfig) -> list[str]:
    return [config.source] if config.source else []


def _preview(run: StageRun[NumberConfig]) -> list[str]:
    return [f"{run.out.name} will be {run.config.value}"]


NUMBER = Stage("toy-number", "number", NumberConfig, write_number, sources=_sources, preview=_preview)
SUM = Stage("toy-sum", "sum", SumConfig, write_sum, inputs={"numbers": Input("number", many=True)})


@pytest.fixture
def toy_stages() -> None:
    """Make the toy stages known by name, for recipes."""
    for stage in (NUMBER, SUM):
        if stage.name not in STAGES:
            STAGES.register(stage.name)(stage)


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A root on each kind of store."""
    if request.param == "disk":
        yield str(tmp_path / "root")
        return
    uri = f"memory://root-{uuid.uuid4().hex[:8]}"
    yield uri
    storage.remove_tree(uri)
    assert isinstance(storage.resolve(uri)[0], fsspec.get_filesystem_class("memory"))
