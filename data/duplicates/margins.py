"""The content of a picture without its uniform margins: an added border, or the white around a product.

A crop mostly removes margin and a border adds some, so copies of both kinds agree once the margins are gone. Edges are
found in fractions of a pixel: rounded edges would move when a picture is scaled or compressed, and change the hash.
"""

from math import ceil, floor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""

SIDE = 128  # pixels of the picture that is hashed
CELLS = 8  # cells per side whose colours are compared
LARGEST = 256  # larger pictures are reduced to this side before margins are sought
TOLERANCE = 40  # levels of 255 by which a margin may vary: the noise of JPEG next to an edge
ROUNDS = 4  # a border around a white margin around the picture, and one more
LEAST_SHARE = 16  # each round leaves at least 1/16 of the area: a dot on white stays a picture of a dot on white
LEAST_SIDE = 8


def trim_margin(image: Image.Image) -> NDArray[np.uint8]:
    """The content of an RGB ``image`` as [SIDE, SIDE, 3]: without margins, whatever its size and shape."""
    small = image.reduce(max(1, -(-max(image.size) // LARGEST)))
    left, top, right, bottom = (round(edge, 3) for edge in find_content(np.asarray(small)))
    x, y = floor(left), floor(top)  # cut first: equal content gives equal sums wherever in a picture it lies
    content = small.crop((x, y, ceil(right), ceil(bottom)))
    box = (round(left - x, 3), round(top - y, 3), round(right - x, 3), round(bottom - y, 3))
    return np.asarray(content.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))


def shrink(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean colours [CELLS, CELLS, 3] of the result of :func:`trim_margin`."""
    return np.asarray(Image.fromarray(content).reduce(SIDE // CELLS))


def find_content(pixels: NDArray[np.uint8]) -> Box:
    """The box of the content of an RGB picture [h, w, 3]; the whole picture if it has no margin or too little is left.

    Each round looks inside the margin of the one before, one pixel further in, because scaling mixes that pixel with
    the margin.
    """
    height, width = pixels.shape[:2]
    box: Box = (0.0, 0.0, float(width), float(height))
    left, top = 0, 0
    for _ in range(ROUNDS):
        height, width = pixels.shape[:2]
        inner = _inside_margin(pixels)
        area = (inner[2] - inner[0]) * (inner[3] - inner[1])
        if inner == (0, 0, width, height) or LEAST_SHARE * area < height * width:
            break
        box = (left + inner[0], top + inner[1], left + inner[2], top + inner[3])
        first = [int(np.ceil(place)) + (place > 0) for place in inner[:2]]
        last = [int(place) - (place < size) for place, size in zip(inner[2:], (width, height), strict=True)]
        if min(last[0] - first[0], last[1] - first[1]) < LEAST_SIDE:
            break
        pixels = pixels[first[1] : last[1], first[0] : last[0]]
        left, top = left + first[0], top + first[1]
    return box


def _inside_margin(pixels: NDArray[np.uint8]) -> Box:
    """The box of the pixels that differ from the corners' median colour; an empty box for a flat picture."""
    height, width = pixels.shape[:2]
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].astype(np.int16)
    strength = np.abs(pixels - np.median(corners, axis=0).astype(np.int16)).max(axis=2)
    across, down = strength.max(axis=0), strength.max(axis=1)
    if across.max() <= TOLERANCE:
        return 0.0, 0.0, 0.0, 0.0
    return _edge(across), _edge(down), width - _edge(across[::-1]), height - _edge(down[::-1])


def _edge(strength: NDArray[np.int16]) -> float:
    """Place where ``strength`` [n], from the outside in, crosses half of its maximum over the next three pixels."""
    start = int(np.argmax(strength > TOLERANCE))
    near = strength[start : start + 3]
    level = max(TOLERANCE, int(near.max()) / 2)
    place = start + int(np.argmax(near >= level))
    if not place:
        return 0.0
    before, after = float(strength[place - 1]), float(strength[place])
    return max(0.0, place + 0.5 - (after - level) / (after - before))
