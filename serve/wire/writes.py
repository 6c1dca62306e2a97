"""Check requests that change what is stored or served; cut written rows into portions."""

from collections import Counter
from collections.abc import Iterator, Sequence

from lookalike.retrieval.index_meta import IndexMeta
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.settings.config import RequestLimits
from lookalike.serve.wire.errors import invalid, refused, shorten
from lookalike.serve.wire.requests import check_id, check_image, check_num, read_vector

MAX_URI_CHARS = 4096
PORTION_BYTES = 1 << 20
"""Size of the rows that one call between processes carries."""


def check_rows(request: pb.UpsertRequest, *, limits: RequestLimits, meta: IndexMeta) -> None:
    """Refuse rows that cannot be stored, for their ids, content, columns or model."""
    if request.model_fingerprint and request.model_fingerprint != meta.model_fingerprint:
        raise refused(
            f"the vectors are of model {shorten(request.model_fingerprint)}, the index of {meta.model_fingerprint}; "
            "embed with the index's model, or send images"
        )
    _check_written([row.id for row in request.rows], limits)
    for row in request.rows:
        kind = row.WhichOneof("content")
        if kind == "vector":
            read_vector(row.vector, meta.dim)
        elif kind == "image":
            check_image(row.image, limits)
        else:
            raise invalid(f"row {shorten(row.id)} is empty; set vector or image")
        _check_metadata(row, limits, meta)


def _check_metadata(row: pb.Row, limits: RequestLimits, meta: IndexMeta) -> None:
    columns = [name for name in meta.columns if name != "image_id"]
    if unknown := [name for name in row.metadata if name not in columns]:
        raise invalid(
            f"row {shorten(row.id)} has metadata {shorten(unknown[0])}; the index has the columns {', '.join(columns)}"
        )
    size = sum(len(name.encode()) + len(value.encode()) for name, value in row.metadata.items())
    if size > limits.max_metadata_bytes:
        raise invalid(
            f"row {shorten(row.id)} has {size} bytes of metadata, the limit is {limits.max_metadata_bytes}; "
            "store less, or raise limits.max_metadata_bytes of the service"
        )


def check_ids(request: pb.DeleteRequest, *, limits: RequestLimits) -> None:
    """Refuse ids that cannot be stored."""
    _check_written(list(request.ids), limits)


def check_path(path: str) -> None:
    """Refuse a path that cannot name a file on another machine."""
    if not path.startswith("/") or len(path) > MAX_URI_CHARS or not path.isprintable():
        raise invalid(
            f"path {shorten(path)} has {len(path)} characters; send an absolute path of at most {MAX_URI_CHARS}, all "
            "printable"
        )


def _check_written(ids: Sequence[str], limits: RequestLimits) -> None:
    check_num(ids, "rows", limits)
    for image_id in ids:
        check_id(image_id, limits)
    if len(set(ids)) < len(ids):
        twice = next(image_id for image_id, num in Counter(ids).items() if num > 1)
        raise invalid(f"id {shorten(twice)} occurs twice in one request; send each once")


def check_uris(request: pb.SwitchRequest) -> None:
    """Refuse URIs that cannot name an artifact."""
    if not request.index:
        raise invalid("the index to switch to is not named; send the URI of its artifact")
    for name in ("index", "plan", "encoder"):
        uri: str = getattr(request, name)
        if len(uri) > MAX_URI_CHARS or not uri.isprintable():
            raise invalid(
                f"{name}={shorten(uri)} has {len(uri)} characters; a URI has at most {MAX_URI_CHARS}, all printable"
            )


def portions(rows: Sequence[pb.Row]) -> Iterator[list[pb.Row]]:
    """Yield ``rows`` in order, in lists of about ``PORTION_BYTES`` at most."""
    portion: list[pb.Row] = []
    size = 0
    for row in rows:
        if portion and size + row.ByteSize() > PORTION_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(row)
        size += row.ByteSize()
    if portion:
        yield portion
