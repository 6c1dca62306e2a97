"""Portions of an upsert that is too large for one call between processes, until the last one comes."""

import time

import grpc

from lookalike.serve.wire.errors import RetrievalError, StagedLostError

STAGED_BYTES = 256 << 20
"""Most bytes that wait for their last portion."""
STAGED_S = 60.0
"""Seconds after which portions are forgotten whose next one has not come."""


class Staging:
    """Portions in memory, by upsert; nothing of them is stored before all are here."""

    def __init__(self) -> None:
        self._portions: dict[str, dict[int, bytes]] = {}
        self._times: dict[str, float] = {}

    def add(self, upsert: str, place: int, content: bytes) -> None:
        """Keep a portion; RESOURCE_EXHAUSTED if too many wait."""
        now = time.monotonic()
        for old in [key for key, at in self._times.items() if now - at > STAGED_S]:
            self._forget(old)
        size = sum(len(each) for portions in self._portions.values() for each in portions.values())
        if size + len(content) > STAGED_BYTES:
            raise RetrievalError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{size} bytes of other upserts are being received, the limit is {STAGED_BYTES}; retry after 1000 ms, "
                "or send fewer rows at a time",
            )
        self._portions.setdefault(upsert, {})[place] = content
        self._times[upsert] = now

    def take(self, upsert: str, num_portions: int) -> list[bytes]:
        """The portions of an upsert in order; ``StagedLostError`` unless all are here."""
        portions = self._forget(upsert)
        if sorted(portions) != list(range(num_portions)):
            raise StagedLostError(
                grpc.StatusCode.UNAVAILABLE,
                "the writer was replaced while it received the rows; write again",
            )
        return [portions[place] for place in range(num_portions)]

    def _forget(self, upsert: str) -> dict[int, bytes]:
        self._times.pop(upsert, None)
        return self._portions.pop(upsert, {})
