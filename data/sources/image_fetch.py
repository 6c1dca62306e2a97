"""Fetches images that a source names by URI, a batch at a time, through fsspec."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lookalike import storage
from lookalike.data.sources.reader import Record
from lookalike.data.sources.texts import read_text
from lookalike.vision.images import ImageError

FETCHES = 8  # at a time in one task, which mostly waits for the store
TRIES = 3
MAX_URI_CHARS = 4096


def fetch_images(records: Sequence[Record], base: str, max_bytes: int) -> None:
    """Put into each record the bytes of the image that it names, or an ``ImageError`` with the reason why not.

    Records that already have bytes stay as they are; an image struct without bytes names a path. ``base``: folder of
    relative URIs. At most ``max_bytes`` + 1 bytes of a file are read. Reasons: ``bad_uri``, ``not_found``,
    ``unreachable`` (after ``TRIES`` tries).
    """
    wanted = []
    for record in records:
        image = record.get("image")
        if isinstance(image, dict):
            record["image"], uri = image.get("bytes"), image.get("path")
        else:
            uri = None
        uri = record.pop("image_uri", None) or uri
        if record.get("image") is None and uri:
            wanted.append((record, uri))
    if wanted:
        with ThreadPoolExecutor(min(FETCHES, len(wanted))) as pool:
            images = pool.map(lambda pair: _fetch(pair[1], base, max_bytes), wanted)
            for (record, _), image in zip(wanted, images, strict=True):
                record["image"] = image


def _fetch(value: Any, base: str, max_bytes: int) -> bytes | ImageError:
    text, problems = read_text(value, MAX_URI_CHARS)
    relative = text is not None and "://" not in text and not text.startswith("/")
    parts = [part for part in (text or "").split("/") if part != "."]
    if not text or problems or (relative and ".." in parts):
        return ImageError("bad_uri", f"{value!r:.200} does not name an image; give a URI or a path inside {base}")
    uri = storage.join(base, "/".join(parts)) if relative else text
    for _ in range(TRIES):
        try:
            fs, path = storage.resolve(uri)
            return bytes(fs.cat_file(path, start=0, end=max_bytes + 1))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return ImageError("not_found", f"there is no file {uri}; restore it or correct its record")
        except (ValueError, ImportError) as error:
            return ImageError("bad_uri", f"{uri} cannot be opened: {error}; correct it or install what it needs")
        except Exception as error:  # noqa: BLE001  (every store has its own errors)
            last = error
    return ImageError("unreachable", f"{uri} could not be read in {TRIES} tries: {last}")
