"""Decoding in a process of its own: what a picture does to its decoder, by time, memory or a crash, stays there.

A decoder starts by exec (a fork would copy gRPC's and torch's locks without their threads) and imports Pillow and numpy
alone. It reads one order after the other, and ends with its parent, because its standard input does. The kernel ends it
when a picture takes more processor time than the order allows, so a busy machine does not make pictures bad.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin

from lookalike.errors import LookalikeError
from lookalike.vision.images import MAX_PIXELS, MAX_SCANS, ImageError, ImageLimits, check_header, decode_container
from lookalike.vision.squares import INTERPOLATIONS, Square

MAX_DECODE_S = 5.0
BASE_BYTES, BYTES_PER_PIXEL = 128 << 20, 20
"""Memory that a decoder may take for a picture: a part for every picture, and one by its pixels. WebP takes most: two
frames of 4 bytes a pixel in its own decoder, two in Pillow."""
WALL_FACTOR = 12.0
"""Longest time on the clock of ``Decoder.run``, in times the processor time allowed."""
ORDER = struct.Struct("<QQIdBIdB")
REPLY = struct.Struct("<BIIQ")
FAILED, SIZE, PIXELS = range(3)
NICE = 10
"""Decoders step back where the rest of a service needs the processor."""
PROGRAM = "from lookalike.vision.decoder import serve; serve()"


class Order(NamedTuple):
    """What to do with a picture, and what that may cost."""

    max_pixels: int = MAX_PIXELS
    max_scans: int = MAX_SCANS
    max_decode_s: float = MAX_DECODE_S
    """Processor time in seconds; the kernel counts whole ones."""
    square: Square | None = None
    """What the picture becomes; None: it is decoded whole, and only its size comes back."""

    @property
    def limits(self) -> ImageLimits:
        """What the picture's header must keep to."""
        return ImageLimits(self.max_pixels, self.max_scans)


class Reply(NamedTuple):
    """A decoded picture."""

    width: int
    height: int
    pixels: npt.NDArray[np.uint8] | None
    """uint8 [3, size, size] if a square was asked for."""


class DecoderLostError(LookalikeError):
    """The decoder ended for another reason than the picture's: it was told to, or could not start."""


class Decoder:
    """A decoder process, started at the first order and again after one that ended it. One thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = self._late = False

    def start(self) -> None:
        """Start the process unless it runs; it is ready some tenths of a second later."""
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )

    def run(self, data: bytes, order: Order) -> Reply:
        """Decode ``data``; raises ``ImageError`` as ``decode`` does, and with reason ``too_slow`` or ``crash``.

        ``DecoderLostError``: ``stop`` was called meanwhile, or no process could be started.
        """
        try:
            return self._attempt(data, order)
        except ImageError as error:
            if error.reason != "crash":
                raise
        return self._attempt(data, order)  # what ended the process may have been another picture, or lack of memory

    def _attempt(self, data: bytes, order: Order) -> Reply:
        if self._stopped and self._process is not None:
            self._clear(self._process)  # it was stopped when it had just answered
        self._stopped = self._late = False
        try:
            self.start()
        except OSError as error:
            raise DecoderLostError(f"no decoder could be started ({error})") from None
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        clock = threading.Timer(order.max_decode_s * WALL_FACTOR, self._end, [process])
        clock.daemon = True
        clock.start()
        try:
            _write_order(process.stdin, data, order)
            return _read_reply(process.stdout)
        except (OSError, EOFError):
            raise self._loss(process, order) from None
        finally:
            clock.cancel()

    def stop(self) -> None:
        """End the process, from any thread; an order under way fails with ``DecoderLostError``."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process and wait for it."""
        self.stop()
        if self._process is not None:
            self._clear(self._process)

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        self._late = True
        process.kill()

    def _loss(self, process: "subprocess.Popen[bytes]", order: Order) -> Exception:
        """What the end of the process means."""
        code = self._clear(process)
        if self._stopped:
            return DecoderLostError("the decoder was stopped")
        if code == -signal.SIGXCPU or self._late:
            return ImageError(
                "too_slow",
                f"decoding the image takes more than {order.max_decode_s:g} s of processor time; save it anew, smaller "
                "or in another format",
            )
        if code >= 0:
            return DecoderLostError(f"the decoder ended with code {code}; the log says why")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return ImageError("crash", f"the image's decoder was ended by {name}; save the image anew")

    def _clear(self, process: "subprocess.Popen[bytes]") -> int:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self._process is process:
            self._process = None
        return process.wait()


_OWN, _TURN = Decoder(), threading.Lock()


def decode_apart(data: bytes, order: Order) -> Reply:
    """Decode ``data`` in a decoder that this process keeps; raises as ``Decoder.run`` does."""
    with _TURN:
        return _OWN.run(data, order)


def _write_order(pipe: IO[bytes], data: bytes, order: Order) -> None:
    square = order.square or Square("", 0, 1.0)
    fit = ("", "pad", "crop").index(square.fit)
    head = ORDER.pack(
        len(data),
        order.max_pixels,
        order.max_scans,
        order.max_decode_s,
        fit,
        square.size,
        square.crop_fraction,
        INTERPOLATIONS.index(square.interpolation),
    )
    pipe.write(head)
    pipe.write(data)
    pipe.flush()


def _read_order(pipe: IO[bytes]) -> tuple[bytes, Order]:
    head = _read(pipe, ORDER.size)
    size, max_pixels, max_scans, max_decode_s, fit, side, fraction, number = ORDER.unpack(head)
    square = Square(("", "pad", "crop")[fit], side, fraction, INTERPOLATIONS[number]) if fit else None
    return _read(pipe, size), Order(max_pixels, max_scans, max_decode_s, square)


def _read_reply(pipe: IO[bytes]) -> Reply:
    kind, width, height, size = REPLY.unpack(_read(pipe, REPLY.size))
    body = _read(pipe, size)
    if kind == FAILED:
        raise ImageError(**json.loads(body))
    if kind == SIZE:
        return Reply(width, height, None)
    side = round((size // 3) ** 0.5)
    return Reply(width, height, np.frombuffer(body, np.uint8).reshape(3, side, side))


def _read(pipe: IO[bytes], size: int) -> bytes:
    data: bytes = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve() -> None:
    """The decoder process: answer orders from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent
    os.nice(NICE)
    _prefer_for_oom()
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # as above: each thread reserves address space, and other work needs CPUs
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    orders, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)  # libtiff repeats what is in the file
    while True:
        try:
            data, order = _read_order(orders)
        except EOFError:
            return
        replies.write(answer(data, order))
        replies.flush()
        _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)  # for the next picture's bytes


def answer(data: bytes, order: Order) -> bytes:
    """The bytes of the reply to an order."""
    _limit(resource.RLIMIT_CPU, int(sum(os.times()[:2]) + order.max_decode_s) + 1)
    try:
        container = check_header(data, order.limits)
        pixels_stated = max(container.width * container.height, container.coded_pixels) or order.max_pixels
        _limit(resource.RLIMIT_AS, _address_space() + BASE_BYTES + BYTES_PER_PIXEL * pixels_stated)
        image = decode_container(container, order.limits, order.square)
        if order.square is None:
            return REPLY.pack(SIZE, *image.size, 0)
        pixels = order.square.pixels(image).transpose(2, 0, 1).tobytes()
        return REPLY.pack(PIXELS, *image.size, len(pixels)) + pixels
    except MemoryError:
        error = ImageError("too_large", "decoding the image takes too much memory; scale it down")
    except ImageError as refusal:
        error = refusal
    body = json.dumps({"reason": error.reason, "message": str(error)}).encode()
    return REPLY.pack(FAILED, 0, 0, len(body)) + body


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        value = hard if value == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, hard))


def _address_space() -> int:
    """Bytes of address space in use; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 34


def _prefer_for_oom() -> None:
    """Have the kernel end decoders first when memory runs out."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
