"""What is left of pictures without their margins, and that copies agree once both margins are gone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lookalike.data.duplicates.margins import CELLS, SIDE, find_content, shrink, trim_margin


def blocks(seed: int, width: int = 80, height: int = 60) -> Image.Image:
    """A picture whose edges differ from white everywhere."""
    pixels = np.random.default_rng(seed).integers(0, 180, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def on_white(image: Image.Image, size: tuple[int, int], place: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image, place)
    return canvas


def array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


margins, wide = (st.tuples(*[st.integers(least, 30)] * 4) for least in (1, 3))


@settings(max_examples=60)
@given(seed=st.integers(0, 99), margin=margins, shade=st.integers(230, 255))
def test_a_margin_is_found_to_the_pixel(seed: int, margin: Any, shade: int) -> None:
    image = ImageOps.expand(blocks(seed), margin, (shade, shade, shade))
    left, top = margin[:2]
    assert find_content(array(image)) == pytest.approx((left, top, left + 80, top + 60), abs=0.5)


@settings(max_examples=60)
@given(seed=st.integers(0, 99), margin=wide, border=st.integers(2, 12), colour=st.sampled_from(["red", "black"]))
def test_a_border_around_a_margin_and_another_margin_change_nothing(
    seed: int, margin: Any, border: int, colour: str
) -> None:
    plain = trim_margin(on_white(blocks(seed), (130, 100), (20, 15)))
    other = ImageOps.expand(ImageOps.expand(blocks(seed), margin, "white"), border, colour)
    assert np.array_equal(trim_margin(other), plain)


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.5, 2.0])
def test_edges_keep_their_place_when_a_picture_is_scaled(scale: float) -> None:
    image = on_white(blocks(1), (120, 100), (21, 17))
    scaled = image.resize((round(120 * scale), round(100 * scale)), Image.Resampling.BICUBIC)
    found = np.array(find_content(array(scaled))) / scale
    assert found == pytest.approx((21, 17, 101, 77), abs=0.4)


@settings(max_examples=30)
@given(seed=st.integers(0, 99), width=st.integers(1, 40), height=st.integers(1, 40))
def test_pictures_of_any_shape_give_one_shape(seed: int, width: int, height: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    left, top, right, bottom = find_content(noise)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    content = trim_margin(Image.fromarray(noise))
    assert content.shape == (SIDE, SIDE, 3)
    assert shrink(content).shape == (CELLS, CELLS, 3)


def test_a_flat_picture_and_a_dot_stay_whole() -> None:
    flat = np.full((50, 70, 3), 200, np.uint8)
    assert find_content(flat) == (0, 0, 70, 50)
    flat[20:23, 30:33] = 0
    assert find_content(flat) == (0, 0, 70, 50)
    flat[10:30, 20:50] = 0
    assert find_content(flat) == pytest.approx((20, 10, 50, 30), abs=0.5)


def test_a_picture_that_differs_from_its_corners_everywhere_stays_whole() -> None:
    image = blocks(3)
    halves = np.asarray(image).copy()
    halves[:, :40], halves[:, 40:] = (255, 0, 0), (0, 0, 255)  # a flag: no two corners agree with their median
    assert find_content(halves) == (0, 0, 80, 60)


def test_a_mirror_image_has_the_mirrored_content() -> None:
    image = on_white(blocks(5), (130, 100), (33, 9))
    turned = trim_margin(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert np.abs(turned[:, ::-1].astype(int) - trim_margin(image)).max() <= 1


def test_colours_are_means_of_cells() -> None:
    content = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    means = content.reshape(CELLS, SIDE // CELLS, CELLS, SIDE // CELLS, 3).mean(axis=(1, 3))
    assert np.abs(shrink(content) - means).max() <= 0.51
