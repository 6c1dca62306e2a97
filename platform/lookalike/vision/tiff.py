"""The tags of a TIFF file, and the orientation in EXIF, which is a small TIFF file.

A tag of hostile data may claim gigabytes, and one that no decoder needs may make a decoder give up. ``strip_tiff``
leaves the tags that decide about pixels.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

ORIENTATION, XMP = 274, 700
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
TILE_WIDTH, TILE_HEIGHT = 322, 323
OFFSETS, SIZES = (273, 324), (279, 325)
"""Offsets and sizes in bytes of strips, and of tiles."""
PIXEL_TAGS = frozenset(
    {WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, 266, 277, 278, 284, 292, 293, 317, 320, TILE_WIDTH, TILE_HEIGHT}
    | {*OFFSETS, *SIZES, 332, 334, 338, 339, 347, *range(512, 522), *range(529, 533), 50674}
)
"""Tags that decide about pixels: layout, compression and its tables, colours."""
STATED = frozenset({WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, TILE_WIDTH, TILE_HEIGHT, ORIENTATION})
"""Tags that are read here."""
JPEG_COMPRESSIONS = (6, 7)
SIZE_OF = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Type of a tag's values -> bytes of each."""
WHOLE = {1: "B", 3: "H", 4: "I", 8: "h", 9: "i", 16: "Q", 17: "q", 13: "I", 18: "Q"}
"""Types of whole numbers, as ``struct`` names them."""
MAX_VALUES = 1 << 18
"""Most values of a tag: colours of a palette (3 x 65,536), strips or tiles."""
MAX_XMP_BYTES = 1 << 20
ORIENTATIONS = range(1, 9)
MAX_TAGS = 1 << 16
"""Most tags that are looked at."""


class PartsError(ValueError):
    """A file of more parts than any picture has."""


class Tag(NamedTuple):
    """An entry of a folder of tags."""

    number: int
    kind: int
    num_values: int
    start: int
    """Where its values begin in the file."""
    entry: bytes
    """The entry itself."""


class Layout(NamedTuple):
    """Byte order, and the sizes that differ between TIFF and BigTIFF."""

    order: str
    head: str
    """Format of number, type and count."""
    offset: str
    """Format of an offset, and of the count of tags before them in BigTIFF."""
    first: int
    """Where the offset of the first folder stands."""
    counter: str
    """Format of the number of tags."""


class TiffFacts(NamedTuple):
    """What the tags of the first picture say."""

    width: int
    height: int
    coded_pixels: int
    """Pixels of whole tiles, which a decoder computes even where they lie outside."""
    orientation: int
    bits: int
    """Bits of the first channel."""
    inverted: bool
    """0 is white."""
    pieces: list[tuple[int, int]]
    """Offset and size of each JPEG strip or tile, without repetitions; empty for other compressions."""
    stripped: bytes
    """The file with the tags in ``PIXEL_TAGS`` alone, and without further pictures."""


def read_orientation(exif: bytes) -> int:
    """Return the orientation in EXIF, 1 to 8; 1 if there is none or it cannot be read."""
    start = 0
    while exif.startswith(b"Exif\0\0", start):
        start += 6
    exif = exif[start:]
    try:
        values = (_numbers(exif, _layout(exif), tag) for tag in _tags(exif) if tag.number == ORIENTATION)
        return next((value[0] for value in values if value and value[0] in ORIENTATIONS), 1)
    except (struct.error, ValueError):
        return 1


def examine_tiff(data: bytes) -> TiffFacts:
    """Return the facts of a TIFF file.

    Raises ``ValueError`` or ``struct.error`` if its tags cannot be read, ``PartsError`` if they are too many.
    """
    layout = _layout(data)
    tags = list(_tags(data))
    first_tags = {tag.number: tag for tag in reversed(tags)}
    kept = [tag for tag in tags if tag.number in PIXEL_TAGS and tag is first_tags[tag.number]]
    if any(tag.num_values > MAX_VALUES for tag in kept):
        raise PartsError
    numbers = {number: _numbers(data, layout, tag) for number, tag in first_tags.items() if number in STATED}
    numbers = {number: values for number, values in numbers.items() if values}

    def first(number: int, default: int) -> int:
        return numbers.get(number, (default,))[0]

    width, height = first(WIDTH, 0), first(HEIGHT, 0)
    coded = width * height
    if TILE_WIDTH in numbers:
        across, down = max(1, first(TILE_WIDTH, 1)), max(1, first(TILE_HEIGHT, 1))
        coded = -(-width // across) * across * (-(-height // down) * down)
    pieces = set[tuple[int, int]]()
    if first(COMPRESSION, 1) in JPEG_COMPRESSIONS:
        for pair in zip(OFFSETS, SIZES, strict=True):
            if all(number in first_tags for number in pair):
                pieces |= set(zip(*(_numbers(data, layout, first_tags[number]) for number in pair), strict=False))
    orientation = first(ORIENTATION, 1)
    if orientation not in ORIENTATIONS:
        orientation = 1
    if ORIENTATION not in numbers:
        orientation = orientation_in_xmp(_bytes(data, first_tags[XMP])) if XMP in first_tags else 1
    return TiffFacts(
        width,
        height,
        coded,
        orientation,
        first(BITS, 1),
        first(PHOTOMETRIC, 0) == 0,
        sorted(pieces),
        _without_others(data, layout, kept),
    )


def read_tiff_size(data: bytes) -> tuple[int, int]:
    """Return width and height, 0 if a tag is missing; raises as ``examine_tiff`` does."""
    layout, sizes = _layout(data), {WIDTH: 0, HEIGHT: 0}
    for tag in _tags(data):
        if tag.number in sizes and tag.num_values == 1 and not sizes[tag.number]:
            sizes[tag.number] = next(iter(_numbers(data, layout, tag)), 0)
    return sizes[WIDTH], sizes[HEIGHT]


def orientation_in_xmp(xmp: bytes) -> int:
    """Return the orientation that an XMP packet states; 1 if it states none."""
    for opening in (b'tiff:Orientation="', b"tiff:Orientation>"):
        place = xmp.find(opening, 0, MAX_XMP_BYTES)
        digit = xmp[place + len(opening) : place + len(opening) + 1] if place >= 0 else b""
        if digit.isdigit() and int(digit) in ORIENTATIONS:
            return int(digit)
    return 1


def _layout(data: bytes) -> Layout:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ValueError("no byte order")
    magic = struct.unpack_from(order + "H", data, 2)[0]
    if magic == 43:
        return Layout(order, "HHQ", "Q", 8, "Q")
    return Layout(order, "HHI", "I", 4, "H")


def _tags(data: bytes) -> Iterator[Tag]:
    """The tags of the first folder, as far as the data goes; of tags without a type that is known none."""
    layout = _layout(data)
    head, offset = struct.Struct(layout.order + layout.head), struct.Struct(layout.order + layout.offset)
    place, num = _folder(data, layout)
    length = head.size + offset.size
    for number in range(min(num, MAX_TAGS, (len(data) - place) // length)):
        start = place + number * length
        tag, kind, count = head.unpack_from(data, start)
        if kind not in SIZE_OF:
            continue
        values = start + head.size
        if count * SIZE_OF[kind] > offset.size:
            values = offset.unpack_from(data, values)[0]
        yield Tag(tag, kind, count, values, data[start : start + length])


def _folder(data: bytes, layout: Layout) -> tuple[int, int]:
    """Where the first folder's tags begin, and their number."""
    start = struct.unpack_from(layout.order + layout.offset, data, layout.first)[0]
    if start > len(data):
        raise ValueError("the folder of tags lies beyond the file")
    num = struct.unpack_from(layout.order + layout.counter, data, start)[0]
    return start + struct.calcsize(layout.order + layout.counter), num


def _bytes(data: bytes, tag: Tag) -> bytes:
    return data[tag.start : tag.start + min(tag.num_values * SIZE_OF[tag.kind], MAX_XMP_BYTES)]


def _numbers(data: bytes, layout: Layout, tag: Tag) -> tuple[int, ...]:
    """The values of a tag of whole numbers; empty if they are of another type or beyond the file."""
    if tag.kind not in WHOLE or tag.num_values > MAX_VALUES:
        return ()
    form = f"{layout.order}{tag.num_values}{WHOLE[tag.kind]}"
    if not 0 <= tag.start <= len(data) - struct.calcsize(form):
        return ()
    return struct.unpack_from(form, data, tag.start)


def _without_others(data: bytes, layout: Layout, kept: list[Tag]) -> bytes:
    """The file with a folder of the tags ``kept``, and no folder after it."""
    place, _ = _folder(data, layout)
    counter = layout.order + layout.counter
    none = struct.pack(layout.order + layout.offset, 0)
    entries = struct.pack(counter, len(kept)) + b"".join(tag.entry for tag in kept) + none
    start = place - struct.calcsize(counter)
    return b"".join((data[:start], entries, data[start + len(entries) :]))
