"""Another number of workers in the middle of an epoch: nothing is read twice, nothing is left out."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.train.batches import close_segment
from lookalike.train.draws import Draw
from lookalike.train.schedule import START, Mark, Schedule
from lookalike.train.settings import TrainConfig
from lookalike.train.streams import Segment, Stream, UnitSizes, build_streams, follow
from lookalike.train.units import Unit
from tests.train.conftest import shard_rows, write_shard

Read = Counter[tuple[int, int, int]]


def read(stream: Stream, units: list[Unit], start: int, stop: int) -> Read:
    """(epoch, unit, place in its order) of every row that a stream gives between two positions."""
    pieces = stream.slices(start, stop - start)
    assert sum(piece.stop - piece.start for piece in pieces) == stop - start
    return Counter((p.epoch, units.index(p.unit), row) for p in pieces for row in range(p.start, p.stop))


def streams_of(units: list[Unit], history: list[Segment], world: int) -> list[Stream]:
    sizes = UnitSizes("d", units, Draw(seed=5, resample=False))
    schedule = Schedule("d", 5, len(units), history[0].world if history else world)
    schedule, starts = follow(schedule, sizes, history, world)
    return [Stream(sizes, schedule, rank, starts[rank]) for rank in range(world)]


def run(units: list[Unit], stretches: list[tuple[int, int]], with_marks: bool) -> tuple[Read, list[Stream]]:
    """What workers read in stretches of (workers, rows each), and the streams of the last."""
    total, history, streams = Counter[tuple[int, int, int]](), list[Segment](), list[Stream]()
    for world, rows in stretches:
        streams = streams_of(units, history, world)
        for stream in streams:
            total += read(stream, units, 0, rows)
        marks = {"d": [stream.mark(rows) for stream in streams]} if with_marks else {}
        history.append(Segment(world=world, rows={"d": rows}, marks=marks))
    return total, streams


unit_sizes = st.lists(st.integers(1, 6), min_size=3, max_size=8)
stretches = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), min_size=1, max_size=4)


@given(unit_sizes, stretches, st.booleans())
def test_no_row_of_an_epoch_is_read_twice_and_none_is_left_out(
    sizes: list[int], parts: list[tuple[int, int]], with_marks: bool
) -> None:
    units = [Unit(f"file-{i}", 0, size) for i, size in enumerate(sizes)]
    total, streams = run(units, parts, with_marks)
    assert max(total.values(), default=1) == 1
    epochs = max((epoch for epoch, _, _ in total), default=0) + 1
    rows = {(epoch, unit, row) for epoch in range(epochs) for unit, size in enumerate(sizes) for row in range(size)}
    for stream in streams:  # they go on until nobody is in an epoch that had begun
        position = parts[-1][1]
        while any(piece.epoch < epochs for piece in stream.slices(position, 1)):
            total += read(stream, units, position, position + 1)
            position += 1
    assert set(total) == rows
    assert max(total.values()) == 1


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2), (2, 3)])
def test_a_resampled_dataset_is_finished_by_another_number_of_workers(tmp_path: Path, before: int, after: int) -> None:
    rows = shard_rows("catalogue", 31, 0, repeat=1.6)
    uri = write_shard(str(tmp_path / "catalogue" / "part-0.parquet"), rows, 5)

    def streams(world: int, history: tuple[Segment, ...] = ()) -> list[Stream]:
        return [build_streams({"catalogue": [uri]}, seed=1, rank=rank, world=world, resample=True, history=history)
                ["catalogue"] for rank in range(world)]  # fmt: skip

    def first_epoch(stream: Stream, start: int) -> Counter[tuple[Any, ...]]:
        found, position = Counter[tuple[Any, ...]](), start
        while (piece := stream.slices(position, 1)[0]).epoch == 0:
            found[piece.unit, piece.start] += 1
            position += 1
        return found

    whole = sum((first_epoch(stream, 0) for stream in streams(1)), Counter[tuple[Any, ...]]())
    assert 31 < whole.total() < 62
    done = 7
    parts = Counter((piece.unit, row) for stream in streams(before) for piece in stream.slices(0, done)
                    for row in range(piece.start, piece.stop))  # fmt: skip
    history = (Segment(world=before, rows={"catalogue": done}),)
    for stream in streams(after, history):
        parts += first_epoch(stream, 0)
    assert parts == whole


@given(unit_sizes, st.integers(1, 3), st.integers(0, 60), st.integers(0, 30))
def test_a_mark_is_where_advancing_leads(sizes: list[int], world: int, rows: int, more: int) -> None:
    units = [Unit(f"file-{i}", 0, size) for i, size in enumerate(sizes)]
    of = UnitSizes("d", units, Draw(seed=5, resample=False))
    schedule = Schedule("d", 5, len(units), world)
    for rank in range(world):
        mark = Stream(of, schedule, rank).mark(rows)
        assert mark == schedule.advance(rank, START, rows, of)
        assert Stream(of, schedule, rank, mark).mark(more) == Stream(of, schedule, rank).mark(rows + more)


def test_the_same_number_of_workers_goes_on_where_it_stood() -> None:
    units = [Unit(f"file-{i}", 0, 4) for i in range(7)]
    calm = streams_of(units, [], 2)
    for marks in ({}, {"d": [stream.mark(9) for stream in calm]}):
        again = streams_of(units, [Segment(world=2, rows={"d": 9}, marks=marks)], 2)
        for one, other in zip(calm, again, strict=True):
            assert one.slices(9, 40) == other.slices(0, 40)


def test_what_is_left_of_an_epoch_is_dealt_first() -> None:
    schedule = Schedule("d", 5, 4, 2)
    first, second = (list(islice(schedule.share(rank), 2)) for rank in range(2))
    resized = schedule.resize([Mark(1, 2), Mark(0, 3)], 1)
    share = resized.share(0)
    assert [next(share) for _ in range(3)] == [first[1]._replace(offset=2), second[0]._replace(offset=3), second[1]]
    assert next(share).epoch == 1


def test_a_stretch_is_kept_as_rows_of_each_worker() -> None:
    tasks: Any = {"weak": {"kind": "multilabel_softmax", "field": "labels"}}
    train = TrainConfig(tasks=tasks, mix={"a": 3, "b": 1}, batch_size=16)
    (segment,) = close_segment([], train, 2, 10)
    assert segment == Segment(world=2, rows={"a": 60, "b": 20})
    both = close_segment([segment], train, 1, 5, [{"a": Mark(1, 2), "b": Mark(3, 4)}])
    assert both[1:] == [Segment(world=1, rows={"a": 60, "b": 20}, marks={"a": [(1, 2)], "b": [(3, 4)]})]
    assert close_segment(both, train, 2, 0) == both
    assert Segment.model_validate(both[1].model_dump(mode="json")) == both[1]
