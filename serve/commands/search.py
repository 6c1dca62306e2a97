"""``lookalike search``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import grpc
import numpy as np

from lookalike.arguments import check_seconds
from lookalike.errors import UsageError
from lookalike.flags import Parser
from lookalike.serve.client import DEFAULT_ADDRESS, Client, RetrievalError, SearchResult, credentials
from lookalike.telemetry import printable_lines


def search(args: Sequence[str]) -> int:
    """Query a running service, or an index on disk."""
    parser = Parser(prog="lookalike search", description="Find the stored images nearest to a query.")
    queries = parser.add_mutually_exclusive_group(required=True)
    queries.add_argument("--image", type=Path, help="image file")
    queries.add_argument("--vector", type=Path, help=".npy file of one vector")
    queries.add_argument("--id", help="id of a stored image")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--address", default=DEFAULT_ADDRESS, help="host:port of the service (default: %(default)s)")
    places.add_argument("--local", metavar="URI", help="search this index in this process instead")
    parser.add_argument("-k", type=int, default=10, help="number of hits (default: %(default)s)")
    where_help = "keep hits with this value in the column; repeat it for more values or more columns"
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help=where_help)
    parser.add_argument("--min-recall", type=float, help="take the cheapest plan with at least this measured recall")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    credentials.add_arguments(parser)
    options = parser.parse_intermixed_args(args)
    query, where = _read_query(options), _read_where(options.where)
    with _open_client(options) as client:
        try:
            result = client.search(**query, where=where, k=options.k, min_recall=options.min_recall)
        except RetrievalError as error:
            raise _with_remedy(error, options) from None
    print(json.dumps(_to_json(result), indent=1) if options.json else render(result))
    return 0


def _with_remedy(error: RetrievalError, options: argparse.Namespace) -> RetrievalError:
    """Return ``error`` with a remedy if gRPC found no server, whose message names none."""
    if options.local is not None or error.code != grpc.StatusCode.UNAVAILABLE:
        return error
    remedy = "start a service with `lookalike serve RECIPE`, or name the host:port of one with --address"
    return RetrievalError(error.code, f"{error.message}; if none runs at {options.address}, {remedy}")


def _open_client(options: argparse.Namespace) -> Client:
    if options.local is None:
        tls, token = credentials.read_tls(options), credentials.read_token(options.token_file)
        return Client(options.address, timeout_s=options.timeout, token=token, tls=tls)
    from lookalike.config import parse_config
    from lookalike.serve.local import LocalClient
    from lookalike.serve.settings.config import ServeConfig

    settings = {"index": options.local, "timeout_s": check_seconds("timeout_s", options.timeout)}
    if options.image is None:
        settings["encoder"] = "none"  # loading it takes longer than all else
    return LocalClient(parse_config(ServeConfig, settings, "local"))


def _read_where(conditions: Sequence[str]) -> dict[str, list[str]]:
    where: dict[str, list[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or not column:
            raise UsageError(f"--where {condition!r} is not COLUMN=VALUE, as in view=icon")
        where.setdefault(column, []).append(value)
    return where


def _read_query(options: argparse.Namespace) -> dict[str, Any]:
    if options.id is not None:
        return {"image_id": options.id}
    path = options.image or options.vector
    try:
        if options.image is not None:
            return {"image": path.read_bytes()}
        vector = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, MemoryError, BadZipFile) as error:
        raise UsageError(f"{path} is not a .npy file of numbers ({error}); write one with numpy.save") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}); give the path of a file") from None
    if not isinstance(vector, np.ndarray):
        raise UsageError(f"{path} holds several arrays (.npz); write one vector with numpy.save")
    if vector.ndim != 1 or not np.issubdtype(vector.dtype, np.floating):
        raise UsageError(f"{path} holds {vector.dtype} of shape {vector.shape}; one vector of floats is needed")
    return {"vector": vector}


def _to_json(result: SearchResult) -> dict[str, Any]:
    info = result.info
    return {
        "hits": [{"id": hit.id, "score": hit.score, "metadata": dict(hit.metadata)} for hit in result.hits],
        "plan": vars(info.plan),
        "generation": info.generation,
        "model_fingerprint": info.model_fingerprint,
        "coverage": info.coverage,
        "times_ms": dict(info.times_ms),
        "request_id": info.request_id,
        "arm": info.arm,
        "degraded": info.degraded,
    }


def render(result: SearchResult) -> str:
    """Return hits as lines of text: rank, score, id, stored columns."""
    lines = []
    for rank, hit in enumerate(result.hits, 1):
        columns = "  ".join(f"{name}={value}" for name, value in sorted(hit.metadata.items()))
        lines.append(f"{rank:3d}  {hit.score:+.4f}  {hit.id}  {columns}".rstrip())
    info = result.info
    times = ", ".join(f"{stage} {duration:.1f} ms" for stage, duration in info.times_ms.items())
    lines.append(f"index {info.generation}, {info.shards_answered} of {info.shards_asked} shards; {times}")
    return printable_lines(lines)
