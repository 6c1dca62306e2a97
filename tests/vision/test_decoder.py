"""The decoder process: the same pixels as in this process, and an end for what costs too much."""

import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lookalike.vision.decoder import Decoder, DecoderLostError, Order
from lookalike.vision.encoder import read_pixels, to_bytes
from lookalike.vision.images import ImageError, decode
from lookalike.vision.transforms import Fit, TransformConfig

SMALL = to_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)))


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    ramp = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", [ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp]).convert(mode)


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def scans_of(side: int, num: int) -> bytes:
    """A grey progressive JPEG whose last scan, which adds nothing, is there ``num`` times."""

    def marker(code: int, body: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body

    blocks = ((side + 7) // 8) ** 2
    runs = "".join("0" + "0" * 14 for _ in range(-(-blocks // (1 << 14))))
    runs += "1" * (-len(runs) % 8)
    nothing = int(runs, 2).to_bytes(len(runs) // 8, "big").replace(b"\xff", b"\xff\0")
    head = marker(0xDB, b"\0" + b"\x10" * 64) + marker(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\0")
    head += marker(0xC4, b"\0\x01" + bytes(16)) + marker(0xC4, b"\x10\x01" + bytes(15) + b"\xe0")
    first = marker(0xDA, b"\x01\x01\0\0\0\0") + bytes((blocks + 7) // 8)
    coarse = marker(0xDA, b"\x01\x01\0\x01\x3f\x01") + nothing
    return b"\xff\xd8" + head + first + coarse + (marker(0xDA, b"\x01\x01\0\x01\x3f\x10") + nothing) * num + b"\xff\xd9"


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder()
    yield decoder
    decoder.close()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_the_pixels_are_those_of_the_evaluation_transform(decoder: Decoder, fit: Fit, interpolation: Any) -> None:
    transform = TransformConfig(size=48, fit=fit, interpolation=interpolation)
    large = smooth(1600, 900)
    pictures = [
        SMALL,
        jpeg(large),
        jpeg(large, progressive=True),
        *(to_bytes(smooth(90, 40, m)) for m in ("L", "RGBA")),
    ]
    pictures += [to_bytes(smooth(70, 50), form) for form in ("WEBP", "GIF", "TIFF", "BMP", "PPM")]
    for picture in pictures:
        reply = decoder.run(picture, Order(square=transform.square))
        assert reply.pixels is not None
        assert np.array_equal(reply.pixels, read_pixels([picture], transform)[0])


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same() -> None:
    transform = TransformConfig(size=64)
    data = jpeg(smooth(1600, 1200))
    assert decode(data, square=transform.square).size == (200, 150)
    assert decode(jpeg(smooth(383, 300)), square=transform.square).size == (383, 300)  # below six times the square
    whole = np.asarray(transform.square.pixels(decode(data)), int)
    assert np.abs(transform.square.pixels(decode(data, square=transform.square)) - whole).max() <= 3


def test_without_a_square_the_size_comes_back(decoder: Decoder) -> None:
    assert decoder.run(SMALL, Order())[:2] == (50, 30)


@pytest.mark.parametrize("data", [b"", b"no picture", SMALL[:300], b"\xff\xd8\xff"])
def test_refusals_are_those_of_decode(decoder: Decoder, data: bytes) -> None:
    with pytest.raises(ImageError) as here:
        decode(data)
    with pytest.raises(ImageError) as there:
        decoder.run(data, Order())
    assert (there.value.reason, str(there.value)) == (here.value.reason, str(here.value))


def test_scans_are_counted_before_decoding() -> None:
    assert decode(scans_of(64, 60)).size == (64, 64)
    for side, num in ((64, 70), (64, 20_000), (7000, 20)):
        with pytest.raises(ImageError, match=r"scans, the limit at its size is \d+; save it anew") as caught:
            decode(scans_of(side, num))
        assert caught.value.reason == "too_many_scans"
    assert decode(scans_of(64, 60) + scans_of(64, 60)).size == (64, 64)  # what follows the picture is none of it
    with pytest.raises(ImageError):
        decode(scans_of(64, 5), max_scans=4)


def test_a_picture_beyond_its_processor_time_ends_its_decoder_and_the_next_is_decoded(decoder: Decoder) -> None:
    costly = scans_of(7000, 1000)
    start = time.thread_time()
    with pytest.raises(ImageError, match=r"more than 0.5 s of processor time; save it anew") as caught:
        decoder.run(costly, Order(max_pixels=10**12, max_scans=2000, max_decode_s=0.5))
    assert caught.value.reason == "too_slow"
    assert time.thread_time() - start < 1  # this process had nothing to do
    assert decoder.run(SMALL, Order())[:2] == (50, 30)


def test_a_picture_of_more_memory_than_its_header_says_is_refused(decoder: Decoder) -> None:
    head = struct.pack("<H", 9) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in [
            (256, 8),
            (257, 8),
            (258, 8),
            (259, 8),
            (262, 1),
            (322, 9600),
            (323, 9600),
            (324, 200),
            (325, 9),
        ]
    )
    data = b"II*\0" + struct.pack("<I", 8) + head + bytes(200)
    with pytest.raises(ImageError):
        decoder.run(data, Order())
    assert decoder.run(SMALL, Order())[:2] == (50, 30)


def test_a_decoder_that_dies_costs_its_picture_alone(decoder: Decoder) -> None:
    assert decoder.run(SMALL, Order()).pixels is None
    os.kill(process_of(decoder), signal.SIGKILL)  # as the kernel does when memory runs out
    assert decoder.run(SMALL, Order())[:2] == (50, 30)  # asked again


def test_a_picture_that_crashes_its_decoder_twice_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookalike.vision.decoder.PROGRAM", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ImageError, match=r"ended by SIGSEGV; save the image anew") as caught:
        decoder.run(SMALL, Order())
    assert caught.value.reason == "crash"


def test_a_decoder_that_cannot_start_blames_no_picture(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookalike.vision.decoder.PROGRAM", "raise SystemExit(3)")
    with pytest.raises(DecoderLostError, match="ended with code 3"):
        decoder.run(SMALL, Order())
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(DecoderLostError, match="could be started"):
        decoder.run(SMALL, Order())


def test_stop_ends_a_decoding_at_once(decoder: Decoder) -> None:
    decoder.run(SMALL, Order())
    threading.Timer(0.2, decoder.stop).start()
    start = time.monotonic()
    with pytest.raises(DecoderLostError, match="stopped"):
        decoder.run(scans_of(7000, 4000), Order(max_pixels=10**12, max_scans=9000, max_decode_s=60))
    assert time.monotonic() - start < 20
    assert decoder.run(SMALL, Order())[:2] == (50, 30)


def test_a_decoder_ends_with_its_parent() -> None:
    program = (
        "import os, sys; from lookalike.vision.decoder import Decoder, Order\n"
        "decoder = Decoder(); decoder.run(sys.stdin.buffer.read(), Order())\n"
        "print(os.listdir('/proc/self/task')[0], *open('/proc/self/task/%d/children' % os.getpid()).read().split())\n"
        "sys.stdout.flush(); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], input=SMALL, capture_output=True, env=environment, check=False
    )
    child = int(done.stdout.split()[-1])
    until = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split():
        assert time.monotonic() < until, "the decoder outlives its parent"
        time.sleep(0.05)


def test_a_compressed_text_costs_nothing() -> None:
    bomb = zlib.compress(bytes(50 << 20), 9)
    body = b"Comment\0\0" + bomb
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    place = SMALL.index(b"IDAT") - 4
    start = time.thread_time()
    assert decode(SMALL[:place] + chunk * 40 + SMALL[place:]).size == (50, 30)
    assert time.thread_time() - start < 1


def process_of(decoder: Decoder) -> int:
    """The id of its process."""
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    alive = [int(child) for child in children if "decoder" in Path(f"/proc/{child}/cmdline").read_text()]
    assert alive, decoder
    return alive[-1]
