"""Decoders shared by callers: turns, bounds, ends; and what a slow picture does to the rest of the service."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from PIL import Image

from lookalike.serve.local import LocalClient
from lookalike.serve.search import decoding
from lookalike.serve.search.decoding import MAX_WAITING, WINDOW, Decoders
from lookalike.serve.search.router import Router
from lookalike.serve.settings.config import RequestLimits, ServeConfig
from lookalike.serve.settings.load import Retries
from lookalike.serve.wire.errors import RetrievalError
from lookalike.vision.decoder import DecoderLostError, Order, Reply
from lookalike.vision.encoder import to_bytes
from lookalike.vision.images import ImageError
from tests.vision.test_decoder import SMALL, scans_of

if TYPE_CHECKING:
    from tests.serve.conftest import World

ORDER = Order()


class FakeDecoder:
    """A decoder that waits until its picture is let go, or until it is stopped."""

    begun: list[bytes] = []
    gates: dict[bytes, threading.Event] = {}
    stops = 0

    def __init__(self) -> None:
        self._stop = threading.Event()

    def start(self) -> None: ...

    def run(self, data: bytes, order: Order) -> Reply:
        self._stop.clear()
        self.begun.append(data)
        gate = self.gates.get(data)
        while gate is not None and not gate.wait(0.005):
            if self._stop.is_set():
                raise DecoderLostError("stopped")
        if data == b"bad":
            raise ImageError("damaged", "the image is damaged")
        if data == b"lost":
            raise DecoderLostError("the decoder ended with code 1; the log says why")
        return Reply(len(data), 1, None)

    def stop(self) -> None:
        FakeDecoder.stops += 1
        self._stop.set()

    def close(self) -> None:
        self._stop.set()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeDecoder]]:
    monkeypatch.setattr(decoding, "Decoder", FakeDecoder)
    FakeDecoder.begun, FakeDecoder.gates, FakeDecoder.stops = [], {}, 0
    yield FakeDecoder
    for gate in FakeDecoder.gates.values():
        gate.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_tenants_take_turns(fakes: type[FakeDecoder]) -> None:
    async def run() -> None:
        decoders, gate = Decoders(1), threading.Event()
        fakes.gates[b"first"] = gate
        tasks = [asyncio.create_task(decoders.decode(b"first", ORDER, "a"))]
        await until(lambda: fakes.begun == [b"first"])
        for data, lane in [(b"a1", "a"), (b"a2", "a"), (b"a3", "a"), (b"b1", "b"), (b"c1", "c"), (b"b2", "b")]:
            tasks.append(asyncio.create_task(decoders.decode(data, ORDER, lane)))
            await asyncio.sleep(0)
        assert decoders.num_waiting == 6
        gate.set()
        await asyncio.gather(*tasks)
        assert fakes.begun == [b"first", b"a1", b"b1", b"c1", b"a2", b"b2", b"a3"]
        assert decoders.num_waiting == 0
        decoders.close()

    asyncio.run(run())


def test_a_lane_of_slow_pictures_leaves_a_decoder_to_others(
    fakes: type[FakeDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        decoders, gate = Decoders(2), threading.Event()
        monkeypatch.setattr(decoding, "SLOW_S", 0.02)
        fakes.gates[b"first"] = threading.Event()
        first = asyncio.create_task(decoders.decode(b"first", ORDER, "slow"))
        await asyncio.sleep(0.3)
        fakes.gates[b"first"].set()
        await first
        fakes.gates[b"more"] = gate
        more = [asyncio.create_task(decoders.decode(b"more", ORDER, "slow")) for _ in range(3)]
        await until(lambda: fakes.begun.count(b"more") == 1)
        assert (await decoders.decode(b"other", ORDER, "other")).width == 5
        assert fakes.begun.count(b"more") == 1
        gate.set()
        await asyncio.gather(*more)
        decoders.close()

    asyncio.run(run())


def test_what_is_given_up_leaves_its_lane_or_stops_its_decoder(fakes: type[FakeDecoder]) -> None:
    async def run() -> None:
        decoders = Decoders(1)
        fakes.gates[b"slow"] = threading.Event()
        slow = asyncio.create_task(decoders.decode(b"slow", ORDER, "a"))
        await until(lambda: fakes.begun == [b"slow"])
        waiting = asyncio.create_task(decoders.decode(b"waiting", ORDER, "a"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (decoders.num_waiting, fakes.stops) == (0, 0)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert fakes.stops == 1
        assert (await decoders.decode(b"next", ORDER, "a")).width == 4
        decoders.close()

    asyncio.run(run())


def test_a_request_has_few_pictures_under_way_and_the_first_refusal_ends_it(fakes: type[FakeDecoder]) -> None:
    async def run() -> None:
        decoders = Decoders(2)
        images = [bytes(number + 1) for number in range(40)]
        fakes.gates[images[0]] = threading.Event()
        seen = list[int]()

        async def take() -> None:
            async for reply in decoders.decode_all(images, ORDER, ""):
                seen.append(reply.width)

        task = asyncio.create_task(take())
        await until(lambda: len(fakes.begun) == WINDOW)
        assert decoders.num_waiting == 0
        fakes.gates[images[0]].set()
        await task
        assert seen == list(range(1, 41))
        fakes.begun.clear()
        with pytest.raises(ImageError):
            [reply async for reply in decoders.decode_all([b"x", b"bad", *images], ORDER, "")]
        await asyncio.sleep(0.05)
        assert len(fakes.begun) <= WINDOW + 1
        with pytest.raises(RetrievalError, match=r"UNAVAILABLE: .*ended with code 1.*try again"):
            await decoders.decode(b"lost", ORDER, "")
        decoders.close()

    asyncio.run(run())


def test_a_full_queue_says_when_to_come_back_and_keeps_room_for_others(fakes: type[FakeDecoder]) -> None:
    async def run() -> None:
        decoders = Decoders(1)
        fakes.gates[b"slow"] = threading.Event()
        tasks = [asyncio.create_task(decoders.decode(b"slow", ORDER, "a")) for _ in range(MAX_WAITING // 2 + 1)]
        await asyncio.sleep(0)
        with pytest.raises(RetrievalError, match=r"RESOURCE_EXHAUSTED: .*128 of this caller; retry after \d+ ms"):
            decoders.admit("a")
        decoders.admit("b")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        decoders.admit("a")
        decoders.close()

    asyncio.run(run())


class FakeEncoder:
    """An encoder that is silent for the first ``silent`` calls."""

    def __init__(self, silent: int, answer: Any) -> None:
        self.silent, self.answer, self.calls, self.under_way, self.most = silent, answer, 0, 0, 0

    async def encode(self, generation: str, images: list[bytes], tenant: str) -> Any:
        self.calls, self.under_way = self.calls + 1, self.under_way + 1
        self.most = max(self.most, self.under_way)
        try:
            if self.calls <= self.silent:
                await asyncio.sleep(60)
            return self.answer
        finally:
            self.under_way -= 1


async def encode(encoder: FakeEncoder, decode_s: float, within_s: float) -> Any:
    router = Router([], encoder=encoder, retries=Retries(hedge_ms=50), decode_s=decode_s)
    return await router.encode("g", [b"x"], deadline=asyncio.get_running_loop().time() + within_s, tenant="t")


def test_an_encoder_is_asked_again_only_after_the_time_that_pictures_may_take() -> None:
    vector = [np.ones(2, "<f4").tobytes()]
    lost = FakeEncoder(1, vector)
    assert asyncio.run(encode(lost, decode_s=0.05, within_s=10))[0].tolist() == [1, 1]
    assert (lost.calls, lost.most) == (2, 1)  # never two at a time
    busy = FakeEncoder(1, vector)
    with pytest.raises(RetrievalError, match="DEADLINE_EXCEEDED"):
        asyncio.run(encode(busy, decode_s=5, within_s=0.4))
    assert (busy.calls, busy.under_way) == (1, 0)
    slow = FakeEncoder(0, ["decoding the image takes more than 5 s of processor time"])
    with pytest.raises(RetrievalError, match="INVALID_ARGUMENT: decoding"):
        asyncio.run(encode(slow, decode_s=0.05, within_s=10))
    assert slow.calls == 1


@pytest.fixture(scope="module")
def client(world: "World") -> Iterator[LocalClient]:
    limits = RequestLimits(max_pixels=10**12, max_scans=5000, max_decode_s=1.0)  # so that nothing is refused early
    with LocalClient(ServeConfig(index=world.index, plan=world.plan, limits=limits, timeout_s=30)) as client:
        yield client


def test_vector_searches_do_not_wait_for_pictures(client: LocalClient, world: "World") -> None:
    costly, vector = scans_of(4000, 3000), np.ones(world.searcher.meta.dim, np.float32)
    client.search(vector=vector)
    quiet = fastest(lambda: client.search(vector=vector))
    failures = list[str]()

    def attack() -> None:
        try:
            client.embed([costly] * 2)
        except RetrievalError as error:
            failures.append(str(error))

    attackers = [threading.Thread(target=attack) for _ in range(2)]
    for attacker in attackers:
        attacker.start()
    times = list[float]()
    while any(attacker.is_alive() for attacker in attackers):
        times.append(fastest(lambda: client.search(vector=vector), 1))
        time.sleep(0.02)
    assert len(failures) == 2
    ends = ("INVALID_ARGUMENT: image 0: decoding", "DEADLINE_EXCEEDED")  # the latter if the machine is busy
    assert all(failure.startswith(ends) for failure in failures), failures
    assert len(times) > 5
    assert sorted(times)[len(times) // 2] < 20 * quiet + 0.1
    assert client.embed([SMALL]).vectors.shape[0] == 1


def fastest(call: Callable[[], object], num: int = 5) -> float:
    times = []
    for _ in range(num):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def test_large_pictures_take_no_memory_of_the_service(client: LocalClient) -> None:
    frame = bytearray(to_bytes(Image.new("P", (5000, 5000)), "GIF"))
    frame[6:10] = b"\1\0\1\0"  # a screen of one pixel
    process, ended, seen = psutil.Process(), threading.Event(), list[int]()
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.01):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with suppress(RetrievalError):  # of their time, on a busy machine
        client.embed([bytes(frame)] * 4)
    ended.set()
    watcher.join()
    assert max(seen) - before < 60 << 20  # one alone is 75 MB
