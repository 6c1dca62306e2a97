"""Checkpoints: whole or absent, one in flight, the oldest dropped, and a clear word about one that does not fit."""

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lookalike import storage
from lookalike.errors import LookalikeError
from lookalike.train.run.checkpoints import (
    CheckpointWriter,
    copy_state,
    find_checkpoints,
    last_checkpoint,
    random_state,
    restore,
    restore_random_state,
    sound_checkpoint,
)
from lookalike.train.run.sharding import whole_state


def write(folder: Path, step: int, world: int, ranks: list[int] | None = None) -> None:
    for rank in range(world) if ranks is None else ranks:
        writer = CheckpointWriter(str(folder), rank, world)
        writer.save(step, {"rank": rank, "value": torch.arange(step)})
        writer.close()


def test_a_checkpoint_counts_when_every_worker_wrote_its_part(tmp_path: Path) -> None:
    assert last_checkpoint(str(tmp_path / "none")) is None
    write(tmp_path, 10, 2)
    write(tmp_path, 20, 2, [0])  # the other worker died
    (tmp_path / "step-00000030").mkdir()
    (tmp_path / "step-00000030" / "rank-00000-of-00001.pt.1234.tmp").write_bytes(b"half")
    found = last_checkpoint(str(tmp_path))
    assert found is not None
    assert (found.step, found.world) == (10, 2)
    assert [found.read(rank)["rank"] for rank in (0, 1)] == [0, 1]
    assert torch.equal(found.read(1)["value"], torch.arange(10))
    write(tmp_path, 20, 1)  # a shrunk run passes the same step
    found = last_checkpoint(str(tmp_path))
    assert found is not None
    assert (found.step, found.world) == (20, 1)


def test_the_last_two_are_kept_and_one_that_is_not_complete_replaces_none(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, 2, [1, 0])
    assert [found.step for found in find_checkpoints(str(tmp_path))] == [3, 4]
    for step in (5, 6, 7):
        write(tmp_path, step, 2, [0])
    assert [found.step for found in find_checkpoints(str(tmp_path))] == [3, 4]


def test_training_goes_on_from_a_copy_while_a_thread_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, begun = threading.Event(), threading.Event()
    save = torch.save

    def slow(*args: Any) -> None:
        begun.set()
        assert free.wait(10)
        save(*args)

    monkeypatch.setattr(torch, "save", slow)
    writer = CheckpointWriter(str(tmp_path), 0, 1)
    weights = torch.zeros(3)
    writer.save(1, {"weights": weights})
    assert begun.wait(10)
    weights += 1  # the next step
    second = threading.Thread(target=writer.save, args=(2, {"weights": weights}))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # one in flight: the second waits for the first
    assert find_checkpoints(str(tmp_path)) == []
    free.set()
    second.join(10)
    writer.close()
    found = find_checkpoints(str(tmp_path))
    assert [checkpoint.read()["weights"].tolist() for checkpoint in found] == [[0.0] * 3, [1.0] * 3]


def test_a_failure_of_the_thread_reaches_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(uri: str) -> Any:
        raise LookalikeError(f"no space left to write {uri}")

    monkeypatch.setattr(storage, "open_atomic", full)
    writer = CheckpointWriter(str(tmp_path), 0, 1)
    writer.save(1, {})
    with pytest.raises(LookalikeError, match="no space left"):
        writer.save(2, {})


def test_a_store_of_objects_serves_as_well(tmp_path: Path) -> None:
    folder = f"memory://{tmp_path}/run"
    for step in (1, 2, 3):
        writer = CheckpointWriter(folder, 0, 1)
        writer.save(step, {"value": torch.full((2,), step)})
        writer.close()
    assert [found.read()["value"].tolist() for found in find_checkpoints(folder)] == [[2, 2], [3, 3]]


def test_random_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        numpy = [*np.random.rand(3).tolist(), np.random.randn()]
        return [torch.rand(3).tolist(), numpy, random.random(), random.gauss(0, 1)]

    draw()
    writer = CheckpointWriter(str(tmp_path), 0, 1)
    writer.save(1, {"random": random_state()})
    writer.close()
    expected = draw()
    draw()
    found = last_checkpoint(str(tmp_path))
    assert found is not None
    restore_random_state(found.read()["random"])
    assert draw() == expected


def test_a_copy_shares_no_memory() -> None:
    value = {"a": [torch.zeros(2), (torch.ones(1), 3)], "b": None, 4: "x"}
    copy = copy_state(value)
    value["a"][0] += 1  # type: ignore[index]
    assert copy["a"][0].tolist() == [0.0, 0.0]
    assert copy["a"][1] == (torch.ones(1), 3)
    assert (copy["b"], copy[4]) == (None, "x")


def make(width: int, extra: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, width), *([nn.Linear(width, 1)] if extra else []))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_a_checkpoint_of_another_model_is_explained() -> None:
    weights, moments = whole_state(*make(4))
    state = {"model": weights, "optimizer": moments}
    restore(*make(4), state, "here/step-5")
    with pytest.raises(LookalikeError, match=r"step-5 does not fit the model: .*0.weight.*\[4, 3\].*\[5, 3\].*remove"):
        restore(*make(5), state, "here/step-5")
    with pytest.raises(LookalikeError, match=r"does not fit the model: .*Missing key.*1.weight"):
        restore(*make(4, extra=True), state, "here/step-5")
    other, more = whole_state(*make(4, extra=True))
    with pytest.raises(LookalikeError, match="does not fit the model"):
        restore(*make(4), {"model": weights, "optimizer": more}, "here/step-5")
    assert len(other) == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_that_the_disk_cut_short_is_passed_over(
    tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The sound one before it is taken, and the file is named; reading the cut one names it too."""
    write(tmp_path, 10, 2)
    write(tmp_path, 20, 2)
    cut = tmp_path / "step-00000020" / f"rank-0000{rank}-of-00002.pt"
    cut.write_bytes(cut.read_bytes()[:-100])
    sound = sound_checkpoint(str(tmp_path))
    assert sound is not None
    assert sound.step == 10
    assert str(cut) in caplog.text
    last = last_checkpoint(str(tmp_path))
    assert last is not None
    with pytest.raises(LookalikeError, match=rf"checkpoint {cut} is damaged .*goes on from the checkpoint before"):
        last.read(rank)
    for path in tmp_path.glob("*/*.pt"):
        path.write_bytes(b"")
    assert sound_checkpoint(str(tmp_path)) is None
