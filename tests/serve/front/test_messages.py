"""How large messages may be, and how their parts are counted."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.serve.front.messages import MOST_PARTS, count_parts, message_bounds
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import RequestLimits

words = st.text(max_size=5)
queries = st.builds(pb.Query, vector=st.binary(max_size=9)) | st.builds(pb.Query, image_id=words)
filters = st.builds(pb.Filter, column=words, values=st.lists(words, max_size=3))
plans = st.builds(pb.Plan, scan=st.booleans(), margins=st.lists(st.floats(), max_size=3))
options = st.builds(pb.SearchOptions, k=st.integers(0, 1 << 31), plan=plans, filters=st.lists(filters, max_size=3))
batches = st.builds(pb.SearchBatchRequest, queries=st.lists(queries, max_size=3), options=options)
rows = st.builds(pb.Row, id=words, image=st.binary(max_size=9), metadata=st.dictionaries(words, words, max_size=3))
upserts = st.builds(pb.UpsertRequest, rows=st.lists(rows, max_size=3))


def count_set(message: Any) -> int:
    """The fields that protobuf's own reflection lists: a list of numbers is encoded as one."""
    num = 0
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            num += 3 * len(value)  # an entry, its key and its value
        elif field.message_type is not None:
            values = value if field.is_repeated else [value]
            num += sum(1 + count_set(each) for each in values)
        else:
            num += len(value) if field.is_repeated and field.type == field.TYPE_STRING else 1
    return num


@given(batches | upserts)
def test_parts_are_the_fields_that_protobuf_sets(message: Any) -> None:
    assert count_parts(message.SerializeToString(), message.DESCRIPTOR) == count_set(message)


@given(st.binary(max_size=200))
def test_any_bytes_are_counted_to_an_end(content: bytes) -> None:
    assert 0 <= count_parts(content, pb.SearchBatchRequest.DESCRIPTOR) <= len(content)


@pytest.mark.parametrize("content", [b"\xff" * 1_000_000, b"\x0b" * 1_000_000, b"\x0a\xff\xff\xff\xff\x0f" * 100_000])
def test_counting_ends_at_the_bound_and_at_what_is_no_message(content: bytes) -> None:
    assert count_parts(content, pb.SearchBatchRequest.DESCRIPTOR) <= MOST_PARTS + 1


def test_bounds_follow_the_limits() -> None:
    limits = RequestLimits(max_image_bytes=1_000_000, max_batch=10, max_request_bytes=2_000_000)
    bounds = message_bounds(limits)
    assert 2_000_000 == bounds["SearchBatch"] == bounds["Embed"] == bounds["Upsert"] == bounds["Search"]
    assert bounds["SearchStream"] == bounds["Search"]
    most = pb.SearchRequest(
        query=pb.Query(image=bytes(100_000)),
        options=pb.SearchOptions(
            session="s" * 1024, filters=[pb.Filter(column="c", values=["v" * 1048] * 1000)], model_fingerprint="f" * 20
        ),
    )
    assert most.ByteSize() <= message_bounds(RequestLimits(max_image_bytes=100_000))["Search"] < 1 << 21
    assert pb.DeleteRequest(ids=["i" * 512] * 256).ByteSize() <= message_bounds(RequestLimits())["Delete"]
