"""From a picture to the square that a backbone reads. Needs Pillow and numpy alone, as the decoder processes do."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

SPARE = 3
"""A JPEG is decoded smaller only while its read side stays this many times the square's: resizing sees no difference
that matters, and pictures below six times the square are decoded whole."""


class Square(NamedTuple):
    """How a picture becomes a square."""

    fit: str
    """``pad``: the whole picture on white; ``crop``: its centre."""
    size: int
    """Side in pixels."""
    crop_fraction: float
    """Share of the short side that ``crop`` keeps."""

    def reduction(self, width: int, height: int) -> int:
        """Return the factor, 1, 2, 4 or 8, by which a JPEG of this size may be decoded smaller."""
        side = max(width, height) if self.fit == "pad" else min(width, height) * self.crop_fraction
        return next((factor for factor in (8, 4, 2) if side >= factor * SPARE * self.size), 1)

    def pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """RGB image -> uint8 [size, size, 3]."""
        if self.fit == "pad":
            return np.asarray(pad_to_square(image, self.size))
        return np.asarray(crop_to_square(image, self.size, self.crop_fraction))


def pad_to_square(image: Image.Image, size: int) -> Image.Image:
    """Scale so that the long side is ``size`` pixels, centred on white."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), ((size - width) // 2, (size - height) // 2))
    return canvas


def crop_to_square(image: Image.Image, size: int, fraction: float) -> Image.Image:
    """The centre square whose side is ``fraction`` of the short side, scaled to ``size`` pixels.

    The same picture as resizing the short side to size / fraction and cutting out the centre, but the parts cut away
    are never resized: a strip of 50,000 x 2 pixels would grow a thousand times on the way.
    """
    width, height = image.size
    side = min(width, height) * fraction
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
