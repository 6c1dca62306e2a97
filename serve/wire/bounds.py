"""How large a message may be, the same on both sides of the wire. Needs nothing."""

from collections.abc import Mapping

SMALL_BYTES = 64 << 10
"""Largest message of a method without a bound of its own; parts of messages up to this size are not counted."""
ENTRY_BYTES = 16
"""Most bytes that an id or value takes beside its own."""


def search_bytes(limits: Mapping[str, float]) -> int:
    """Largest message of one search, an image and its options; ``limits`` are those of ``Describe``."""
    options = limits["max_filter_bytes"] + ENTRY_BYTES * limits["max_filter_values"] + SMALL_BYTES
    return int(min(limits["max_request_bytes"], limits["max_image_bytes"] + options))


def stream_bytes(limits: Mapping[str, float]) -> int:
    """Largest batch of a stream, which stays open with a message half read: a quarter of a request, or one search."""
    return max(search_bytes(limits), int(limits["max_request_bytes"]) // 4)
