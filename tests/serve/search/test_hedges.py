"""Slow calls made a second time: which answer counts, what becomes of the other, and how many there may be."""

import asyncio

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from lookalike.serve.search.retries import MOST_HEDGES, Hedges
from lookalike.serve.settings.load import Retries


class Slow:
    """Calls take the given seconds, one after the other, and answer with their number or fail."""

    def __init__(self, *seconds: float, fail: tuple[int, ...] = (), error: Exception | None = None) -> None:
        self.seconds, self.fail, self.error = seconds, fail, error
        self.begun = self.cancelled = 0

    async def __call__(self) -> int:
        number = self.begun
        self.begun += 1
        try:
            await asyncio.sleep(self.seconds[number])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if number in self.fail:
            raise self.error or ValueError(f"call {number}")
        return number


def ask(call: Slow, hedges: Hedges) -> int:
    async def run() -> int:
        answer: int = await hedges.fastest(call, "shard")
        await asyncio.sleep(0)  # the loser hears of its end
        return answer

    return asyncio.run(run())


def hedges(after_ms: float | None = 20, share: float = 0.05) -> Hedges:
    return Hedges(Retries(hedge_ms=after_ms, hedge_share=share))


def test_a_call_that_hangs_is_answered_by_a_second_one_and_cancelled() -> None:
    call = Slow(60, 0)
    assert ask(call, hedges()) == 1
    assert (call.begun, call.cancelled) == (2, 1)


def test_the_first_may_still_win() -> None:
    call = Slow(0.1, 60)
    assert ask(call, hedges()) == 0
    assert (call.begun, call.cancelled) == (2, 1)


@pytest.mark.parametrize("settings", [hedges(60_000), hedges(None)])
def test_only_one_is_asked_while_it_is_fast_enough_or_no_other_may_be(settings: Hedges) -> None:
    call = Slow(0.05)
    assert ask(call, settings) == 0
    assert call.begun == 1


def test_a_failure_is_told_at_once_and_ends_the_other() -> None:
    call = Slow(60, 0, fail=(1,))
    with pytest.raises(ValueError, match="call 1"):
        ask(call, hedges())
    assert call.cancelled == 1


def test_second_calls_are_a_share_of_all() -> None:
    """A reserve, and from then on one for every four calls."""
    settings = hedges(after_ms=1, share=0.25)
    second = 0
    for _ in range(40):
        call = Slow(0.02, 0.02)
        ask(call, settings)
        second += call.begun - 1
    assert MOST_HEDGES + 40 * 0.25 - 4 <= second <= MOST_HEDGES + 40 * 0.25


def test_whoever_leaves_ends_both() -> None:
    call = Slow(60, 60)

    async def run() -> None:
        task = asyncio.ensure_future(hedges().fastest(call, "shard"))
        while call.begun < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)

    asyncio.run(run())
    assert call.cancelled == 2


@pytest.mark.parametrize("error", [BackPressureError(num_queued_requests=1, max_queued_requests=1), RayActorError()])
def test_a_second_call_that_no_replica_took_does_not_end_the_first(error: Exception) -> None:
    call = Slow(0.1, 0, fail=(1,), error=error)
    assert ask(call, hedges()) == 0
    assert call.begun == 2
    both = Slow(0.1, 0, fail=(0, 1), error=error)
    with pytest.raises(type(error)):
        ask(both, hedges())


def test_a_share_of_nothing_is_none() -> None:
    call = Slow(0.05, 0)
    assert ask(call, hedges(after_ms=1, share=0)) == 0
    assert call.begun == 1
