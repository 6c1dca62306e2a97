"""What becomes of a hash shard: rows compared with a previous index, the decision, the digest of a row."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.serve.index.rows import digest_rows
from lookalike.serve.index.segments import RowComparison, SegmentOptions, SegmentRows, compare_rows, decide

rows_of = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 2))


@given(rows_of, st.lists(rows_of, max_size=3), st.booleans())
@settings(max_examples=200)
def test_compare_rows_is_what_dictionaries_say(world, layers, as_before):
    """Layers of segments: an id is live in the last layer that has it (0: not live anywhere)."""
    owner = {name: number for number, layer in enumerate(layers) for name in layer}
    stored = []
    for number, layer in enumerate(layers):
        ids = sorted(layer)
        live = np.array([owner[name] == number and layer[name] > 0 for name in ids], bool)
        digests = np.array([layer[name] for name in ids], np.uint64)
        stored.append(SegmentRows(pa.chunked_array([ids], pa.string()), digests, live))
    now = sorted(world)
    live_rows = {name: layers[number][name] for name, number in owner.items() if layers[number][name] > 0}
    digests = np.array([world[name] for name in now], np.uint64)
    unchanged = np.array([as_before and live_rows.get(name) == world[name] for name in now], bool)
    digests[unchanged] = 7  # not looked at
    stay, fresh, num_gone = compare_rows(pa.chunked_array([now], pa.string()), digests, unchanged, stored)
    assert fresh.tolist() == [live_rows.get(name) != world[name] for name in now]
    assert num_gone == sum(name not in world for name in live_rows)
    for number, (layer, mask) in enumerate(zip(layers, stay, strict=True)):
        assert mask.tolist() == [
            owner[name] == number and layer[name] > 0 and world.get(name) == layer[name] for name in sorted(layer)
        ]


@pytest.mark.parametrize(
    ("fresh", "gone", "stay", "kind"),
    [
        (0, 0, [100], "reused"),
        (0, 0, [100, 5, 5, 5, 5], "reused"),
        (20, 0, [80], "appended"),
        (21, 0, [79], "rebuilt"),
        (10, 11, [90], "rebuilt"),
        (0, 5, [100], "appended"),
        (5, 0, [80, 5, 5, 5], "rebuilt"),
    ],
)
def test_what_becomes_of_a_shard_is_decided_by_shares_and_segments(fresh, gone, stay, kind):
    mask = np.zeros(100, bool)
    mask[:fresh] = True
    assert decide(SegmentOptions(), RowComparison([np.ones(size, bool) for size in stay], mask, gone)) == kind


def test_rows_under_tombstones_are_bounded_too():
    stay = np.ones(100, bool)
    stay[:19] = False
    fresh = np.zeros(100, bool)
    fresh[:2] = True
    assert decide(SegmentOptions(), RowComparison([stay], fresh, 0)) == "appended"
    stay[:25] = False
    assert decide(SegmentOptions(), RowComparison([stay], fresh, 0)) == "rebuilt"
    assert decide(SegmentOptions(append_share=0), RowComparison([np.ones(100, bool)], fresh, 0)) == "rebuilt"


def test_every_part_of_a_row_enters_its_digest():
    def digest(columns, vector=(1.0, 2.0)):
        table = pa.table({name: pa.array([value], pa.string()) for name, value in columns.items()})
        return int(digest_rows(table, np.array([vector], np.float32))[0])

    base = digest({"image_id": "a", "view": "bc"})
    others = [
        digest({"image_id": "ab", "view": "c"}),
        digest({"image_id": "a", "view": None}),
        digest({"image_id": "a", "view": ""}),
        digest({"image_id": "a", "view": "bc"}, (1.0, 2.0000002)),
        digest({"image_id": "a", "view": "b|"}),
        digest({"image_id": "a", "view": "|b"}),
    ]
    assert len({base, *others}) == 7
    assert base == digest({"image_id": "a", "view": "bc"})
