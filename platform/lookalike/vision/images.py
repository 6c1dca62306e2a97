"""Decoding of untrusted image bytes: the header's size is checked before any pixel is decoded."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lookalike.errors import UsageError

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(UsageError):
    """Bytes that are not an acceptable image; ``reason`` is a short name for a table of counts."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))  # by default an exception is rebuilt from its message alone


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame as RGB, turned upright by its EXIF orientation, transparent parts on white.

    Raises ``ImageError`` with reason ``empty`` (zero bytes), ``not_an_image``, ``too_large`` (more than ``max_pixels``:
    a decompression bomb), ``truncated`` or ``damaged``.
    """
    image = _open(data, max_pixels)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Exception as error:  # noqa: BLE001  (Pillow's decoders raise whatever hostile bytes lead them to)
        reason = "truncated" if "truncated" in str(error) else "damaged"
        raise ImageError(reason, f"the image is {reason}: {error}; send the complete file") from None


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("empty", "the image has zero bytes; send the file's content")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"{error}; the limit is {max_pixels} pixels, scale the image down") from None
    except Exception as error:  # noqa: BLE001  (as in decode)
        detail = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageError(
            "not_an_image", f"{len(data)} bytes are no image ({detail}); send one of {', '.join(FORMATS)}"
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            "too_large", f"the image has {width} x {height} pixels, the limit is {max_pixels}; scale it down"
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, where Pillow's own conversion would clip; the transparent value becomes white."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)
