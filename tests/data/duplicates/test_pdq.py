"""PDQ hashes equal those of pdqhash, the binding of the reference implementation, bit for bit.

``pdqhash.json`` holds hashes that pdqhash 0.2.8 computed; ``python -m tests.data.duplicates.test_pdq`` writes it. Where
pdqhash is installed, many more images are compared.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from lookalike.data.duplicates.pdq import hash_images
from lookalike.vision.images import decode

STORED = Path(__file__).with_name("pdqhash.json")
SAMPLES = Path(__file__).resolve().parents[3] / "data/samples"
SHAPES = [(1, 1), (1, 300), (4, 4), (4, 200), (5, 5), (5, 300), (63, 64), (64, 64), (64, 65), (127, 128), (128, 129)]
SHAPES += [(144, 102), (200, 300), (257, 511), (640, 480), (1200, 900)]
Pixels = NDArray[np.uint8]


def made_images(shapes: list[tuple[int, int]]) -> Iterator[tuple[str, Pixels]]:
    """Images by arithmetic, the same on any machine: plain, ramp, waves, noise-like, grey, of each shape."""
    for height, width in shapes:
        y, x, c = np.ogrid[:height, :width, :3]
        waves = 127 + 60 * ((x // 9 + c) % 2) - 50 * ((y // 13) % 2)
        noise = (x * 7919 + y * 104729 + c * 1299709 + (x * y) * 15485863) % 32452843 // 97
        kinds = {"white": 255 + 0 * (x + y + c), "ramp": 255 * (x + y) // (height + width) + 0 * c, "waves": waves}
        kinds |= {"noise": noise, "grey": noise[:, :, :1] + 0 * c}
        for kind, values in kinds.items():
            yield f"{kind} {height}x{width}", (values % 256).astype(np.uint8)


def sample_images(every: int) -> Iterator[tuple[str, Pixels]]:
    """Each ``every``-th sample image of a file, by file and row."""
    for path in sorted(SAMPLES.glob("*/part-*.parquet")):
        images = pq.read_table(path, columns=["image"])["image"].to_pylist()
        for row in range(0, len(images), every):
            yield f"{path.parent.name}/{path.stem} {row}", np.asarray(decode(images[row]))


def hashes_of(images: list[Pixels]) -> list[tuple[str, int]]:
    bits, quality = hash_images(images)
    return [(row.tobytes().hex(), int(value)) for row, value in zip(bits, quality, strict=True)]


def reference(pixels: Pixels) -> tuple[str, int]:
    pdqhash = pytest.importorskip("pdqhash", reason="pdqhash needs a compiler; its stored hashes are compared above")
    bits, quality = pdqhash.compute(np.ascontiguousarray(pixels))
    return np.packbits(np.asarray(bits, np.uint8)).tobytes().hex(), int(quality)


def turns(pixels: Pixels) -> list[Pixels]:
    """The eight rotations and reflections."""
    return [np.rot90(side, turn) for side in (pixels, pixels[:, ::-1]) for turn in range(4)]


def test_stored_hashes_of_pdqhash_are_met() -> None:
    stored = {name: (bits, quality) for name, bits, quality in json.loads(STORED.read_text())}
    images = dict(made_images(SHAPES)) | dict(sample_images(150))
    assert dict(zip(images, hashes_of(list(images.values())), strict=True)) == stored


def test_pdqhash_agrees_on_real_images_and_their_mirror_images() -> None:
    for _, pixels in sample_images(8):
        pair = [pixels, pixels[:, ::-1]]
        assert hashes_of(pair) == [reference(turned) for turned in pair]


def test_pdqhash_agrees_on_made_images_of_any_size_turned_and_mirrored() -> None:
    rng = np.random.default_rng(3)
    sizes = [(int(height), int(width)) for height, width in rng.integers(1, 400, (12, 2))]
    for name, pixels in made_images([*sizes, (1, 1), (1, 40), (64, 64), (1500, 1100)]):
        assert hashes_of(turns(pixels)) == [reference(turned) for turned in turns(pixels)], name


def test_an_image_has_the_same_hash_alone_and_among_others() -> None:
    images = [pixels for _, pixels in made_images([(144, 102), (64, 64), (3, 3), (144, 144)])]
    assert hashes_of(images) == [hashes_of([pixels])[0] for pixels in images]


def test_a_small_or_plain_image_has_no_quality() -> None:
    small, plain = np.full((4, 100, 3), 9, np.uint8), np.full((100, 100, 3), 200, np.uint8)
    assert [quality for _, quality in hashes_of([small, plain])] == [0, 0]
    assert hashes_of([small])[0][0] == "0" * 64


if __name__ == "__main__":
    rows = [[name, *reference(pixels)] for name, pixels in [*made_images(SHAPES), *sample_images(150)]]
    STORED.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
