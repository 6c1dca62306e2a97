"""The error of the retrieval service, the same on both sides of the wire. Needs only grpcio."""

from collections.abc import Collection

import grpc

from lookalike.errors import LookalikeError

CODES = {code.value[0]: code for code in grpc.StatusCode}
"""Number on the wire -> gRPC status."""
MAX_MESSAGE_BYTES = 64 << 20
"""Largest message that the Python clients take, in bytes."""
MAX_ANSWER_BYTES = MAX_MESSAGE_BYTES - (1 << 20)
"""Largest hits or vectors of one answer, in bytes: all else in a message has room beside them."""
MAX_SHOWN = 60
"""Longest text of a caller that a message repeats whole, in characters."""


class RetrievalError(LookalikeError):
    """A request that was not answered: ``code`` is the gRPC status, the message names value, rule and remedy.

    INVALID_ARGUMENT (the request is wrong), NOT_FOUND (no such image), FAILED_PRECONDITION (another model, or no
    encoder), UNAVAILABLE (shards lost), DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED (queues full, or a tenant over its
    quota), UNAUTHENTICATED (no valid token), PERMISSION_DENIED (a caller on another machine, or a role too low).
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(code, message)  # both in args, so that the error survives pickling between processes
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """2 when the request is at fault, 1 when the service is."""
        mistakes = (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.FAILED_PRECONDITION,
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
        )
        return 2 if self.code in mistakes else 1


class NotLoadedError(RetrievalError):
    """A worker does not hold the generation of a call: it was replaced, or is not loaded yet."""


class StagedLostError(RetrievalError):
    """Portions of an upsert went with the writer that had received them; it may be sent again from the start."""


class CallEndedError(RetrievalError):
    """A call that the replica's side ended, as when the replica is being replaced; the caller did not cancel it."""

    def __init__(self, who: str) -> None:
        super().__init__(grpc.StatusCode.UNAVAILABLE, f"the call to {who} was ended there; try again")

    def __reduce__(self) -> tuple[type[RetrievalError], tuple[grpc.StatusCode, str]]:
        return RetrievalError, (self.code, self.message)


def not_loaded(generation: str, held: Collection[str]) -> NotLoadedError:
    """Return the error of a worker that holds the generations ``held`` and not ``generation``."""
    message = f"index {generation} is not loaded here, only {', '.join(sorted(held)) or 'none'}; ask again"
    return NotLoadedError(grpc.StatusCode.UNAVAILABLE, message)


def invalid(message: str) -> RetrievalError:
    """Return an INVALID_ARGUMENT error."""
    return RetrievalError(grpc.StatusCode.INVALID_ARGUMENT, message)


def refused(message: str) -> RetrievalError:
    """Return a FAILED_PRECONDITION error."""
    return RetrievalError(grpc.StatusCode.FAILED_PRECONDITION, message)


def shorten(text: str) -> str:
    """Return ``text`` quoted, in ASCII and without its middle if it is long: safe to put into any message."""
    cut = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 10]}...{text[-7:]}"
    return ascii(cut)
