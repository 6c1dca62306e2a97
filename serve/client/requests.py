"""What the clients take, checked and converted to messages. Needs only grpcio, protobuf and numpy."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from lookalike import arguments
from lookalike.errors import ArgumentError
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import invalid
from lookalike.serve.wire.plans import PlanLike, to_plan

FloatArray = npt.NDArray[np.floating[Any]]
Query = bytes | str | FloatArray
"""An encoded image (bytes), the id of a stored image (str) or a vector (1-d array)."""
UINT32 = (1 << 32) - 1
UINT64 = (1 << 64) - 1
BYTES = (bytes, bytearray, memoryview)
QUERY = "the bytes of an image, the id of a stored image (str), or a vector (1-d array of numbers)"


class SearchSettings(TypedDict, total=False):
    """Keyword arguments of every search; None leaves one at its default."""

    k: int | None
    """Number of hits; 10 by default."""
    plan: PlanLike | None
    """Replaces the service's plan."""
    min_recall: float | None
    """Instead of ``plan``: take the cheapest plan with at least this measured recall."""
    where: Mapping[str, str | Iterable[str]] | None
    """Column -> allowed values, or the one allowed value; a hit meets all conditions."""
    timeout_ms: int | None
    """Time limit of the work in the service, in milliseconds."""
    model_fingerprint: str | None
    """The model that made the vectors; the service refuses vectors of another model."""
    allow_partial: bool | None
    """Accept an answer from the reachable shards alone, with ``coverage`` below 1."""
    session: str | None
    """Any stable string that identifies the searcher; in an experiment it decides the arm."""


@dataclass(frozen=True)
class StoredRow:
    """A row to store: an id, an encoded image or a vector, and columns by name."""

    id: str
    content: bytes | FloatArray
    metadata: Mapping[str, str] = field(default_factory=dict)


def to_search(
    image: bytes | None, vector: FloatArray | None, image_id: str | None, settings: SearchSettings
) -> pb.SearchRequest:
    """Return the message of one query, which is the one that is not None."""
    num = sum(query is not None for query in (image, vector, image_id))
    if num != 1:
        raise ArgumentError(f"{num} queries given; pass exactly one of image=, vector= and image_id=")
    if image is not None:
        query = pb.Query(image=arguments.check_image("image", image))
    elif vector is not None:
        query = pb.Query(vector=to_vector("vector", vector))
    else:
        query = pb.Query(image_id=arguments.check_text("image_id", image_id, "give the stored id as a str"))
    return pb.SearchRequest(query=query, options=to_options(settings))


def to_query(name: str, query: Any) -> pb.Query:
    """Return the message of a query whose type says what it is."""
    if isinstance(query, str):
        return pb.Query(image_id=arguments.check_text(name, query))
    if isinstance(query, BYTES):
        return pb.Query(image=bytes(query))
    if isinstance(query, (os.PathLike, Mapping)) or hasattr(query, "read") or query is None:
        raise ArgumentError(f"{name} is {arguments.show(query)}; give {QUERY}")
    return pb.Query(vector=to_vector(name, query))


def to_vector(name: str, vector: Any) -> bytes:
    """Return float32 bytes of a vector with one dimension, which has any number type."""
    array = arguments.check_array(name, vector)
    if array.ndim != 1:
        raise ArgumentError(
            f"a vector query has one dimension, {name} has shape {array.shape}; use search_batch for many"
        )
    return arguments.to_float32(name, array).tobytes()


def to_queries(queries: Any) -> list[pb.Query]:
    """Return the messages of many queries; a str, an image or a 1-d array is one query."""
    if isinstance(queries, np.ndarray) and queries.ndim == 1 and queries.dtype.kind in "fiu":
        queries = queries[None]
    items = arguments.list_items("queries", queries, (str, *BYTES), f"a list; each query is {QUERY}")
    return [to_query(f"queries[{place}]", item) for place, item in enumerate(items)]


def to_options(settings: SearchSettings) -> pb.SearchOptions:
    """Return the message of ``settings``; INVALID_ARGUMENT for numbers that the wire cannot carry."""
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    k = arguments.check_whole("k", given.pop("k", 10))
    if not 1 <= k <= UINT32:  # unsigned on the wire, as is timeout_ms
        bound = "less than 1; ask for 1 or more" if k < 1 else f"more than {UINT32}; ask for fewer"
        raise invalid(f"k={arguments.show(k)} is {bound}")
    timeout_ms = arguments.check_whole("timeout_ms", given.pop("timeout_ms", 0))
    if not 0 <= timeout_ms <= UINT32:
        bound = "negative" if timeout_ms < 0 else f"more than {UINT32}"
        raise invalid(
            f"timeout_ms={arguments.show(timeout_ms)} is {bound}; give milliseconds, or 0 for the service's own limit"
        )
    options = pb.SearchOptions(k=k, timeout_ms=timeout_ms)
    if "plan" in given:
        options.plan.CopyFrom(_plan(given["plan"]))
    if "min_recall" in given:
        options.min_recall = arguments.check_number("min_recall", given["min_recall"])
    if "where" in given:
        options.filters.extend(to_filters(given["where"]))
    if "allow_partial" in given:
        options.allow_partial = arguments.check_flag("allow_partial", given["allow_partial"])
    for name in ("model_fingerprint", "session"):
        if name in given:
            setattr(options, name, arguments.check_text(name, given[name]))
    return options


def to_filters(where: Any) -> list[pb.Filter]:
    """Return the messages of conditions; a bare str is the one allowed value of its column."""
    if not isinstance(where, Mapping):
        form = "{column: value} or {column: [values]}"
        raise ArgumentError(f"where is {arguments.show(where)}; give {form}, as in {{'view': 'icon'}}")
    return [
        pb.Filter(
            column=arguments.check_text("a column in where", column, "columns have names of type str"),
            values=arguments.list_texts(f"where[{column!a}]", values, "a str or a list of str"),
        )
        for column, values in where.items()
    ]


def _plan(plan: Any) -> pb.Plan:
    try:
        return to_plan(plan)
    except (AttributeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"plan is {arguments.show(plan)}, no usable plan ({arguments.reason(error)}); give a SearchPlan"
        ) from None


def to_batch(queries: Any, settings: SearchSettings) -> pb.SearchBatchRequest:
    """Return the message of many queries with the same settings."""
    return pb.SearchBatchRequest(queries=to_queries(queries), options=to_options(settings))


def to_embed(images: Any) -> pb.EmbedRequest:
    """Return the message that embeds one or many images."""
    items = arguments.list_items("images", images, BYTES, "a list of encoded images, each as bytes")
    return pb.EmbedRequest(
        images=[arguments.check_image(f"images[{place}]", image) for place, image in enumerate(items)]
    )


def to_feedback(request_id: Any, kind: Any, id: Any) -> pb.FeedbackRequest:
    """Return the message that reports what a user did."""
    texts = {"request_id": request_id, "kind": kind, "id": id}
    return pb.FeedbackRequest(**{name: arguments.check_text(name, text) for name, text in texts.items()})


def to_upsert(rows: Any, model_fingerprint: Any) -> pb.UpsertRequest:
    """Return the message that stores one or many rows."""
    items = arguments.list_items("rows", rows, StoredRow, "a list of StoredRow", ordered=False)
    fingerprint = arguments.check_text("model_fingerprint", model_fingerprint)
    return pb.UpsertRequest(
        rows=[_to_row(f"rows[{place}]", row) for place, row in enumerate(items)], model_fingerprint=fingerprint
    )


def _to_row(name: str, row: Any) -> pb.Row:
    if not isinstance(row, StoredRow):
        raise ArgumentError(f"{name} is {arguments.show(row)}; give a StoredRow(id, content, metadata)")
    columns = {} if row.metadata is None else row.metadata
    if not isinstance(columns, Mapping):
        raise ArgumentError(f"{name}.metadata is {arguments.show(columns)}; give a mapping of column to text")
    metadata = {
        arguments.check_text(f"a column in {name}.metadata", column): arguments.check_text(
            f"{name}.metadata[{arguments.show(column)}]", value, "values are text: give str(...), or leave it out"
        )
        for column, value in columns.items()
    }
    image_id = arguments.check_text(f"{name}.id", row.id, "ids are text: give a str")
    content = f"{name}.content"
    if isinstance(row.content, (*BYTES, str, os.PathLike)) or hasattr(row.content, "read"):
        return pb.Row(id=image_id, image=arguments.check_image(content, row.content), metadata=metadata)
    return pb.Row(id=image_id, vector=to_vector(content, row.content), metadata=metadata)


def to_delete(ids: Any) -> pb.DeleteRequest:
    """Return the message that removes one or many ids."""
    return pb.DeleteRequest(ids=arguments.list_texts("ids", ids, "an id as str, or a list of them"))


def to_switch(index: Any, plan: Any, encoder: Any, includes_writes: Any, timeout_s: float) -> pb.SwitchRequest:
    """Return the message that serves another index."""
    texts = {"index": index, "plan": plan, "encoder": encoder}
    uris = {name: arguments.check_text(name, uri, "give a URI as str") for name, uri in texts.items()}
    number = None if includes_writes is None else arguments.check_whole("includes_writes", includes_writes)
    if number is not None and not 0 <= number <= UINT64:
        raise invalid(f"includes_writes={arguments.show(number)} is no write's number; `lookalike admin status` has it")
    return pb.SwitchRequest(**uris, includes_writes=number, timeout_s=ceil(timeout_s))


def to_backup(path: Any) -> pb.BackupRequest:
    """Return the message that copies writes and state into a file."""
    return pb.BackupRequest(path=arguments.check_text("path", path, "give an absolute path as str"))
