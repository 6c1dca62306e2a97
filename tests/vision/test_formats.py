"""Formats beyond Pillow's own: read where the plug-in is installed, else named with the remedy."""

import io
import sys
from collections.abc import Iterator

import pytest
from PIL import Image

from lookalike.data.sources.reader import IMAGE_SUFFIXES
from lookalike.vision import formats
from lookalike.vision.images import ImageError, decode

HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(88)


@pytest.fixture
def no_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.readable_formats.cache_clear()
    yield
    formats.readable_formats.cache_clear()


@pytest.mark.usefixtures("no_plugin")
def test_heic_without_its_plugin_names_the_extra() -> None:
    for brand in (b"heic", b"heix", b"mif1", b"msf1"):
        with pytest.raises(
            ImageError, match=r"HEIF, which is not read here; pip install 'lookalike\[heic\]'"
        ) as caught:
            decode(HEIC.replace(b"heic", brand))
        assert caught.value.reason == "format_not_installed"
    assert formats.unusual_formats() == []


@pytest.mark.usefixtures("no_plugin")
def test_avif_without_its_decoder_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(sink, "AVIF")
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(ImageError, match=r"AVIF, which is not read here; install a Pillow"):
        decode(sink.getvalue())
    assert formats.unusual_formats() == ["AVIF"]


def test_heic_with_its_plugin() -> None:
    plugin = pytest.importorskip("pillow_heif")
    formats.readable_formats.cache_clear()
    plugin.register_heif_opener()
    sink = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 90)).save(sink, "HEIF", quality=90)
    assert decode(sink.getvalue()).size == (40, 30)
    with pytest.raises(ImageError, match="the limit is 100;"):
        decode(sink.getvalue(), max_pixels=100)
    with pytest.raises(ImageError) as caught:
        decode(HEIC)
    assert caught.value.reason in {"not_an_image", "damaged", "truncated"}
    assert formats.unusual_formats() == ["HEIF"]


def test_an_avif_is_turned_by_its_own_place_for_that_whatever_its_side_items_hold() -> None:
    picture = Image.new("RGB", (64, 32), "white")
    picture.paste((255, 0, 0), (0, 0, 32, 32))
    for extra in ({}, {"xmp": b"\xff" * 5000}):
        sink, tags = io.BytesIO(), Image.Exif()
        tags[0x0112] = 6
        picture.save(sink, "AVIF", exif=tags, quality=90, **extra)
        image = decode(sink.getvalue())
        assert image.size == (32, 64)
        green = [image.getpixel((16, y))[1] for y in (8, 56)]  # type: ignore[index]
        assert green[0] < 60
        assert green[1] > 200
    with pytest.raises(ImageError, match="the limit is 100;"):
        decode(sink.getvalue(), max_pixels=100)
    with pytest.raises(ImageError):
        decode(sink.getvalue()[:200])


def test_every_ending_of_a_format_that_is_read_is_known() -> None:
    Image.init()
    endings = {ending for ending, name in Image.registered_extensions().items() if name in formats.FORMATS}
    assert endings - {".pfm"} <= set(IMAGE_SUFFIXES)  # float images, which are not 8-bit pictures
