"""From a picture to the square that a backbone reads. Needs Pillow and numpy alone, as the decoder processes do."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

SPARE = 3
"""A JPEG is decoded smaller only while its read side stays this many times the square's: resizing sees no difference
that matters, and pictures below six times the square are decoded whole."""


INTERPOLATIONS = ("bilinear", "bicubic")
"""Names of Pillow's filters, which average over all pixels that a new one covers."""


class Square(NamedTuple):
    """How a picture becomes a square."""

    fit: str
    """``pad``: the whole picture on white; ``crop``: its centre."""
    size: int
    """Side in pixels."""
    crop_fraction: float
    """Share of the short side that ``crop`` keeps."""
    interpolation: str = "bilinear"
    """One of ``INTERPOLATIONS``."""

    def reduction(self, width: int, height: int) -> int:
        """Return the factor, 1, 2, 4 or 8, by which a JPEG of this size may be decoded smaller."""
        side = max(width, height) if self.fit == "pad" else min(width, height) * self.crop_fraction
        return next((factor for factor in (8, 4, 2) if side >= factor * SPARE * self.size), 1)

    def pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """RGB image -> uint8 [size, size, 3]."""
        if self.fit == "pad":
            return np.asarray(pad_to_square(image, self.size, self.interpolation))
        return np.asarray(crop_to_square(image, self.size, self.crop_fraction, self.interpolation))


def pad_to_square(image: Image.Image, size: int, interpolation: str = "bilinear") -> Image.Image:
    """Scale so that the long side is ``size`` pixels, centred on white."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    scaled = image.resize((width, height), Image.Resampling[interpolation.upper()])
    canvas.paste(scaled, ((size - width) // 2, (size - height) // 2))
    return canvas


def crop_to_square(image: Image.Image, size: int, fraction: float, interpolation: str = "bilinear") -> Image.Image:
    """The centre square whose side is ``fraction`` of the short side, scaled to ``size`` pixels.

    The same pixels as torchvision's and timm's ``Resize(floor(size / fraction))`` and ``CenterCrop(size)``, but the
    parts cut away are never resized: a strip of 50,000 x 2 pixels would grow a thousand times on the way.
    """
    short = min(image.size)
    (left, right), (top, bottom) = (_span(side, short, size, fraction) for side in image.size)
    return image.resize((size, size), Image.Resampling[interpolation.upper()], box=(left, top, right, bottom))


def _span(side: int, short: int, size: int, fraction: float) -> tuple[float, float]:
    """Begin and end of the centre along a ``side``, in pixels of the picture."""
    scaled = int(int(size / fraction) * side / short)  # as torchvision rounds
    begin, pixel = round((scaled - size) / 2), side / scaled
    return begin * pixel, min((begin + size) * pixel, side)
