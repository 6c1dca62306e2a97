"""What a picture shows without its uniform margins: a border put around it, or the white around a product.

A crop mostly takes of the margin and a border adds one, so that two such copies agree once both are gone. Edges are
found in fractions of a pixel: rounded ones move when a picture is scaled or compressed, and the hash with them.
"""

from math import ceil, floor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""

SIDE = 128  # of the picture that is hashed
CELLS = 8  # a side, of the colours that are compared
LARGEST = 256  # pixels a side in which margins are looked for
TOLERANCE = 40  # levels of 255 by which a margin may vary: the noise of JPEG beside an edge
ROUNDS = 4  # a border around a white margin around the picture, and one more
LEAST_SHARE = 16  # no round leaves less than this part of the area: a dot on white is a picture of a dot on white
LEAST_SIDE = 8


def trim_margin(image: Image.Image) -> NDArray[np.uint8]:
    """The content of an RGB ``image`` as [SIDE, SIDE, 3]: without margins, whatever its size and shape."""
    small = image.reduce(max(1, -(-max(image.size) // LARGEST)))
    left, top, right, bottom = (round(edge, 3) for edge in find_content(np.asarray(small)))
    x, y = floor(left), floor(top)  # cut first: the same content gives the same sums wherever in its picture it stands
    content = small.crop((x, y, ceil(right), ceil(bottom)))
    box = (round(left - x, 3), round(top - y, 3), round(right - x, 3), round(bottom - y, 3))
    return np.asarray(content.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))


def shrink(content: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean colours [CELLS, CELLS, 3] of what :func:`trim_margin` gives."""
    return np.asarray(Image.fromarray(content).reduce(SIDE // CELLS))


def find_content(pixels: NDArray[np.uint8]) -> Box:
    """Where the content of an RGB picture [h, w, 3] lies; the whole where it has no margin or would be too small.

    What lies inside a margin is looked at again, less a pixel, which scaling has mixed with the margin.
    """
    height, width = pixels.shape[:2]
    box: Box = (0.0, 0.0, float(width), float(height))
    left, top = 0, 0
    for _ in range(ROUNDS):
        height, width = pixels.shape[:2]
        inner = _inside_margin(pixels)
        if inner == (0, 0, width, height) or LEAST_SHARE * _area(inner) < height * width:
            break
        box = (left + inner[0], top + inner[1], left + inner[2], top + inner[3])
        first = [int(np.ceil(place)) + (place > 0) for place in inner[:2]]
        last = [int(place) - (place < size) for place, size in zip(inner[2:], (width, height), strict=True)]
        if min(last[0] - first[0], last[1] - first[1]) < LEAST_SIDE:
            break
        pixels = pixels[first[1] : last[1], first[0] : last[0]]
        left, top = left + first[0], top + first[1]
    return box


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _inside_margin(pixels: NDArray[np.uint8]) -> Box:
    """What differs from the corners' median colour; nothing for a flat picture."""
    height, width = pixels.shape[:2]
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].astype(np.int16)
    strength = np.abs(pixels - np.median(corners, axis=0).astype(np.int16)).max(axis=2)
    across, down = strength.max(axis=0), strength.max(axis=1)
    if across.max() <= TOLERANCE:
        return 0.0, 0.0, 0.0, 0.0
    return _edge(across), _edge(down), width - _edge(across[::-1]), height - _edge(down[::-1])


def _edge(strength: NDArray[np.int16]) -> float:
    """Where ``strength`` [n], read from the outside, crosses half of what it reaches within three pixels."""
    start = int(np.argmax(strength > TOLERANCE))
    near = strength[start : start + 3]
    level = max(TOLERANCE, int(near.max()) / 2)
    place = start + int(np.argmax(near >= level))
    if not place:
        return 0.0
    before, after = float(strength[place - 1]), float(strength[place])
    return max(0.0, place + 0.5 - (after - level) / (after - before))
