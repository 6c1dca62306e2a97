"""The entries of a source that someone else wrote: its files, and what stands among them and is no file.

Links to folders are not followed, so a walk ends. Names that are no UTF-8 carry their bytes as lone surrogates, as
``os.listdir`` gives them; :func:`escaped` makes them fit for a message or a table.
"""

import os
import re
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from fsspec.implementations.local import LocalFileSystem

from lookalike import storage
from lookalike.errors import UsageError
from lookalike.telemetry import printable

_BYTE = re.compile("[\udc80-\udcff]")
"""A byte that was no UTF-8."""
FOLDER = "folder"
PROBLEMS = {
    "dangling_link": "its target does not exist; restore it or remove the link",
    "link_to_folder": "links to folders are not followed; give the folder itself as a source",
    "not_a_file": "it is a pipe, a socket or a device; remove it",
    "unreadable_folder": "it cannot be listed; restore it, or give this user the right to read it",
}
"""Reason -> why an entry is no file, and the remedy."""


class Entry(NamedTuple):
    """A file of a source, or an entry that cannot be read as one."""

    name: str
    """Path relative to the source."""
    problem: str | None = None
    """A key of ``PROBLEMS``; None for a file."""


def walk(fs: Any, root: str, first: str | None = None, last: str | None = None) -> Iterator[Entry]:
    """The entries below ``root`` that are no folders, from ``first`` to ``last``, sorted folder by folder.

    Lists one folder at a time, and only those that may hold such an entry.
    """
    low = () if first is None else tuple(first.split("/"))
    high = None if last is None else tuple(last.split("/"))

    def below(folder: str, parts: tuple[str, ...]) -> Iterator[Entry]:
        try:
            kinds = _list(fs, folder)
        except OSError as error:
            if not parts:
                raise UsageError(
                    f"the folder {escaped(root)} cannot be listed ({error.strerror}); restore it"
                ) from None
            yield Entry("/".join(parts), "unreadable_folder")
            return
        for name in sorted(kinds):
            kind, place = kinds[name], (*parts, name)
            if place < low[: len(place)] or (high is not None and place > high):
                continue
            if kind == FOLDER:
                yield from below(f"{folder}/{name}", place)
            elif place >= low:
                yield Entry("/".join(place), kind)

    return below(root.rstrip("/"), ())


def _list(fs: Any, folder: str) -> dict[str, str | None]:
    """Name -> ``FOLDER``, a problem, or None for a file."""
    if isinstance(fs, LocalFileSystem):
        with os.scandir(folder or "/") as found:
            return {entry.name: _kind(entry) for entry in found}
    entries = {entry["name"].rstrip("/"): entry["type"] for entry in fs.ls(folder, detail=True)}
    kinds = {"directory": FOLDER, "other": "not_a_file"}
    return {path.rpartition("/")[2]: kinds.get(kind) for path, kind in entries.items() if path != folder}


def _kind(entry: "os.DirEntry[str]") -> str | None:
    if entry.is_dir(follow_symlinks=False):
        return FOLDER
    if entry.is_file(follow_symlinks=False):
        return None
    try:
        mode = entry.stat().st_mode
    except OSError:  # nothing there, or links that lead to each other
        return "dangling_link"
    if stat.S_ISDIR(mode):
        return "link_to_folder"
    return None if stat.S_ISREG(mode) else "not_a_file"


def list_entries(uri: str) -> list[Entry]:
    """All entries under ``uri`` in the order of their names; one with the name ``""`` if ``uri`` is a file."""
    fs, path = storage.resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        return [Entry(name) for name in storage.list_files(uri)]
    if os.path.isfile(path):
        return [Entry("")]
    return sorted(walk(fs, path)) if os.path.isdir(path) else []


def is_hidden(name: str) -> bool:
    """Whether an entry or a folder that it lies in has a name that begins with a dot."""
    return name.startswith(".") or "/." in name


def ending(name: str) -> str:
    """What files are counted by: ``.txt``, ``(none)`` or ``(hidden)``."""
    if is_hidden(name):
        return "(hidden)"
    return escaped(os.path.splitext(name)[1].lower()) or "(none)"


def escaped(text: str, most: int | None = None) -> str:
    r"""``text`` as tables and terminals may have it, undecodable bytes as ``\xe9``; at most ``most`` characters."""
    plain = printable(_BYTE.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text))
    return plain if most is None or len(plain) <= most else plain[: most - 3] + "..."
