"""What a picture's file says before it is decoded, and the file without what does not decide about its pixels.

Texts, profiles, previews and application data never reach a decoder: unreadable ones would make it refuse a good
picture, huge or compressed ones would cost more than the picture. Of EXIF and XMP the orientation alone is read.
Reading here takes time in proportion to the bytes, and a bounded number of steps in Python.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lookalike.vision.formats import heif_size, kind_by_brands, readable_formats, without_side_items
from lookalike.vision.tiff import (
    MAX_XMP_BYTES,
    PartsError,
    TiffFacts,
    examine_tiff,
    orientation_in_xmp,
    read_orientation,
    read_tiff_size,
)

MAX_PARTS = 1 << 16
"""Most chunks, segments or blocks of a file; a PNG of 50 million pixels has some thousand."""
MAX_TEXTS = 16
"""Most segments or chunks that are looked at for an orientation; EXIF of a JPEG may be cut into some."""
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""A marker of a JPEG; within a scan 0xff is followed by 0, or by a restart marker."""
PPM_HEADER = re.compile(rb"P(?:[14]|\w+\s+\d{1,10}(?=\s))\s+\d{1,10}\s+[\d.+-]{1,10}\s")
"""A header without comments: magic, width and height, and but for bitmaps the white value."""
SEQUENTIAL = (0xC0, 0xC1, 0xC9)
"""Frames of a JPEG that is not progressive."""
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
LEAST_TRNS = {0: 2, 2: 6, 3: 0}
"""PNG colour type -> fewest bytes of a tRNS chunk."""
WEBP_PIXELS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
WEBP_SIDE_FLAGS = 0x2C
"""Flags of VP8X: the file has a profile, EXIF, XMP."""


class Container(NamedTuple):
    """What is known of a picture from its file."""

    kind: str
    """The format's name, as Pillow has it."""
    width: int = 0
    height: int = 0
    """0 if the file does not say, or says so too late."""
    orientation: int = 1
    """As in EXIF, 1 to 8."""
    scans: int = 1
    """Passes over the picture of a JPEG."""
    coded_pixels: int = 0
    """Pixels that a decoder computes, if they are more than width x height."""
    bits: int = 0
    """Bits of the first channel of a TIFF."""
    inverted: bool = False
    """Whether 0 is white in a TIFF."""
    data: bytes = b""
    """The file without side chunks."""


def find_kind(data: bytes) -> str | None:
    """Return the format of ``data`` by its first bytes; None if it is none that is read."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:1] == b"P" and data[1:2] in (b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"f", b"y"):
        return "PPM"
    starts = {b"\xff\xd8\xff": "JPEG", PNG_MAGIC: "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"BM": "BMP"}
    starts |= {b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF"}
    kind = next((kind for start, kind in starts.items() if data.startswith(start)), None) or kind_by_brands(data)
    return kind if kind in readable_formats() else None


def examine(data: bytes) -> Container | None:
    """Return what the file says, and its bytes without side chunks; None for an unknown format.

    A file that cannot be followed comes back as it is, without a size: its decoder may know more. Raises
    ``PartsError`` for a file of too many parts.
    """
    kind = find_kind(data)
    if kind is None:
        return None
    try:
        return EXAMINERS[kind](data)
    except PartsError:
        raise
    except (struct.error, IndexError, ValueError):
        return Container(kind, data=data)


def read_size(data: bytes) -> tuple[int, int]:
    """Return width and height, (0, 0) if the file does not say; looks at its beginning only."""
    kind = find_kind(data)
    try:
        return SIZES[kind](data) if kind is not None else (0, 0)
    except (struct.error, IndexError, ValueError):
        return 0, 0


# --- PNG


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return (width, height) if data[12:16] == b"IHDR" else (0, 0)


def _examine_png(data: bytes) -> Container:
    kept, place, orientation, colour, name = list[bytes](), 0, 1, data[25], b""
    has_pixels, end, num_texts = False, 8, 0
    for name, start, end in _png_chunks(data):
        has_pixels = has_pixels or name == b"IDAT"
        if not name[0] & 0x20 or (name == b"tRNS" and not has_pixels and _is_good_trns(data[start:end], colour)):
            continue
        kept.append(data[place:start])
        place = end
        if orientation == 1 and num_texts < MAX_TEXTS:
            found = _png_orientation(name, data[start + 8 : end - 4])
            orientation, num_texts = found or 1, num_texts + (found is not None)
    if has_pixels and name != b"IEND" and data[end + 4 : end + 8] != b"IDAT":  # broken off in what follows the pixels
        kept.append(data[place:end])
        place = len(data)
    return Container(
        "PNG", *_png_size(data), orientation=orientation, data=b"".join([*kept, data[place:]]) if kept else data
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each whole chunk, up to IEND."""
    place = 8
    for _ in range(MAX_PARTS):
        if place + 12 > len(data):
            return
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + length + 12
        if end > len(data) or not name.isalpha():
            return
        yield name, place, end
        place = end
        if name == b"IEND":
            return
    raise PartsError


def _is_good_trns(chunk: bytes, colour: int) -> bool:
    """Whether a transparency chunk is whole; a damaged one counts as none, as for other ancillary chunks."""
    body, crc = chunk[8:-4], struct.unpack_from(">I", chunk, len(chunk) - 4)[0]
    return zlib.crc32(chunk[4:-4]) == crc and len(body) >= LEAST_TRNS.get(colour, 1 << 31)


def _png_orientation(name: bytes, body: bytes) -> int | None:
    """The orientation that a chunk states, 1 if it should and does not; None for a chunk of another purpose."""
    if name == b"eXIf":
        return read_orientation(body)
    if name == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0"):
        return orientation_in_xmp(_inflate(body[20:].split(b"\0", 2)[-1]) if body[18:19] == b"\1" else body)
    if name in (b"zTXt", b"tEXt") and body.startswith(b"Raw profile type exif\0"):
        text = _inflate(body[23:]) if name == b"zTXt" else body[22:]
        digits = b"".join(text.split(b"\n")[3:]).decode("ascii", "ignore")
        try:
            return read_orientation(bytes.fromhex(digits))
        except ValueError:
            return 1
    return None


def _inflate(packed: bytes) -> bytes:
    """The first bytes of a compressed text; none if it is damaged."""
    try:
        return zlib.decompressobj().decompress(packed, MAX_XMP_BYTES)
    except zlib.error:
        return b""


# --- JPEG


def _jpeg_size(data: bytes) -> tuple[int, int]:
    for code, start, _ in _jpeg_segments(data):
        if _is_frame(code):
            height, width = struct.unpack_from(">HH", data, start + 5)
            return width, height
    return 0, 0


def _is_frame(code: int) -> bool:
    return 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Code, start (of its marker) and end of each segment, scans included, up to the end of the picture."""
    place = 2
    for _ in range(MAX_PARTS):
        found = MARKER.search(data, place)
        if found is None:
            return
        code, start = data[found.end() - 1], found.end() - 2
        if code == 0xD9:
            return
        if code in (0x01, 0xD8):
            yield code, start, found.end()
            place = found.end()
            continue
        if start + 4 > len(data):
            return
        place = start + 2 + struct.unpack_from(">H", data, start + 2)[0]
        yield code, start, place
    raise PartsError


def _examine_jpeg(data: bytes) -> Container:
    kept, place, scans, size = list[bytes](), 0, 0, (0, 0)
    exif, xmp, dropped = list[bytes](), b"", False
    last, frame, channels = 2, 0, 0
    for code, start, end in _jpeg_segments(data):
        scans += code == 0xDA
        if start > last and scans < 2:  # fill bytes, or none of a segment
            kept.append(data[place:last])
            place, dropped = start, True
        last = end
        if scans and frame in SEQUENTIAL and data[start + 4] == channels:
            break  # all channels at once: decoders read no further scan
        if scans:
            continue  # Pillow and libjpeg read texts between scans without keeping them
        if _is_frame(code):
            height, width = struct.unpack_from(">HH", data, start + 5)
            size = max(size, (width, height), key=lambda pair: pair[0] * pair[1])
            frame, channels = code, data[start + 9]
        if not _is_side_segment(code, data[start + 4 : end]) or end > len(data):
            continue
        kept.append(data[place:start])
        place, dropped = end, True
        body = data[start + 4 : end]
        if code == 0xE1 and body.startswith(EXIF):
            exif.append(body[6:])
        elif code == 0xE1 and body.startswith(XMP) and not xmp:
            xmp = body
    orientation = read_orientation(b"".join(exif[:MAX_TEXTS]))
    return Container(
        "JPEG",
        *size,
        orientation=orientation if orientation > 1 else orientation_in_xmp(xmp),
        scans=max(1, scans),
        data=b"".join([*kept, data[place:]]) if dropped else data,
    )


def _is_side_segment(code: int, body: bytes) -> bool:
    """Whether a segment says nothing about pixels: comments, application data but that of JFIF and Adobe (colours)."""
    if code == 0xE0:
        return not (body.startswith(b"JFIF\0") and len(body) >= 14)
    if code == 0xEE:
        return not (body.startswith(b"Adobe") and len(body) >= 12)
    return code == 0xFE or 0xE0 <= code <= 0xEF


def count_scans(data: bytes) -> int:
    """Return the scans of a JPEG stream."""
    return sum(code == 0xDA for code, _, _ in _jpeg_segments(data))


# --- WebP


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk; the end may lie beyond the data."""
    place, last = 12, min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])
    for _ in range(MAX_PARTS):
        if place + 8 > last:
            return
        name, length = struct.unpack_from("<4sI", data, place)
        end = place + 8 + length + (length & 1)
        yield name, place, end
        place = end
    raise PartsError


def _webp_size(data: bytes) -> tuple[int, int]:
    name = data[12:16]
    if name == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if name == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return (width & 0x3FFF, height & 0x3FFF) if name == b"VP8 " else (0, 0)


def _examine_webp(data: bytes) -> Container:
    kept, orientation, stated, num_frames, num_chunks = list[bytes](), 1, b"", 0, 0
    for name, start, end in _webp_chunks(data):
        num_chunks += 1
        num_frames += name == b"ANMF"
        if name in WEBP_PIXELS and (name != b"ANMF" or num_frames == 1):
            kept.append(data[start:end])
        elif name == b"EXIF":
            orientation = read_orientation(data[start + 8 : end])
        elif name == b"XMP ":
            stated = data[start + 8 : end]
    if len(kept) < num_chunks:
        if kept and kept[0][:4] == b"VP8X":
            kept[0] = kept[0][:8] + bytes([kept[0][8] & ~WEBP_SIDE_FLAGS]) + kept[0][9:]
        body = b"WEBP" + b"".join(kept)
        data = b"RIFF" + struct.pack("<I", len(body)) + body
    orientation = orientation if orientation > 1 else orientation_in_xmp(stated)
    return Container("WEBP", *_webp_size(data), orientation=orientation, data=data)


# --- GIF


def _gif_blocks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Label, start and end of each extension, then of the first frame's descriptor (label 0x2c)."""
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    num = 0
    while num < MAX_PARTS:
        start, num = place, num + 1
        if data[start] == 0x2C:
            yield 0x2C, start, start + 10
            return
        if data[start] != 0x21:  # Pillow passes over other bytes
            place += 1
            continue
        place += 2
        while (length := data[place]) and num < MAX_PARTS:
            place, num = place + length + 1, num + 1
        place += 1
        yield data[start + 1], start, place
    raise PartsError


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    for label, start, _ in _gif_blocks(data):
        if label == 0x2C:
            left, top, wide, high = struct.unpack_from("<HHHH", data, start + 1)
            return max(width, left + wide), max(height, top + high)
    return width, height


def _examine_gif(data: bytes) -> Container:
    kept, place = list[bytes](), 0
    for label, start, end in _gif_blocks(data):
        if label not in (0x2C, 0xF9):
            kept.append(data[place:start])
            place = end
    return Container("GIF", *_gif_size(data), data=b"".join([*kept, data[place:]]) if kept else data)


# --- TIFF, BMP, PPM


def _tiff_size(data: bytes) -> tuple[int, int]:
    return read_tiff_size(data)


def _examine_tiff(data: bytes) -> Container:
    facts = examine_tiff(data)
    return Container(
        "TIFF",
        facts.width,
        facts.height,
        orientation=facts.orientation,
        scans=_most_scans(data, facts),
        coded_pixels=facts.coded_pixels,
        bits=facts.bits,
        inverted=facts.inverted,
        data=facts.stripped,
    )


def _most_scans(data: bytes, facts: TiffFacts) -> int:
    """The scans of the JPEG strip that has most; too many bytes in overlapping strips count as too many scans."""
    if sum(size for _, size in facts.pieces) > 2 * len(data):
        raise PartsError
    return max([count_scans(data[start : start + size]) for start, size in facts.pieces], default=1)


def _bmp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(width), abs(height)


def _ppm_size(data: bytes) -> tuple[int, int]:
    beginning = re.sub(rb"#[^\r\n]*", b"", data[:4096])
    found = re.match(rb"P\w+\s+(\d{1,10})\s+(\d{1,10})\s", beginning)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _examine_ppm(data: bytes) -> Container:
    """Without the comments in the header, which Pillow reads byte by byte."""
    for _ in range(MAX_TEXTS):
        if PPM_HEADER.match(data) or (start := data.find(b"#", 0, 100)) < 0:
            break
        end = min((place for stop in (b"\n", b"\r") if (place := data.find(stop, start)) >= 0), default=len(data))
        data = data[:start] + data[end + 1 :]
    return Container("PPM", *_ppm_size(data), data=data)


def _plain(kind: str, size: Callable[[bytes], tuple[int, int]]) -> Callable[[bytes], Container]:
    return lambda data: Container(kind, *size(data), data=data)


def _examine_heif(kind: str) -> Callable[[bytes], Container]:
    def examine_heif(data: bytes) -> Container:
        return Container(kind, *heif_size(data), data=without_side_items(data))

    return examine_heif


EXAMINERS: dict[str, Callable[[bytes], Container]] = {
    "PNG": _examine_png,
    "JPEG": _examine_jpeg,
    "WEBP": _examine_webp,
    "GIF": _examine_gif,
    "TIFF": _examine_tiff,
    "BMP": _plain("BMP", _bmp_size),
    "PPM": _examine_ppm,
    "AVIF": _examine_heif("AVIF"),
    "HEIF": _examine_heif("HEIF"),
}
SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "PNG": _png_size,
    "JPEG": _jpeg_size,
    "WEBP": _webp_size,
    "GIF": _gif_size,
    "TIFF": _tiff_size,
    "BMP": _bmp_size,
    "PPM": _ppm_size,
    "AVIF": heif_size,
    "HEIF": heif_size,
}
