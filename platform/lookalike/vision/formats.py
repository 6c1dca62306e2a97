"""The image formats that are read, HEIF among them where its plug-in is installed, and the files of AVIF and HEIF."""

import re
import struct
from functools import cache

from PIL import features

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
BRANDS = {
    "AVIF": {b"avif", b"avis"},
    "HEIF": {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"},
}
REMEDIES = {"AVIF": "install a Pillow that reads AVIF", "HEIF": "pip install 'lookalike[heic]'"}
MAX_BOXES = 64
"""Boxes looked at for ``meta``, which is the second one or one of the last."""
_SIDE_ITEM = re.compile(rb"(infe[\x02\x03].{3}(?:.{4}|.{6}))(?:Exif|mime)", re.DOTALL)
_SIZE = re.compile(rb"ispe.{4}(.{8})", re.DOTALL)


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that this installation reads."""
    plain = tuple(name for name in FORMATS if name != "AVIF" or features.check("avif"))
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return plain
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return (*plain, "HEIF")


def unusual_formats() -> list[str]:
    """Formats that an installation without plug-ins does not read, or that this one lacks."""
    return sorted(set(FORMATS) ^ set(readable_formats()))


def kind_by_brands(data: bytes) -> str | None:
    """``AVIF`` or ``HEIF`` if the file says that it is one; AVIF if it says both."""
    if data[4:8] != b"ftyp":
        return None
    brands = {data[place : place + 4] for place in range(8, min(len(data), 64), 4) if place != 12}
    return next((kind for kind, known in BRANDS.items() if brands & known), None)


def missing_format(data: bytes) -> str | None:
    """What is needed to read a picture whose format could be read, but not by this installation; else None."""
    kind = kind_by_brands(data)
    return None if kind is None or kind in readable_formats() else f"{kind}, which is not read here; {REMEDIES[kind]}"


def heif_size(data: bytes) -> tuple[int, int]:
    """Width and height of the largest picture in the file, (0, 0) if it does not say."""
    start, end = _find_meta(data)
    sizes = [struct.unpack(">II", match[1]) for match in _SIZE.finditer(data, start, end)]
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def without_side_items(data: bytes) -> bytes:
    """The file with its EXIF and XMP named as something unknown: orientation has a place of its own."""
    start, end = _find_meta(data)
    return data[:start] + _SIDE_ITEM.sub(rb"\1skip", data[start:end]) + data[end:]


def _find_meta(data: bytes) -> tuple[int, int]:
    place = 0
    for _ in range(MAX_BOXES):
        if place + 16 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, place)
        if length == 1:
            length = struct.unpack_from(">Q", data, place + 8)[0]
        if name == b"meta":
            return place, min(len(data), place + length)
        if length < 8:
            break
        place += length
    return 0, 0
