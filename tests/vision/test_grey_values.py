"""Grey of more than 8 bits is scaled by a rule, or refused with a reason; it is never clipped."""

import io
import struct

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lookalike.vision.encoder import to_bytes
from lookalike.vision.images import ImageError, decode

RAMP = np.linspace(0, 1, 64 * 4).reshape(4, 64)


def tiff(values: npt.NDArray[np.generic], bits: int, sample_format: int, photometric: int = 1) -> bytes:
    """An uncompressed TIFF of one channel, whose bytes are those of ``values``."""
    body = values.tobytes()
    tags = [
        (256, 64),
        (257, 4),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 4),
        (279, len(body)),
        (339, sample_format),
    ]
    folder = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + folder + bytes(4)


def pack_12_bits(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Pairs of 12-bit values in three bytes, high bits first."""
    first, second = values.reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)


def pfm(values: npt.NDArray[np.float32]) -> bytes:
    return b"Pf\n64 4\n-1.0\n" + values[::-1].astype("<f4").tobytes()


def saved(values: npt.NDArray[np.generic], image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, image_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


FLOATS = RAMP.astype(np.float32)
RAMPS = {
    "float tiff": saved(FLOATS, "TIFF"),
    "float tiff, lzw": saved(FLOATS, "TIFF", compression="tiff_lzw"),
    "float pfm": pfm(FLOATS),
    "12 bits": tiff(pack_12_bits(np.round(RAMP * 4095).astype(np.int64)), 12, 1),
    "16 bits": tiff(np.round(RAMP * 65535).astype(np.uint16), 16, 1),
    "16 bits, signed, of 8": tiff(np.round(RAMP * 255).astype(np.int16), 16, 2),
    "32 bits, of 8": tiff(np.round(RAMP * 255).astype(np.uint32), 32, 1),
    "32 bits, of 16": tiff(np.round(RAMP * 65535).astype(np.uint32), 32, 1),
    "32 bits, signed, of 8": tiff(np.round(RAMP * 255).astype(np.int32), 32, 2),
    "32 bits, signed, of 16": saved(np.round(RAMP * 65535).astype(np.int32), "TIFF"),
    "pgm": saved(np.round(RAMP * 65535).astype(np.uint16), "PPM"),
}


@pytest.mark.parametrize("case", RAMPS)
def test_a_ramp_stays_a_ramp(case: str) -> None:
    image = decode(RAMPS[case])
    assert (image.mode, image.size) == ("RGB", (64, 4))
    assert np.abs(np.asarray(image, int) - np.round(RAMP * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("case", ["16 bits", "float"])
def test_white_may_be_zero(case: str) -> None:
    values = np.round(RAMP * 65535).astype(np.uint16) if case == "16 bits" else FLOATS
    bits, sample_format = (16, 1) if case == "16 bits" else (32, 3)
    image = decode(tiff(values, bits, sample_format, photometric=0))
    assert np.abs(np.asarray(image, int) - (255 - np.round(RAMP * 255))[..., None]).max() <= 1


def test_values_above_one_megapixel_are_read_in_bands() -> None:
    values = np.zeros((1200, 1000), np.float32)
    values[-1, -1] = 1
    assert decode(saved(values, "TIFF")).getpixel((999, 1199)) == (255, 255, 255)
    values[-1, -1] = 1.5
    with pytest.raises(ImageError):
        decode(saved(values, "TIFF"))


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        (FLOATS * 2, "0 to 2"),
        (FLOATS * 255, "0 to 255"),
        (FLOATS - 0.5, "-0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "not all finite"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "not all finite"),
        (np.round(RAMP * 70_000).astype(np.int32), "0 to 70000"),
        (np.round(RAMP * 255).astype(np.int32) - 1, "-1 to 254"),
    ],
)
def test_values_without_a_known_white_are_refused(values: npt.NDArray[np.generic], seen: str) -> None:
    with pytest.raises(ImageError, match=rf"{seen}.* save it with 8 or 16 bits") as caught:
        decode(saved(values, "TIFF"))
    assert caught.value.reason == "no_value_range"


def test_unsigned_32_bits_beyond_the_signed_are_refused() -> None:
    with pytest.raises(ImageError) as caught:
        decode(tiff((RAMP * 4e9).astype(np.uint32), 32, 1))
    assert caught.value.reason == "no_value_range"


def test_a_dark_picture_of_16_bits_stays_dark() -> None:
    dark = np.full((4, 64), 200, np.uint16)
    for image_format in ("PNG", "PPM", "TIFF"):
        assert decode(to_bytes(Image.fromarray(dark), image_format)).getpixel((0, 0)) == (1, 1, 1)


def test_a_layout_that_is_not_read_is_named() -> None:
    with pytest.raises(ImageError, match=r"a TIFF, which cannot be read \(unknown pixel mode\)") as caught:
        decode(tiff(RAMP, 64, 3))
    assert caught.value.reason == "not_an_image"
