"""What a tenant uses of a replica, held against its quota: token buckets of requests and of queries."""

import time

from lookalike.serve.settings.security import Quota


class Bucket:
    """A token bucket that may be overdrawn by one take, so that what is larger than the bucket passes when it is full.

    Rate and size come with each take: a quota can change while what was used is remembered.
    """

    def __init__(self) -> None:
        self._used, self._time = 0.0, 0.0

    def wait_s(self, amount: float, *, rate: float, size: float, now: float) -> float:
        """Seconds until ``amount`` can be taken; 0 when it can be now."""
        self._used = max(0.0, self._used - (now - self._time) * rate)
        self._time = now
        return max(0.0, self._used + min(amount, size) - size) / rate

    def take(self, amount: float) -> None:
        """Take what ``wait_s`` has said is there."""
        self._used += amount


class Meter:
    """What one tenant uses of this replica."""

    def __init__(self) -> None:
        self.requests, self.queries, self.under_way = Bucket(), Bucket(), 0

    def charge(self, quota: Quota, num_queries: int, now: float) -> str | None:
        """Count a request of ``num_queries``, or say which quota it exceeds and when to try again."""
        waits = {}
        if quota.requests_per_s is not None:
            wait = self.requests.wait_s(1, rate=quota.requests_per_s, size=quota.burst, now=now)
            waits[f"{quota.requests_per_s:g} requests a second (burst {quota.burst})"] = wait
        if quota.queries_per_s is not None:
            size = max(1.0, quota.queries_per_s)
            wait = self.queries.wait_s(num_queries, rate=quota.queries_per_s, size=size, now=now)
            waits[f"{quota.queries_per_s:g} queries a second"] = wait
        rule, wait = max(waits.items(), key=lambda one: one[1], default=("", 0.0))
        if wait > 0:
            return f"{rule}; retry after {max(1, round(wait * 1000))} ms"
        if quota.requests_per_s is not None:  # else what was used would wait for a quota that may come
            self.requests.take(1)
        if quota.queries_per_s is not None:
            self.queries.take(num_queries)
        return None


def now() -> float:
    """The clock of quotas, in seconds."""
    return time.monotonic()
