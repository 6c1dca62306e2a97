"""Fetches images that a source names by URI, a batch at a time, as far as its rules allow."""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.exceptions import FSTimeoutError

from lookalike import storage
from lookalike.data.sources.fetch_rules import HTTP, IRREGULAR, SLOW, FetchRules, Place, locate
from lookalike.data.sources.http_fetch import fetch_urls
from lookalike.data.sources.reader import Record
from lookalike.data.sources.texts import read_text
from lookalike.vision.images import ImageError

FETCHES = 8  # at a time in one task, which mostly waits for the store
TRIES = 3
MAX_URI_CHARS = 4096


def fetch_images(records: Sequence[Record], base: str, max_bytes: int, rules: FetchRules | None = None) -> None:
    """Put into each record the bytes of the image that it names, or an ``ImageError`` with the reason why not.

    Records that already have bytes stay as they are; an image struct without bytes names a path. ``base``: folder of
    relative URIs. At most ``max_bytes`` + 1 bytes of a file are read. Reasons: ``bad_uri``, ``not_found``,
    ``unreachable`` (after ``TRIES`` tries) and those of ``fetch_rules``.
    """
    rules = rules or FetchRules()
    urls: list[tuple[Record, str]] = []
    with ThreadPoolExecutor(FETCHES) as pool:
        files: list[tuple[Record, Future[bytes | ImageError]]] = []
        for record, value in _named(records):
            try:
                place = _locate(value, base, rules)
            except ImageError as refusal:
                record["image"] = refusal
                continue
            if place.scheme in HTTP:
                urls.append((record, place.uri))
            else:
                files.append((record, pool.submit(_read, place, max_bytes, rules.timeout_s)))
        images = fetch_urls([url for _, url in urls], base, rules, max_bytes) if urls else []
        for (record, _), image in zip(urls, images, strict=True):
            record["image"] = image
        for record, future in files:
            record["image"] = future.result()


def _named(records: Sequence[Record]) -> list[tuple[Record, Any]]:
    """(record, what it names) of the records without bytes."""
    named = []
    for record in records:
        image = record.get("image")
        if isinstance(image, dict):
            record["image"], uri = image.get("bytes"), image.get("path")
        else:
            uri = None
        uri = record.pop("image_uri", None) or uri
        if record.get("image") is None and uri:
            named.append((record, uri))
    return named


def _locate(value: Any, base: str, rules: FetchRules) -> Place:
    text, problems = read_text(value, MAX_URI_CHARS)
    relative = text is not None and "://" not in text and not text.startswith("/")
    if not text or problems or (relative and ".." in text.split("/")):
        raise ImageError("bad_uri", f"{value!r:.200} does not name an image; give a URI or a path inside {base}")
    if relative and isinstance(value, str) and value != text:  # a file's name may begin or end with white space
        exact = locate(value, base, rules)
        if exact.scheme == "file" and os.path.isfile(exact.uri):
            return exact
    return locate(text, base, rules)


def _read(place: Place, max_bytes: int, timeout_s: float) -> bytes | ImageError:
    last: Exception | None = None
    for _ in range(TRIES):
        try:
            return (
                _read_file(place.uri, max_bytes)
                if place.scheme == "file"
                else _read_object(place.uri, max_bytes, timeout_s)
            )
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return ImageError("not_found", f"there is no file {place.uri}; restore it or correct its record")
        except ImageError as refusal:
            return refusal
        except (ValueError, ImportError) as error:
            return ImageError("bad_uri", f"{place.uri} cannot be opened: {error}; correct it or install what it needs")
        except Exception as error:  # noqa: BLE001  (every store has its own errors)
            last = error
    return ImageError("unreachable", f"{place.uri} could not be read in {TRIES} tries: {last}")


def _read_file(path: str, max_bytes: int) -> bytes:
    try:
        with storage.open_regular(path) as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ImageError(IRREGULAR, f"{path}: {error}") from None


def _read_object(uri: str, max_bytes: int, timeout_s: float) -> bytes:
    fs, path = storage.resolve(uri)
    if not isinstance(fs, AsyncFileSystem):
        return bytes(fs.cat_file(path, start=0, end=max_bytes + 1))
    try:
        return bytes(sync(fs.loop, fs._cat_file, path, start=0, end=max_bytes + 1, timeout=timeout_s))  # noqa: SLF001
    except FSTimeoutError:
        raise ImageError(SLOW, f"{uri} took more than {timeout_s:g} s") from None
