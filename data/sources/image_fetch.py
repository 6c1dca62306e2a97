"""Fetches images that a source names by URI, a batch at a time, as far as its rules allow."""

import asyncio
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.exceptions import FSTimeoutError

from lookalike import storage
from lookalike.data.sources.fetch_rules import HTTP, FetchRules, Place, locate, refusal
from lookalike.data.sources.http_fetch import HttpFetch
from lookalike.data.sources.reader import Record
from lookalike.data.sources.texts import read_text
from lookalike.vision.images import ImageError

FETCHES = 8  # at a time in one task, which mostly waits for the store
BATCH_BYTES = 64 << 20  # of images, after which no further one is fetched
TRIES = 3
MAX_URI_CHARS = 4096


def fetch_images(records: Sequence[Record], base: str, max_bytes: int, rules: FetchRules | None = None) -> int:
    """Put into records the bytes of the image that each names, or an ``ImageError`` with the reason why not.

    Records that already have bytes stay as they are; an image struct without bytes names a path. ``base``: folder of
    relative URIs. At most ``max_bytes`` + 1 bytes of a file are read. Returns the number of records that are done,
    the first ones: all, or fewer once their images have ``BATCH_BYTES``. Reasons: ``bad_uri``, ``not_found``,
    ``unreachable`` (after ``TRIES`` tries) and those of ``fetch_rules``.
    """
    named = [(place, uri) for place, record in enumerate(records) if (uri := _named(record)) is not None]
    return asyncio.run(_fetch_all(records, named, base, max_bytes, rules or FetchRules())) if named else len(records)


async def _fetch_all(
    records: Sequence[Record], named: Sequence[tuple[int, Any]], base: str, max_bytes: int, rules: FetchRules
) -> int:
    """Fetch the images of ``named`` records (number, what it names); see ``fetch_images``."""
    slots, size = asyncio.Semaphore(FETCHES), 0
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    with ThreadPoolExecutor(FETCHES) as pool:
        async with HttpFetch(base, rules, max_bytes) as http:

            async def fetch(record: Record, place: Place) -> None:
                nonlocal size
                try:
                    if place.scheme in HTTP:
                        image = await http.image(place.uri)
                    else:
                        image = await loop.run_in_executor(pool, _read, place, max_bytes, rules.timeout_s)
                    size += len(image) if isinstance(image, bytes) else 0
                    record["image"] = image
                finally:
                    slots.release()

            for number, value in named:
                await slots.acquire()
                if size >= BATCH_BYTES:
                    await asyncio.gather(*tasks)
                    return number
                try:
                    place = _locate(value, base, rules)
                except ImageError as refused:
                    records[number]["image"] = refused
                    slots.release()
                    continue
                tasks.add(asyncio.create_task(fetch(records[number], place)))
            await asyncio.gather(*tasks)
    return len(records)


def _named(record: Record) -> Any:
    """What names the image of a record without bytes; None if nothing does."""
    image = record.get("image")
    uri = record.get("image_uri")
    if isinstance(image, dict):
        record["image"], uri = image.get("bytes"), uri or image.get("path")
    if record.get("image") is not None or not uri:
        return None
    record["image_uri"] = uri
    return uri


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
            if place.scheme == "file":
                return _read_file(place.uri, max_bytes)
            return _read_object(place.uri, max_bytes, timeout_s)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return ImageError("not_found", f"there is no file {place.uri}; restore it or correct its record")
        except ImageError as refused:
            return refused
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
        raise refusal("not_a_regular_file", f"{path}: {error}") from None


def _read_object(uri: str, max_bytes: int, timeout_s: float) -> bytes:
    fs, path = storage.resolve(uri)
    if not isinstance(fs, AsyncFileSystem):
        return bytes(fs.cat_file(path, start=0, end=max_bytes + 1))
    try:
        return bytes(sync(fs.loop, fs._cat_file, path, start=0, end=max_bytes + 1, timeout=timeout_s))  # noqa: SLF001
    except FSTimeoutError:
        raise refusal("fetch_too_slow", f"{uri} took more than {timeout_s:g} s") from None
