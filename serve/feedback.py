"""What Feedback takes."""

import re

import grpc

from lookalike.serve.errors import RetrievalError, invalid
from lookalike.serve.proto import retrieval_pb2 as pb

REQUEST_ID = re.compile(r"[0-9a-f]{24}")
KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
MAX_ID = 1024
"""Characters of a hit's id."""


def check_feedback(request: pb.FeedbackRequest, *, has_log: bool) -> None:
    """Raise ``RetrievalError`` for feedback that cannot be written down."""
    if not has_log:
        raise RetrievalError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "feedback goes to the access log, which is off; set serve.access_log.folder",
        )
    if not REQUEST_ID.fullmatch(request.request_id):
        raise invalid(
            f"request_id={request.request_id[:40]!r} names no answer; send SearchInfo.request_id, 24 digits "
            "of 0-9 and a-f"
        )
    if len(request.id) > MAX_ID:
        raise invalid(f"the id has {len(request.id)} characters, at most {MAX_ID} are taken; send the hit's own id")
    if not KIND.fullmatch(request.kind):
        raise invalid(
            f"kind={request.kind[:40]!r} is no short word; send a small letter and at most 31 of a-z, 0-9, _ "
            "and -, as in 'click'"
        )
