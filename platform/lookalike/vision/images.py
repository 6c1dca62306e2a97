"""Decoding of untrusted image bytes.

Before any pixel is decoded the file's header is checked, and what does not decide about pixels is taken out
(``containers``). ``decoder`` runs the same functions in a process of its own, with bounds of time and memory.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from lookalike.errors import UsageError
from lookalike.vision.containers import Container, examine
from lookalike.vision.formats import missing_format, readable_formats
from lookalike.vision.squares import Square
from lookalike.vision.tiff import PartsError

MAX_PIXELS = 50_000_000
MAX_SCANS = 64
"""Most scans of a JPEG; progressive ones have about ten."""
MAX_PASSES = 16
"""Most scans x pixels of a JPEG, in times ``max_pixels``: so a picture half as large may have twice as many scans."""
STATING = ("JPEG", "PNG")
"""Formats without whose size in the header no decoder begins."""
BAND_PIXELS = 1 << 20
"""Pixels that are laid on white, or scaled to 8 bits, at a time."""
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright."""
ORIENTATION = 0x0112
"""Tag of EXIF by which Pillow says how an AVIF is turned."""


class ImageError(UsageError):
    """Bytes that are not an acceptable image; ``reason`` is a short name for a table of counts."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))  # by default an exception is rebuilt from its message alone


class ImageLimits(NamedTuple):
    """Bounds that a file's header must keep before it is decoded."""

    max_pixels: int = MAX_PIXELS
    """Width x height."""
    max_scans: int = MAX_SCANS
    """Scans of a JPEG."""


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_scans: int = MAX_SCANS, square: Square | None = None
) -> Image.Image:
    """The first frame as RGB, turned upright by its orientation in EXIF or XMP, transparent parts on white.

    With ``square``, a JPEG many times larger than that is decoded smaller, by ``square.reduction``.

    Unreadable or huge texts, profiles, EXIF and other side chunks do not matter. Grey of 16 bits (12 in a TIFF) is
    scaled to 8. So is grey of 32 bits: whole numbers as 8 bits if all are at most 255, as 16 bits if all are at most
    65,535; floats as shares of white if all are from 0 to 1. Other values have no known white.

    Raises ``ImageError`` with reason ``empty`` (zero bytes), ``not_an_image``, ``format_not_installed`` (HEIF without
    its plug-in), ``too_large`` (more than ``max_pixels``: a decompression bomb), ``too_many_scans``,
    ``no_value_range`` (values of 32 bits without a known
    white), ``truncated`` or ``damaged``.
    """
    limits = ImageLimits(max_pixels, max_scans)
    return decode_container(check_header(data, limits), limits, square)


def decode_container(container: Container, limits: ImageLimits, square: Square | None = None) -> Image.Image:
    """``decode`` of a file whose header was checked."""
    image = _open(container, limits.max_pixels)
    try:
        if square is not None and container.kind == "JPEG" and (factor := square.reduction(*image.size)) > 1:
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
        image.load()
        upright = _to_rgb(image, container)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("too_large", "decoding the image takes too much memory; scale it down") from None
    except Exception as error:  # noqa: BLE001  (Pillow's decoders raise whatever hostile bytes lead them to)
        raise _explain(error) from None
    orientation = image.getexif().get(ORIENTATION, 1) if container.kind == "AVIF" else container.orientation
    turn = TRANSPOSES.get(orientation)
    return upright if turn is None else upright.transpose(turn)


def normalize(image: Image.Image) -> Image.Image:
    """A picture that was opened elsewhere as ``decode`` would give it: upright, 8 bits, transparent parts on white.

    Raises ``ImageError`` with reason ``empty`` (no pixels), ``no_value_range``, ``truncated`` or ``damaged``.
    """
    if not image.width * image.height:
        raise ImageError("empty", f"the picture has {image.width} x {image.height} pixels; give one that has some")
    try:
        image.load()
        upright = _to_rgb(image, Container(image.format or "TIFF"))
    except ImageError:
        raise
    except Exception as error:  # noqa: BLE001  (as in decode)
        raise _explain(error) from None
    try:
        turn = TRANSPOSES.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  # an EXIF that cannot be read turns nothing
        turn = None
    return upright if turn is None else upright.transpose(turn)


def _explain(error: Exception) -> ImageError:
    reason = "truncated" if "truncated" in str(error) else "damaged"
    return ImageError(reason, f"the image is {reason}: {error}; send the complete file")


def check_header(data: bytes, limits: ImageLimits) -> Container:
    """Return what is known of a picture before it is decoded; raises ``ImageError`` as ``decode`` does."""
    if not data:
        raise ImageError("empty", "the image has zero bytes; send the file's content")
    try:
        container = examine(data)
    except PartsError:
        raise ImageError("damaged", "the image's file has more parts than any picture needs; save it anew") from None
    if container is None:
        if (needed := missing_format(data)) is not None:
            raise ImageError("format_not_installed", f"the image is {needed}")
        listed = ", ".join(readable_formats())
        raise ImageError("not_an_image", f"{len(data)} bytes are no image (unknown format); send one of {listed}")
    if container.kind in STATING and not container.width * container.height:
        raise ImageError("not_an_image", f"the image is a {container.kind} without a size; send the complete file")
    _check_size(container.width, container.height, limits.max_pixels)
    if container.coded_pixels > 2 * limits.max_pixels:
        raise ImageError(
            "too_large",
            f"the image's tiles have {container.coded_pixels} pixels, the limit is {2 * limits.max_pixels}; save it "
            "with smaller tiles",
        )
    most = min(limits.max_scans, MAX_PASSES * limits.max_pixels // max(1, container.width * container.height))
    if container.scans > most:
        raise ImageError(
            "too_many_scans",
            f"the JPEG has {container.scans} scans, the limit at its size is {most}; save it anew, as other software "
            "makes about ten",
        )
    return container


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            "too_large", f"the image has {width} x {height} pixels, the limit is {max_pixels}; scale it down"
        )


def _open(container: Container, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, which have our own limit, and of what is odd in the file
            image = Image.open(io.BytesIO(container.data), formats=[container.kind])
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"{error}; the limit is {max_pixels} pixels, scale the image down") from None
    except Exception as error:  # noqa: BLE001  (as in decode)
        detail = _why_unknown(container) if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageError(
            "not_an_image",
            f"the image's first bytes are those of a {container.kind}, which cannot be read ({detail}); send one of "
            f"{', '.join(readable_formats())}",
        ) from None
    _check_size(*image.size, max_pixels)
    return image


def _why_unknown(container: Container) -> str:
    """What its format's own reader says of a file that Pillow knows not; ``Image.open`` keeps it to itself."""
    try:
        Image.OPEN[container.kind][0](io.BytesIO(container.data), "")
    except Exception as error:  # noqa: BLE001  (as in decode)
        return str(error) or type(error).__name__
    return "its header cannot be read"


def _to_rgb(image: Image.Image, container: Container) -> Image.Image:
    if image.mode[:1] in ("I", "F"):
        image = _to_grey(image, container)
    if image.mode == "La":
        image = image.convert("LA")  # the only way out of it
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """The picture on white, a band at a time, because each step of it is a copy."""
    whole = Image.new("RGB", image.size)
    for top, bottom in _bands(image):
        band = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        whole.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return whole


def _to_grey(image: Image.Image, container: Container) -> Image.Image:
    """Grey of more than 8 bits as 8 bits, where Pillow's own conversion would clip; the transparent value is white."""
    white = _white_value(image, container)
    clear = image.info.get("transparency")
    whole = Image.new("L", image.size)
    for top, bottom in _bands(image):
        values = np.asarray(image.crop((0, top, image.width, bottom)))
        grey = _scale(values, white)
        if container.inverted:
            grey = 255 - grey
        if isinstance(clear, int):
            grey[values == clear] = 255
        whole.paste(Image.fromarray(grey), (0, top))
    return whole


def _scale(values: npt.NDArray[np.generic], white: int) -> npt.NDArray[np.uint8]:
    """Values from 0 to ``white`` as 0 to 255, rounded."""
    if values.dtype.kind == "f":
        return np.round(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    return ((values.astype(np.int64).clip(0, white) * 255 + white // 2) // white).astype(np.uint8)


def _white_value(image: Image.Image, container: Container) -> int:
    """The value that is white; raises ``no_value_range`` if no rule says so."""
    if image.mode.startswith("I;16"):
        return 4095 if container.bits == 12 else 65535
    if container.kind != "TIFF" and image.mode == "I":
        return 65535  # scaled to 16 bits by the format
    lowest, highest = 0.0, 0.0
    for top, bottom in _bands(image):
        values = np.asarray(image.crop((0, top, image.width, bottom)))
        lowest, highest = float(np.fmin(lowest, values.min())), max(highest, float(values.max()))
        if not np.isfinite([values.min(), values.max()]).all():
            lowest = -np.inf
            break
    if lowest >= 0:
        white = next((white for white in ((1,) if image.mode == "F" else (255, 65535)) if highest <= white), None)
        if white is not None:
            return white
    kind, rule = ("floats", "0 to 1") if image.mode == "F" else ("whole numbers of 32 bits", "0 to 65535")
    seen = "are not all finite" if not np.isfinite(lowest) else f"reach from {lowest:g} to {highest:g}"
    raise ImageError("no_value_range", f"the image's {kind} {seen}, not from {rule}; save it with 8 or 16 bits")


def _bands(image: Image.Image) -> list[tuple[int, int]]:
    """(top, bottom) of bands of about ``BAND_PIXELS``."""
    rows = max(1, BAND_PIXELS // image.width)
    return [(top, min(image.height, top + rows)) for top in range(0, image.height, rows)]
