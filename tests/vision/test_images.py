"""Decoding of untrusted bytes: every bad image has a reason, every good one comes out upright, RGB and on white."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lookalike.errors import UsageError
from lookalike.vision.encoder import to_bytes
from lookalike.vision.images import ImageError, decode


def noise(width: int = 40, height: int = 30, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values)


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def png_header(width: int, height: int) -> bytes:
    """A PNG of 69 bytes that claims to be so large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_accepted_formats(image_format: str) -> None:
    picture = Image.new("RGB", (40, 30), (200, 30, 90))
    data = to_bytes(picture, image_format)
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image, int) - np.asarray(picture, int)).max() <= 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not_an_image"),
        (bytes(1000), "not_an_image"),
        (b"\xff\xd8\xff", "not_an_image"),
        (b"%PDF-1.7 " + bytes(99), "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
    ],
)
def test_bytes_that_are_no_image(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=r"send") as caught:
        decode(data)
    assert caught.value.reason == reason
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.2])
def test_truncated_files(image_format: str, kept: float) -> None:
    data = to_bytes(noise(200, 200), image_format)
    with pytest.raises(ImageError) as caught:
        decode(data[: int(len(data) * kept)])
    assert caught.value.reason in {"truncated", "damaged", "not_an_image"}
    assert image_format == "WEBP" or caught.value.reason == "truncated"


@settings(max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_byte_gives_an_image_or_a_reason(image_format: str, place: int, value: int) -> None:
    data = bytearray(to_bytes(noise(24, 24), image_format))
    data[place % len(data)] = value
    try:
        outcome = decode(bytes(data), max_pixels=100_000).mode
    except ImageError as error:  # any other exception fails the test
        outcome = error.reason
    assert outcome in {"RGB", "not_an_image", "truncated", "damaged", "too_large"}


@pytest.mark.parametrize("side", [8_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    data = png_header(side, side)
    assert len(data) < 100
    with pytest.raises(ImageError, match=r"the limit is 50000000") as caught:
        decode(data)
    assert caught.value.reason == "too_large"


def test_an_error_travels_between_processes_whole() -> None:
    with pytest.raises(ImageError) as caught:
        decode(b"no picture")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.reason, str(again)) == (ImageError, caught.value.reason, str(caught.value))


def test_the_bound_is_exact() -> None:
    data = to_bytes(noise(40, 30))
    assert decode(data, max_pixels=1200).size == (40, 30)
    with pytest.raises(ImageError, match=r"40 x 30 pixels, the limit is 1199; scale it down"):
        decode(data, max_pixels=1199)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (64, 32), (255, 255, 255))
    upright.paste((255, 0, 0), (0, 0, 16, 16))  # a red mark at the top left
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=95, exif=exif)
    image = decode(buffer.getvalue())
    assert image.size == (64, 32)
    red, green, _ = pixel(image, 4, 4)
    assert red > 200
    assert green < 60
    assert all(value > 200 for value in pixel(image, 60, 28))


def test_transparency_is_laid_on_white() -> None:
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.putpixel((1, 1), (0, 0, 0, 255))
    picture.putpixel((2, 2), (0, 0, 0, 128))
    image = decode(to_bytes(picture))
    assert (pixel(image, 0, 0), pixel(image, 1, 1), pixel(image, 2, 2)) == ((255,) * 3, (0,) * 3, (127,) * 3)
    grey = Image.new("LA", (2, 2), (0, 0))
    assert pixel(decode(to_bytes(grey)), 0, 0) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour() -> None:
    picture = Image.new("P", (3, 3), 0)
    picture.putpalette([10, 20, 30, 250, 5, 5])
    picture.putpixel((1, 1), 1)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=0)
    image = decode(buffer.getvalue())
    assert (pixel(image, 0, 0), pixel(image, 1, 1)) == ((255, 255, 255), (250, 5, 5))
    assert pixel(decode(to_bytes(picture)), 0, 0) == (10, 20, 30)


def test_cmyk_and_grey_become_rgb() -> None:
    cyan = decode(to_bytes(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"))
    assert pixel(cyan, 8, 8)[0] < 30
    assert min(pixel(cyan, 8, 8)[1:]) > 200
    assert pixel(decode(to_bytes(Image.new("L", (4, 4), 77))), 0, 0) == (77, 77, 77)
    assert pixel(decode(to_bytes(Image.new("1", (4, 4), 1))), 0, 0) == (255, 255, 255)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert pixel(decode(buffer.getvalue()), 4, 4) == (255, 0, 0)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_any_animated_format(image_format: str) -> None:
    frames = [Image.new("RGBA", (8, 8), color) for color in ((255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255))]
    buffer = io.BytesIO()
    options = {"lossless": True} if image_format == "WEBP" else {}
    frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(io.BytesIO(buffer.getvalue())) as stored:
        assert getattr(stored, "n_frames", 1) == 3
    assert pixel(decode(buffer.getvalue()), 4, 4) == (255, 0, 0)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_scaled(image_format: str) -> None:
    values = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    image = decode(to_bytes(Image.fromarray(values), image_format))
    expected = np.round(values / 257)
    assert np.abs(np.asarray(image, int) - expected[..., None]).max() <= 1
    assert len(np.unique(np.asarray(image))) > 200  # a ramp stays a ramp


def test_colour_of_16_bits_and_transparent_grey_of_16_bits() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def png16(kind: int, row: list[int], extra: bytes = b"") -> bytes:
        channels = {0: 1, 2: 3}[kind]
        header = struct.pack(">IIBBBBB", len(row) // channels, 1, 16, kind, 0, 0, 0)
        pixels = zlib.compress(b"\0" + struct.pack(f">{len(row)}H", *row))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

    assert pixel(decode(png16(2, [65535, 0, 32896])), 0, 0) == (255, 0, 128)
    clear = png16(0, [1000, 32896], chunk(b"tRNS", struct.pack(">H", 1000)))
    assert [pixel(decode(clear), x, 0) for x in (0, 1)] == [(255, 255, 255), (128, 128, 128)]


def test_one_bit_and_palette_with_alpha_values() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (4, 4))).convert("1")
    for image_format in ("PNG", "TIFF"):
        image = decode(to_bytes(stripes, image_format))
        assert [pixel(image, x, 0) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes([255, 128]))
    image = decode(buffer.getvalue())
    assert pixel(image, 0, 0) == (200, 0, 0)
    assert np.abs(np.array(pixel(image, 1, 0)) - (127, 127, 227)).max() <= 1
