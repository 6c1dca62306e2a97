"""Watches a service that this process has started: does it answer, is it being put right, or is it lost?

The whole way is tried, a health call through the service's own port. While it fails, Serve is asked what it is doing.
Serve and Ray replace lost replicas, proxies and controllers by themselves; nobody replaces a lost raylet or GCS.
"""

import threading
import time
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lookalike.cluster import Part
from lookalike.errors import LookalikeError
from lookalike.telemetry import fields, get_logger

log = get_logger(__name__)
EVERY_S, TIMEOUT_S = 2.0, 5.0
"""Seconds between health calls, and until one counts as failed."""
TELL_S = 6.0
"""Seconds of silence after which it is reported, and after which it is reported again."""
GIVE_UP_S = 25.0
"""Seconds without an answer of the service, or of Serve, after which the service is lost."""
ALL_WELL_S = 60.0
"""The same while Serve answers that all is well: twice the time in which it replaces what is frozen."""


RECONNECT = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]


class ServiceLostError(LookalikeError):
    """The service cannot recover, and cannot be asked to end."""


class Question:
    """A function that may hang, called again and again in a thread while somebody wants its answer."""

    def __init__(self, ask: Callable[[], Sequence[str]]) -> None:
        self._ask, self._thread = ask, threading.Thread()
        self.answer: Sequence[str] = ()
        self.answered = time.monotonic()
        self._asked = 0.0

    def repeat(self) -> None:
        """Ask again, unless the last call is under way or recent."""
        if not self._thread.is_alive() and time.monotonic() - self._asked > EVERY_S:
            self._asked = time.monotonic()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._ask()
        except Exception as error:  # noqa: BLE001  # Ray and Serve raise many; that there is no answer is what counts
            log.debug("no state %s", fields(error=repr(error)[:300]))
            return
        self.answered = time.monotonic()


class Supervisor:
    """``check`` it a few times a second."""

    def __init__(
        self, address: str, *, find_parts: Callable[[], Sequence[Part]], read_work: Callable[[], Sequence[str]]
    ) -> None:
        self.address, self._find_parts, self._work = address, find_parts, Question(read_work)
        self._stopped: dict[str, float] = {}
        """Name of a part that stands still -> since when."""
        self._stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(address, RECONNECT))
        self._call: grpc.Future | None = None
        self._asked, self._answered, self._told = 0.0, time.monotonic(), 0.0
        self._reason = ""
        self._is_answering = True

    def check(self) -> None:
        """Raise ``ServiceLostError`` if the service cannot recover; report when it falls silent and answers again."""
        self._look_at_parts()
        self._try_the_way()
        silent_s = time.monotonic() - self._answered
        if silent_s < TELL_S:
            self._work.answered = time.monotonic()  # it was not asked
            return
        self._work.repeat()
        if time.monotonic() - self._told >= TELL_S:
            self._told = time.monotonic()
            log.warning("not serving %s", fields(for_s=round(silent_s), reason=self._reason, serve=self._describe()))
        self._give_up_after(silent_s)

    def _look_at_parts(self) -> None:
        now = time.monotonic()
        parts = self._find_parts()
        self._stopped = {part.name: self._stopped.get(part.name, now) for part in parts if part.is_stopped}
        for part in parts:
            if part.has_ended:
                raise ServiceLostError(
                    f"{part.name} has ended, so the service at {self.address} cannot go on; see Ray's logs and the "
                    "kernel's for the reason (memory?), and start the service again"
                )
            if now - self._stopped.get(part.name, now) > GIVE_UP_S:
                raise ServiceLostError(
                    f"{part.name} has stood still for {GIVE_UP_S:g} s (SIGSTOP?), so the service at {self.address} "
                    "cannot go on; start it again"
                )

    def _try_the_way(self) -> None:
        now = time.monotonic()
        if self._call is None:
            if now - self._asked >= EVERY_S:
                self._asked = now
                self._call = self._stub.Check.future(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
            return
        if not self._call.done():
            return
        call, self._call = self._call, None
        error = call.exception()
        if error is None and call.result().status == health_pb2.HealthCheckResponse.SERVING:
            if self._told:
                log.warning("serving again %s", fields(after_s=round(now - self._answered)))
            self._answered, self._told = now, 0.0
            return
        self._is_answering = error is None
        self._reason = "searches are not answered (NOT_SERVING)" if error is None else _explain(error)

    def _describe(self) -> str:
        if time.monotonic() - self._work.answered > TELL_S:
            return "does not answer"
        return "is at work: " + "; ".join(self._work.answer) if self._work.answer else "says that all is well"

    def _give_up_after(self, silent_s: float) -> None:
        state_s = time.monotonic() - self._work.answered
        is_lost = silent_s > GIVE_UP_S and state_s > GIVE_UP_S - TELL_S - EVERY_S
        is_stuck = silent_s > ALL_WELL_S and not self._is_answering and not self._work.answer
        if is_lost or is_stuck:
            raise ServiceLostError(
                f"no search is answered at {self.address} for {silent_s:.0f} s ({self._reason}), and Serve "
                f"{self._describe()}: the service cannot recover; see Ray's logs, and start it again"
            )


def _explain(error: BaseException) -> str:
    if not isinstance(error, grpc.RpcError):
        return repr(error)[:200]
    return f"health: {error.code().name} {error.details()}"[:200]
