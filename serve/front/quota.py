"""A tenant's use of one replica, compared with its quota by token buckets of requests, queries and pixels."""

from lookalike.serve.settings.security import Quota


class Bucket:
    """A token bucket that one take may overdraw, so that a request larger than the bucket passes when it is full.

    Rate and size are given with each take, so a quota may change while past use still counts.
    """

    def __init__(self) -> None:
        self._used, self._time = 0.0, 0.0

    def wait_s(self, amount: float, *, rate: float, size: float, now: float) -> float:
        """Return the seconds until ``amount`` can be taken; 0 if it can be taken now."""
        self._used = max(0.0, self._used - (now - self._time) * rate)
        self._time = now
        return max(0.0, self._used + min(amount, size) - size) / rate

    def take(self, amount: float) -> None:
        """Take ``amount``, after ``wait_s`` returned 0 for it."""
        self._used += amount


class Meter:
    """One tenant's use of this replica."""

    def __init__(self) -> None:
        self.requests, self.queries, self.pixels, self.under_way = Bucket(), Bucket(), Bucket(), 0

    def charge(self, quota: Quota, num_queries: int, now: float, num_pixels: int = 0) -> str | None:
        """Count a request of ``num_queries`` with images of ``num_pixels`` together.

        If it exceeds a quota, it does not count; return the rule and when to retry.
        """
        waits = {}
        if quota.requests_per_s is not None:
            wait = self.requests.wait_s(1, rate=quota.requests_per_s, size=quota.burst, now=now)
            waits[f"{quota.requests_per_s:g} requests a second (burst {quota.burst})"] = wait
        if quota.queries_per_s is not None:
            size = max(1.0, quota.queries_per_s)
            wait = self.queries.wait_s(num_queries, rate=quota.queries_per_s, size=size, now=now)
            waits[f"{quota.queries_per_s:g} queries a second"] = wait
        if quota.pixels_per_s is not None and num_pixels:
            rate = quota.pixels_per_s
            wait = self.pixels.wait_s(num_pixels, rate=rate, size=max(1.0, rate), now=now)
            waits[f"{rate:g} pixels of images a second"] = wait
        rule, wait = max(waits.items(), key=lambda item: item[1], default=("", 0.0))
        if wait > 0:
            return f"{rule}; retry after {max(1, round(wait * 1000))} ms"
        if quota.requests_per_s is not None:  # use without a quota must not count once there is one
            self.requests.take(1)
        if quota.queries_per_s is not None:
            self.queries.take(num_queries)
        if quota.pixels_per_s is not None:
            self.pixels.take(num_pixels)
        return None
