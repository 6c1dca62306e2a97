"""PDQ, the perceptual hash of Facebook's *The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm*.

Luminance, a tent blur by two passes of a box in each direction, 64 x 64 samples, the low frequencies of their cosine
transform, one bit per frequency: above the median or not. Bit for bit the hashes of the reference implementation,
whose sums run from left to right in single precision: hence the loops. Images of one size go through them together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 256
SAMPLES = 64
FREQUENCIES = 16
LEAST_SIDE = 5
"""A smaller image has the hash 0 and the quality 0."""
MIDDLE = HASH_BITS // 2 - 1
"""Place of the median: of the two in the middle, the lower."""
STACK_PIXELS = 1 << 18
"""Pixels of one size that are hashed together: their luminance fits into a processor's cache."""

Floats = NDArray[np.float32]
COSINES: Floats = (
    float(np.float32(np.sqrt(2 / SAMPLES)))
    * np.cos(np.pi / 2 / SAMPLES * np.outer(2 * np.arange(SAMPLES) + 1, np.arange(1, FREQUENCIES + 1)))
).astype(np.float32)
"""Rows of the transform [SAMPLES, FREQUENCIES], without the constant one."""


class PdqHashes(NamedTuple):
    """Hashes of n images."""

    bits: NDArray[np.uint8]
    """Packed, [n, 32]."""
    quality: NDArray[np.int64]
    """0 (a plain surface) to 100, [n]."""


def hash_images(images: Sequence[NDArray[np.uint8]]) -> PdqHashes:
    """Return the hashes of RGB ``images`` [height, width, 3] of any sizes, in their order."""
    hashes = PdqHashes(np.zeros((len(images), HASH_BITS // 8), np.uint8), np.zeros(len(images), np.int64))
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, pixels in enumerate(images):
        if min(pixels.shape[:2]) >= LEAST_SIDE:
            by_shape.setdefault(pixels.shape, []).append(index)
    for (height, width, _), indices in by_shape.items():
        step = max(1, STACK_PIXELS // (height * width))
        for place in (indices[start : start + step] for start in range(0, len(indices), step)):
            samples = sample(np.stack([luminance(images[index]) for index in place]))
            spectra = transform(samples)
            medians = np.partition(spectra, MIDDLE)[:, MIDDLE, None]
            hashes.bits[place] = np.packbits(spectra > medians, axis=1)
            hashes.quality[place] = quality(samples)
    return hashes


def luminance(pixels: NDArray[np.uint8]) -> Floats:
    """Luminance [h, w], 0 to 255, of an RGB image [h, w, 3]."""
    sums = pixels[..., 0] * 0.299
    sums += pixels[..., 1] * 0.587
    sums += pixels[..., 2] * 0.114
    return sums.astype(np.float32)


def sample(images: Floats) -> Floats:
    """Return 64 x 64 samples [n, 64, 64] of blurred images [n, h, w]; of images of that size themselves."""
    height, width = images.shape[1:]
    if (height, width) == (SAMPLES, SAMPLES):
        return images
    rows, columns = (((np.arange(SAMPLES) + 0.5) * size / SAMPLES).astype(int) for size in (height, width))
    lines = np.ascontiguousarray(images.transpose(2, 0, 1))  # the axis to blur comes first
    lines = np.ascontiguousarray(blur(lines, np.arange(width)).T)
    lines = np.ascontiguousarray(blur(lines, np.arange(height)).T)
    lines = np.ascontiguousarray(blur(lines, columns).T)
    return blur(lines, rows).transpose(1, 0, 2)


def blur(lines: Floats, places: NDArray[np.int64]) -> Floats:
    """Return the box means along the first axis, at ``places`` of it alone; a box is cut off where the axis ends."""
    count = len(lines)
    window = -(-count // (2 * SAMPLES))
    ahead = window // 2
    sums, total = np.empty_like(lines), np.zeros_like(lines[0])
    for end in range(count + ahead):
        if end < count:
            total += lines[end]
        if end >= window:
            total -= lines[end - window]
        if end >= ahead:
            sums[end - ahead] = total
    sizes = np.minimum(places + ahead + 1, count) - np.maximum(places + ahead + 1 - window, 0)
    return sums[places] / sizes.astype(np.float32).reshape(-1, *[1] * (lines.ndim - 1))


def transform(samples: Floats) -> Floats:
    """Return the low frequencies [n, 256] of the cosine transform, the highest first."""
    count = len(samples)
    half = project(samples.transpose(1, 0, 2).reshape(SAMPLES, -1)).reshape(FREQUENCIES, count, SAMPLES)
    spectra = project(half.transpose(2, 0, 1).reshape(SAMPLES, -1)).reshape(FREQUENCIES, FREQUENCIES, count)
    return spectra.transpose(2, 1, 0).reshape(count, -1)[:, ::-1]


def project(lines: Floats) -> Floats:
    """Return the low frequencies [16, m] of ``lines`` [64, m] along the first axis."""
    sums = np.zeros((FREQUENCIES, lines.shape[1]), np.float32)
    for line, cosines in zip(lines, COSINES, strict=True):
        sums += cosines[:, None] * line
    return sums


def quality(samples: Floats) -> NDArray[np.int64]:
    """Return the quality [n] of hashes of ``samples``: their gradients in percent of the range, 9,000 at most."""
    total = np.zeros(len(samples), np.int64)
    for steps in (np.diff(samples, axis=1), np.diff(samples, axis=2)):
        percent = steps * np.float32(100) / np.float32(255)
        total += np.abs(percent.astype(np.int64)).sum(axis=(1, 2))
    return np.minimum(total // 90, 100)
