"""``lookalike admin``: what a running service serves, changed from the command line."""

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.flags import Parser
from lookalike.serve.client import DEFAULT_ADDRESS, Client, StoredRow, credentials
from lookalike.serve.proto import retrieval_pb2 as pb
from lookalike.serve.wire.errors import RetrievalError
from lookalike.telemetry import printable, printable_lines

LONG = frozenset({"switch", "rollback", "compact", "backup"})
"""Verbs that may take minutes, or wait for one another."""


def admin(args: Sequence[str]) -> int:
    """Show or change what a service serves."""
    options = _parse(args)
    token, tls = credentials.read_token(options.token_file), credentials.read_tls(options)
    with Client(options.address, timeout_s=options.timeout, token=token, tls=tls) as client:
        with tell_progress(client) if options.verb in LONG else nullcontext():
            text = run(client, options)
        print(text)
    return 0


@contextmanager
def tell_progress(client: Client, every_s: float = 2.0) -> Iterator[None]:
    """While the block runs, print to stderr what the service is busy with, each time that this changes."""
    done = threading.Event()

    def follow() -> None:
        told: list[str] = []
        while not done.wait(every_s):
            with suppress(RetrievalError):  # the call itself says what is wrong
                steps = [f"{each.kind}: {each.step}" for each in client.status().activities]
                for step in steps:
                    if step not in told:
                        print(f"lookalike admin: {printable(step)}", file=sys.stderr, flush=True)
                told = steps

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(every_s)


def _parse(args: Sequence[str]) -> argparse.Namespace:
    shared = Parser(add_help=False)
    shared.add_argument("--address", default=DEFAULT_ADDRESS, help="host:port of the service (default: %(default)s)")
    shared.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="default: %(default)s")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    credentials.add_arguments(shared)
    description = "Show or change what a running service serves; it must have writes.state."
    parser = Parser(prog="lookalike admin", description=description)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, parents=[shared])

    verb("status", "What is served and loaded, and what waits for compaction.")
    switch = verb("switch", "Serve another index, once all replicas have loaded it; no request fails.")
    switch.add_argument("index", help="URI of the index artifact")
    switch.add_argument("--plan", default="", help="URI of a plan for it; default: exact search")
    switch.add_argument("--encoder", default="", help="URI of its encoder, or none; default: the index's ancestor")
    help_writes = "the index holds the writes up to number N; default: what its lineage tells"
    switch.add_argument("--includes-writes", type=int, metavar="N", help=help_writes)
    verb("rollback", "Serve the previous index again.")
    verb("compact", "Build an index that holds all writes, and serve it.")
    backup = verb("backup", "Copy writes and state into a file from which a service can start again.")
    backup.add_argument("--to", required=True, metavar="FILE", help="a new file on the machine of the service's writer")
    upsert = verb("upsert", "Store images, or replace those of the same ids.")
    upsert.add_argument("rows", nargs="+", metavar="ID=FILE", help="an id and its image file")
    upsert.add_argument("--column", action="append", default=[], metavar="NAME=VALUE", help="a column of these rows")
    delete = verb("delete", "Remove images by id.")
    delete.add_argument("ids", nargs="+", metavar="ID")
    return parser.parse_args(args)


def run(client: Client, options: argparse.Namespace) -> str:
    """Do one verb and return the text to print."""
    if options.verb == "status":
        status = client.status()
        return json.dumps(_plain(status), indent=1) if options.json else render_status(status)
    if options.verb in ("upsert", "delete"):
        upsert = options.verb == "upsert"
        number = client.upsert(read_rows(options.rows, options.column)) if upsert else client.delete(options.ids)
        return json.dumps({"write": number}) if options.json else f"stored as write {number}"
    if options.verb == "backup":
        path = storage.absolute(options.to)
        number = client.backup(path, timeout_s=options.timeout)
        return (
            json.dumps({"path": path, "last_write": number})
            if options.json
            else f"writes up to {number} in {printable(path)}"
        )
    if options.verb == "switch":
        artifacts = {"index": options.index, "plan": options.plan, "encoder": options.encoder}
        current = client.switch(**artifacts, includes_writes=options.includes_writes, timeout_s=options.timeout)
    elif options.verb == "rollback":
        current = client.rollback(timeout_s=options.timeout)
    else:
        current = client.compact(timeout_s=options.timeout)
    return json.dumps(_plain(current), indent=1) if options.json else f"serving {_describe(current)}"


def read_rows(pairs: Sequence[str], columns: Sequence[str]) -> list[StoredRow]:
    """Rows of the ``ID=FILE`` arguments, each with the columns of the ``NAME=VALUE`` arguments."""
    metadata: dict[str, str] = {}
    for text in columns:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise UsageError(f"--column {text!r} is no NAME=VALUE, as in view=icon")
        if name in metadata:
            raise UsageError(f"--column {name!r} is given twice; a row has one value in a column")
        metadata[name] = value
    return [StoredRow(image_id, content, metadata) for image_id, content in map(_read_row, pairs)]


def _read_row(pair: str) -> tuple[str, bytes]:
    """Id and content of an ``ID=FILE``: either may hold more ``=``, so the file that exists decides."""
    splits = [(pair[:place], pair[place + 1 :]) for place, sign in enumerate(pair) if sign == "="]
    splits = [(image_id, path) for image_id, path in splits if image_id and path]
    if not splits:
        raise UsageError(f"{pair!r} is no ID=FILE, as in chair-7=chair.jpg")
    found = [split for split in splits if Path(split[1]).exists()]
    if len(found) > 1:
        paths = " or ".join(repr(path) for _, path in found)
        raise UsageError(f"{pair!r} may name the file {paths}; give the file that is meant another name")
    image_id, path = found[0] if found else splits[0]
    try:
        return image_id, Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path!r} cannot be read ({reason}); give the path of an image file") from None


def render_status(status: pb.StatusResponse) -> str:
    """What a service serves, as lines of text."""
    marks = {status.current: "serving", status.previous: "previous"}
    lines = [f"{marks.get(each.name, 'loaded'):9s} {_describe(each)}" for each in status.generations]
    lines.append(f"writes    {status.last_write} in all, {status.pending_rows} rows wait for compaction")
    lines += [f"under way {each.kind} for {each.seconds:.0f} s: {each.step}" for each in status.activities]
    if status.compaction_failure:
        lines.append(f"failed    the last compaction begun by itself: {status.compaction_failure}")
    lines += [f"replicas  {each.role}: {each.current} of {each.replicas} hold the index" for each in status.followers]
    if status.HasField("recall"):
        recall = status.recall
        lines.append(f"recall    {recall.recall:.4f} ({recall.low:.4f} to {recall.high:.4f}, {recall.queries} queries)")
    return printable_lines(lines)


def _describe(served: pb.Generation) -> str:
    plan = f", plan {served.plan}" if served.plan else ", exact"
    text = f"{served.name}: {served.num_rows} rows, writes up to {served.includes_writes}, {served.index}{plan}"
    return printable(text)


def _plain(message: pb.StatusResponse | pb.Generation) -> dict[str, object]:
    plain: dict[str, object] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return plain
