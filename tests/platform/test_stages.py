"""The runner: skip what is done, survive a crash, continue where a stage can, name results by what shapes them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lookalike import storage
from lookalike.artifacts import Artifact
from lookalike.errors import ArtifactError, UsageError
from lookalike.stages import BUILT_IN, Input, Stage, StageConfig, StageRun, execute, fingerprint, get_stage
from tests.platform.conftest import NUMBER, SUM, NumberConfig, SumConfig


def test_a_stage_that_is_done_is_not_run_again(root: str) -> None:
    calls = []

    def work(run: StageRun[StageConfig]) -> None:
        calls.append(run.config.seed)
        run.out.write_json("x.json", run.config.seed)

    stage = Stage("toy", "toy", StageConfig, work)
    first = execute(stage, StageConfig(seed=1), {}, root, "step")
    again = execute(stage, StageConfig(seed=1), {}, root, "step")
    assert (calls, again.uri, again.digest) == ([1], first.uri, first.digest)
    execute(stage, StageConfig(seed=2), {}, root, "step")
    assert calls == [1, 2]


class Crash(BaseException):
    """Not an Exception, like a signal."""


@pytest.mark.parametrize("resumable", [False, True])
def test_a_crash_leaves_nothing_a_reader_accepts(root: str, resumable: bool) -> None:
    seen: list[list[str]] = []
    crash = [True]

    def work(run: StageRun[StageConfig]) -> None:
        seen.append(storage.list_files(run.out.uri))
        run.out.write_json("part-0.json", 0)
        if crash.pop():
            raise Crash
        run.out.write_json("part-1.json", 1)

    stage = Stage("toy", "toy", StageConfig, work, resumable=resumable)
    with pytest.raises(Crash):
        execute(stage, StageConfig(), {}, root, "step")
    draft = f"{root}/toy/step/{fingerprint(stage, StageConfig(), {})}"
    assert storage.exists(f"{draft}/part-0.json")
    with pytest.raises(ArtifactError, match=r"unfinished draft"):
        Artifact.open(draft)
    crash.append(False)
    artifact = execute(stage, StageConfig(), {}, root, "step")
    assert [f.path for f in artifact.manifest.files] == ["part-0.json", "part-1.json"]
    assert seen == [[], ["part-0.json"] if resumable else []]


def test_a_damaged_result_is_reported_not_skipped(root: str) -> None:
    artifact = execute(NUMBER, NumberConfig(value=1), {}, root, "n")
    storage.write_atomic(artifact.path("number.json"), b"9")
    with pytest.raises(ArtifactError, match=r"is damaged"):
        execute(NUMBER, NumberConfig(value=1), {}, root, "n")


def test_the_fingerprint_follows_what_shapes_the_result(tmp_path: Path) -> None:
    raw = tmp_path / "raw.csv"
    raw.write_bytes(b"one")

    def mark(**values: Any) -> str:
        return fingerprint(NUMBER, NumberConfig(source=str(raw), **values), {})

    before = mark()
    assert len(before) == 20
    assert mark() == mark(workers=7) == before
    assert mark(value=2) != before
    assert mark(seed=18) != before
    raw.write_bytes(b"two")
    assert mark() != before
    newer = Stage(NUMBER.name, NUMBER.kind, NUMBER.config, NUMBER.run, version=2)
    assert fingerprint(newer, NumberConfig(), {}) != fingerprint(NUMBER, NumberConfig(), {})


def test_the_fingerprint_follows_parents_and_their_order(root: str) -> None:
    one, two = (execute(NUMBER, NumberConfig(value=v), {}, root, f"n{v}") for v in (1, 2))
    marks = {fingerprint(SUM, SumConfig(), {"numbers": numbers}) for numbers in ([one], [two], [one, two], [two, one])}
    assert len(marks) == 4


def test_a_missing_source_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing to read at .*raw.csv; give a file or a folder"):
        fingerprint(NUMBER, NumberConfig(source=str(tmp_path / "raw.csv")), {})


def test_inputs_reach_the_stage_in_order(root: str) -> None:
    numbers = [execute(NUMBER, NumberConfig(value=v), {}, root, f"n{v}") for v in (3, 4)]
    artifact = execute(SUM, SumConfig(scale=10), {"numbers": numbers}, root, "sum")
    assert artifact.read_json("sum.json") == 70
    assert [entry.uri.split("/")[1] for _, entry, _ in artifact.parents()] == ["n3", "n4"]


def test_wrong_inputs_are_explained(root: str) -> None:
    number = execute(NUMBER, NumberConfig(), {}, root, "n")
    single = Stage("toy-single", "x", StageConfig, lambda run: None, inputs={"a": Input("number")})
    cases: list[tuple[Stage[Any], dict[str, list[Artifact]], str]] = [
        (NUMBER, {"extra": [number]}, "stage 'toy-number' has no input 'extra'; it takes none"),
        (single, {"b": [number]}, "no input 'b'; it takes a"),
        (single, {}, r"needs input 'a' \(an artifact of kind 'number'\)"),
        (single, {"a": [number, number]}, "takes one artifact as 'a', not 2"),
        (
            Stage("s", "x", StageConfig, lambda run: None, inputs={"a": Input("corpus")}),
            {"a": [number]},
            "takes an artifact of kind 'corpus' as 'a', .* is of kind 'number'",
        ),
    ]
    for stage, inputs, words in cases:
        with pytest.raises(UsageError, match=words):
            execute(stage, stage.config(), inputs, root, "step")


def test_built_in_stages_load_and_unknown_ones_are_explained() -> None:
    for name in BUILT_IN:
        assert get_stage(name).name == name
    with pytest.raises(
        UsageError, match=r"unknown stage 'pretrian' \(did you mean 'pretrain'\?\); valid: classify, corpus"
    ):
        get_stage("pretrian")


def test_a_crash_while_publishing_keeps_what_a_resumed_attempt_needs(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(run: StageRun[StageConfig]) -> None:
        resumed.append(storage.exists(run.out.work("state")))
        storage.write_atomic(run.out.work("state"), b"x")
        run.out.write_json("x.json", 1)

    resumed: list[bool] = []
    stage = Stage("toy", "toy", StageConfig, work, resumable=True)
    write = storage.write_atomic

    def crash(uri: str, content: bytes) -> None:
        if uri.endswith("manifest.json"):
            raise Crash
        write(uri, content)

    monkeypatch.setattr(storage, "write_atomic", crash)
    with pytest.raises(Crash):
        execute(stage, StageConfig(), {}, root, "step")
    monkeypatch.undo()
    artifact = execute(stage, StageConfig(), {}, root, "step")
    assert resumed == [False, True]
    assert not storage.exists(artifact.path("_work"))


def test_two_runs_of_one_step_make_one_artifact(tmp_path: Path) -> None:
    def work(run: StageRun[StageConfig]) -> None:
        calls.append(1)
        inside.set()
        assert release.wait(10)
        run.out.write_json("x.json", 1)

    calls: list[int] = []
    inside, release = threading.Event(), threading.Event()
    stage = Stage("toy", "toy", StageConfig, work)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(execute, stage, StageConfig(), {}, str(tmp_path), "step")
        assert inside.wait(10)
        second = pool.submit(execute, stage, StageConfig(), {}, str(tmp_path), "step")
        time.sleep(0.2)  # the second one waits for the first
        release.set()
        assert first.result(10).digest == second.result(10).digest
    assert calls == [1]
