"""One write of a service, as it is stored, sent to followers and merged by compactions."""

import hashlib
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from lookalike.serve.proto import retrieval_pb2 as pb

DIGEST_BYTES = 16


class WriteKind(IntEnum):
    """The message that a write's content is: an ``UpsertRequest`` with vectors, or a ``DeleteRequest``."""

    UPSERT = 1
    DELETE = 2


class WriteRecord(NamedTuple):
    """A write with its number: writes are numbered from 1, without gaps."""

    number: int
    kind: int
    content: bytes

    @property
    def message(self) -> pb.UpsertRequest | pb.DeleteRequest:
        """The write as it was sent."""
        kind = pb.UpsertRequest if self.kind == WriteKind.UPSERT else pb.DeleteRequest
        message: pb.UpsertRequest | pb.DeleteRequest = kind.FromString(self.content)
        return message

    @property
    def digest(self) -> bytes:
        """BLAKE2b of number, kind and content."""
        return digest_of(f"{self.number} {int(self.kind)} ".encode() + self.content)

    @property
    def num_rows(self) -> int:
        """Rows that the write stores or deletes."""
        message = self.message
        return len(message.rows) if isinstance(message, pb.UpsertRequest) else len(message.ids)


def digest_of(content: bytes) -> bytes:
    """BLAKE2b of 16 bytes."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def count_foreign(records: Iterable[WriteRecord], model: str) -> int:
    """Number of rows written with vectors of another model than ``model``."""
    upserts = (message for record in records if isinstance(message := record.message, pb.UpsertRequest))
    return sum(len(upsert.rows) for upsert in upserts if upsert.model_fingerprint != model)
