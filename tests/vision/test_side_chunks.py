"""Texts, profiles, EXIF and other side chunks never decide about a picture: its pixels come out bit for bit."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lookalike.vision.containers import read_size
from lookalike.vision.images import ImageError, decode

PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (24, 40, 3), np.uint8))
RANDOM = np.random.default_rng(6).bytes(3000)
BOMB = zlib.compress(bytes(8 << 20), 9)
"""8 MiB of zeros."""


@cache
def encode(image_format: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    PICTURE.convert(mode).save(buffer, image_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def exif(orientation: int, order: str = "<", *, kind: int = 3, count: int = 1, offset: int = 8, num: int = 1) -> bytes:
    """EXIF with one tag, whose fields may be wrong."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + "HH", orientation, 0)
    return (
        mark + struct.pack(order + "IH", offset, num) + struct.pack(order + "HHI", 274, kind, count) + value + bytes(4)
    )


UNREADABLE = {
    "nothing": b"",
    "noise": RANDOM,
    "no folder": b"II*\0\x08\0\0\0",
    "offset beyond": exif(6, offset=1 << 30),
    "a tag too many": exif(6, num=65535)[:18],
    "orientation 99": exif(99),
    "orientation 0": exif(0),
    "orientation as text": exif(6, kind=2, count=4),
    "a billion orientations": exif(6, count=1 << 30),
    "unknown type": exif(6, kind=77),
    "prefix without a body": b"Exif\0\0",
}
SIDES = {**UNREADABLE, "zeros": bytes(60_000), "text": b"\xff\xd9\xff\xda\0\xff\xd8" * 50, "one byte": b"\0"}


def jpeg_with(code: int, body: bytes) -> bytes:
    data = encode("JPEG", quality=90)
    return data[:2] + struct.pack(">BBH", 0xFF, code, len(body) + 2) + body + data[2:]


def png_chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) if crc is None else crc)
    )


def png_with(chunk: bytes, after: bool = False, mode: str = "RGB") -> bytes:
    """A PNG with ``chunk`` before or after its pixels."""
    data = encode("PNG", mode)
    place = len(data) - 12 if after else data.index(b"IDAT") - 4
    return data[:place] + chunk + data[place:]


def webp_with(name: bytes, body: bytes) -> bytes:
    data = encode("WEBP", lossless=True)
    flags = {b"EXIF": 8, b"XMP ": 4, b"ICCP": 32}.get(name, 0)
    size = struct.pack("<I", PICTURE.width - 1)[:3] + struct.pack("<I", PICTURE.height - 1)[:3]
    chunk = name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    head = b"VP8X" + struct.pack("<II", 10, flags) + size
    inside = b"WEBP" + head + (chunk + data[12:] if name == b"ICCP" else data[12:] + chunk)
    return b"RIFF" + struct.pack("<I", len(inside)) + inside


def gif_with(label: int, body: bytes) -> bytes:
    data = encode("GIF", "P")
    place = 13 + (3 << (data[10] & 7) + 1)
    blocks = b"".join(bytes([len(body[i : i + 255])]) + body[i : i + 255] for i in range(0, len(body), 255))
    return data[:place] + bytes([0x21, label]) + blocks + b"\0" + data[place:]


def tiff_with(tag: int, kind: int, count: int, offset: int, compression: str | None = None) -> bytes:
    """A TIFF with another tag, which may point anywhere."""
    data = encode("TIFF", compression=compression)
    start = struct.unpack_from("<I", data, 4)[0]
    num = struct.unpack_from("<H", data, start)[0]
    entries = [data[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(num)]
    entries = sorted([*entries, struct.pack("<HHII", tag, kind, count, offset)], key=lambda e: e[:2][::-1])
    folder = struct.pack("<H", num + 1) + b"".join(entries) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + folder


@cache
def pixels_of(plain: bytes) -> np.ndarray:
    return np.asarray(decode(plain))


def same(data: bytes, plain: bytes) -> bool:
    return np.array_equal(np.asarray(decode(data)), pixels_of(plain))


@pytest.mark.parametrize("code", [0xE0, 0xE1, 0xE2, 0xE3, 0xEC, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize(
    "prefix",
    [
        b"",
        b"JFIF\0",
        b"Exif\0\0",
        b"Exif\0\0Exif\0\0",
        b"http://ns.adobe.com/xap/1.0/\0",
        b"ICC_PROFILE\0",
        b"MPF\0",
        b"Photoshop 3.0\x008BIM",
        b"Adobe",
        b"FPXR\0",
    ],
)
def test_segments_of_a_jpeg(code: int, prefix: bytes) -> None:
    for name, body in SIDES.items():
        if (code == 0xE0 and prefix == b"JFIF\0") or (code == 0xEE and prefix == b"Adobe"):
            continue  # a whole one does decide: it names the colours
        assert same(jpeg_with(code, (prefix + body)[:65_000]), encode("JPEG", quality=90)), name


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize(
    "name", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"acTL", b"fcTL", b"prVt"]
)
def test_chunks_of_a_png(name: bytes, mode: str) -> None:
    bodies = {**SIDES, "bomb": b"Comment\0\0" + BOMB, "international bomb": b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB}
    plain = encode("PNG", mode)
    for case, body in bodies.items():
        for after in (False, True):
            assert same(png_with(png_chunk(name, body), after, mode), plain), (case, after)
            assert same(png_with(png_chunk(name, body, crc=1), after, mode), plain), (case, after)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
@pytest.mark.parametrize("body", [b"", b"\0", RANDOM[:999]])
def test_a_damaged_transparency_counts_as_none(mode: str, body: bytes) -> None:
    assert same(png_with(png_chunk(b"tRNS", body, crc=3), mode=mode), encode("PNG", mode))


def test_a_png_broken_off_behind_its_pixels() -> None:
    text = png_chunk(b"tEXt", RANDOM)
    data = png_with(text, after=True)
    assert same(data[: -12 - len(text) // 2], encode("PNG"))


@pytest.mark.parametrize("name", [b"EXIF", b"XMP ", b"ICCP", b"junk"])
def test_chunks_of_a_webp(name: bytes) -> None:
    for case, body in SIDES.items():
        assert same(webp_with(name, body), encode("WEBP", lossless=True)), case


@pytest.mark.parametrize("label", [0xFE, 0xFF, 0x01, 0x77])
def test_extensions_of_a_gif(label: int) -> None:
    for case, body in {**SIDES, "xmp": b"XMP DataXMP" + RANDOM, "loop": b"NETSCAPE2.0\1"}.items():
        assert same(gif_with(label, body), encode("GIF", "P")), case


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("tag", [270, 274, 282, 306, 700, 33432, 33723, 34377, 34665, 34675, 34853, 42113, 65000])
def test_tags_of_a_tiff(tag: int, compression: str | None) -> None:
    for kind in (0, 1, 2, 3, 4, 5, 7, 12, 13, 99):
        for count, offset in ((1, 99), (5, 8), (1 << 31, 0), (70_000, 1 << 31), (3, 0xFFFFFFFF)):
            if tag == 274 and count == 1:
                continue
            data = tiff_with(tag, kind, count, offset, compression)
            assert same(data, encode("TIFF", compression=compression)), (kind, count, offset)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["jpeg", "png", "webp", "gif"]), st.binary(max_size=400), st.integers(0, 255))
def test_any_side_chunk(container: str, body: bytes, choice: int) -> None:
    name = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"sBIT", b"hIST", b"tIME", b"abCd"][choice % 8]
    data, plain = {
        "jpeg": lambda: (
            jpeg_with([*range(0xE1, 0xEE), 0xEF, 0xFE][choice % 15], b"x" + body),
            encode("JPEG", quality=90),
        ),
        "png": lambda: (png_with(png_chunk(name, body, crc=choice), bool(choice & 8)), encode("PNG")),
        "webp": lambda: (webp_with([b"XMP ", b"ICCP", b"none"][choice % 3], body), encode("WEBP", lossless=True)),
        "gif": lambda: (gif_with([0xFE, 0xFF, 1, 7][choice % 4], body), encode("GIF", "P")),
    }[container]()
    assert same(data, plain)
    assert read_size(data) == PICTURE.size


XMP_TEXT = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
RAW_PROFILE = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n      26\n" + exif(6).hex().encode())
CARRIERS: dict[str, Callable[[], bytes]] = {
    "jpeg exif": lambda: jpeg_with(0xE1, b"Exif\0\0" + exif(6)),
    "jpeg exif twice the prefix": lambda: jpeg_with(0xE1, b"Exif\0\0Exif\0\0" + exif(6)),
    "jpeg exif, big-endian": lambda: jpeg_with(0xE1, b"Exif\0\0" + exif(6, ">")),
    "jpeg xmp": lambda: jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP_TEXT),
    "png exif": lambda: png_with(png_chunk(b"eXIf", exif(6))),
    "png exif behind the pixels": lambda: png_with(png_chunk(b"eXIf", exif(6)), after=True),
    "png xmp": lambda: png_with(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_TEXT)),
    "png xmp, compressed": lambda: png_with(
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP_TEXT))
    ),
    "png profile in a text": lambda: png_with(png_chunk(b"zTXt", RAW_PROFILE)),
    "webp exif": lambda: webp_with(b"EXIF", exif(6)),
    "webp xmp": lambda: webp_with(b"XMP ", XMP_TEXT),
    "tiff": lambda: tiff_with(274, 3, 1, 6),
    "tiff, compressed": lambda: tiff_with(274, 3, 1, 6, "tiff_lzw"),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_orientation_is_found(carrier: str) -> None:
    image = decode(CARRIERS[carrier]())
    assert image.size == (PICTURE.height, PICTURE.width)
    form = carrier.split(maxsplit=1)[0].strip(",").upper()
    options = {"quality": 90} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    stored = decode(encode(form, **options))
    assert np.array_equal(np.asarray(image), np.asarray(stored.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_the_size_in_the_header(image_format: str) -> None:
    assert read_size(encode(image_format)) == PICTURE.size
    assert read_size(encode(image_format)[:8]) == (0, 0)
    assert read_size(b"no picture") == (0, 0)


def tiff_of_tags(number: int, values: int) -> bytes:
    """65,535 tags of one number, each of many values."""
    entry = struct.pack("<HHII", number, 3, values, 8)
    return b"II*\0" + struct.pack("<I", 1 << 20) + bytes((1 << 20) - 8) + b"\xff\xff" + entry * 65_535


HEADERS: dict[str, Callable[[], bytes]] = {
    "jpeg of fill bytes": lambda: b"\xff\xd8\xff" + b"\xff" * 10_000_000,
    "jpeg of small segments": lambda: b"\xff\xd8" + b"\xff\xe3\0\x02" * 2_500_000,
    "jpeg of small EXIF": lambda: b"\xff\xd8" + (b"\xff\xe1\0\x99" + b"Exif\0\0" + bytes(145)) * 64_000,
    "jpeg of a long prefix": lambda: b"\xff\xd8" + (b"\xff\xe1\xff\xfe" + b"Exif\0\0" * 10_922) * 150,
    "jpeg of scans": lambda: b"\xff\xd8" + b"\xff\xda\0\x02" * 2_500_000,
    "png of small chunks": lambda: encode("PNG")[:33] + png_chunk(b"tEXt", b"") * 800_000,
    "png of packed texts": lambda: encode("PNG")[:33] + png_chunk(b"zTXt", RAW_PROFILE[:23] + BOMB) * 1000,
    "gif of small blocks": lambda: encode("GIF", "P")[:13] + b"\x21\xfe" + b"\1\0" * 4_000_000,
    "webp of empty chunks": lambda: b"RIFF\xff\xff\xff\0WEBP" + b"none\0\0\0\0" * 1_200_000,
    "tiff of orientations": lambda: tiff_of_tags(274, 250_000),
    "tiff of widths": lambda: tiff_of_tags(256, 250_000),
    "tiff of strips": lambda: tiff_of_tags(273, 250_000),
    "ppm of a comment": lambda: b"P6\n#" + b"x" * 10_000_000,
}
"""Files of up to 10 MB whose headers are long."""


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_costs_little(case: str) -> None:
    data = HEADERS[case]()
    start = time.thread_time()
    read_size(data)
    assert time.thread_time() - start < 0.7
    with pytest.raises(ImageError):
        decode(data)
    assert time.thread_time() - start < 2.5


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF....WEBP", b"II*\0\x08\0\0\0", b"MM\0+", b"BM"]
    ),
    st.binary(max_size=200),
)
def test_any_bytes_have_a_size_or_none(start: bytes, rest: bytes) -> None:
    assert min(read_size(start + rest)) >= 0


def test_what_lies_between_the_segments_of_a_jpeg_does_not_matter() -> None:
    data = encode("JPEG", quality=90)
    table = data.index(b"\xff\xdb")
    for filling in (b"\xff", b"\xff" * 100_000, b"junk", bytes(1000)):
        assert same(data[:table] + filling + data[table:], data)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_comments_of_a_ppm(mode: str) -> None:
    data = encode("PPM", mode)
    magic, size, rest = data.split(b"\n", 2)
    for comment in (b"# 1 2 3\n", b"#\n" * 9, b"#" + b"x" * 9_000_000 + b"\r"):
        commented = magic + b"\n" + comment + size.replace(b" ", b"\n" + comment) + b"\n" + rest
        assert same(commented, data)
    black = b"P6\n1 1\n255\n###"
    assert decode(black).getpixel((0, 0)) == (35, 35, 35)
