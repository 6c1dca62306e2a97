"""How large a message of each method may be, and of how many parts, before it is parsed.

Parsing holds up every other call of a process: protobuf takes 0.7 s and a gigabyte for 60 MB of empty queries, and
20 ms for one picture of that size. So the parts of a large message are counted first, in its encoded form.
"""

import functools
import time
from collections.abc import Mapping

from google.protobuf.descriptor import Descriptor  # type: ignore[import-untyped]

from lookalike.serve.settings.config import RequestLimits
from lookalike.serve.wire.bounds import ENTRY_BYTES, SMALL_BYTES, search_bytes, stream_bytes

MOST_PARTS = 100_000
"""Most fields in a message and all messages within it: 256 rows with 128 columns each."""
PAUSE_PARTS = 500
"""Fields after which a thread that counts lets others go on: some tenths of a millisecond."""
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Wire types (protobuf's encoding)."""
VARINT_BYTES = 10


def message_bounds(limits: RequestLimits) -> dict[str, int]:
    """Largest message of each method, in bytes; of one that is not named ``SMALL_BYTES``."""
    most, named = limits.max_request_bytes, limits.model_dump()
    ids = limits.max_batch * (limits.max_id_bytes + ENTRY_BYTES) + SMALL_BYTES
    return {
        "Search": search_bytes(named),
        "SearchStream": stream_bytes(named),
        **dict.fromkeys(["SearchBatch", "Embed", "Upsert"], most),
        "Delete": min(most, ids),
    }


def count_parts(data: bytes, descriptor: Descriptor, most: int = MOST_PARTS) -> int:
    """Number of fields in an encoded message and in the messages within it, at most ``most`` + 1.

    Counting stops at bytes that are no message of this type, which the parser refuses.
    """
    num, left = 0, [(0, len(data), descriptor)]
    try:
        while left and num <= most:
            place, end, kind = left.pop()
            inner = _inner_messages(kind)
            while place < end and num <= most:
                tag, place = _read_varint(data, place)
                num += 1
                if not num % PAUSE_PARTS:
                    time.sleep(0)
                wire = tag & 7
                if wire == VARINT:
                    _, place = _read_varint(data, place)
                elif wire == LENGTH:
                    size, place = _read_varint(data, place)
                    if tag >> 3 in inner:
                        left.append((place, min(place + size, end), inner[tag >> 3]))
                    place += size
                else:
                    place += {FIXED64: 8, FIXED32: 4}.get(wire, 0)
    except (IndexError, ValueError):
        pass
    return num


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at ``place``, and the place behind it."""
    value = 0
    for shift in range(VARINT_BYTES):
        byte = data[place + shift]
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, place + shift + 1
    raise ValueError("a number of more than ten bytes")


@functools.cache
def _inner_messages(kind: Descriptor) -> Mapping[int, Descriptor]:
    """Number of each field that holds messages -> their type."""
    return {field.number: field.message_type for field in kind.fields if field.message_type is not None}
