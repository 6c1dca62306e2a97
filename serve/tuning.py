"""Settings of how the service meets faults and load. Plain values: nothing here needs Ray."""

import random

from pydantic import Field

from lookalike.config import Config


class Retries(Config):
    """How a call between the service's processes is repeated when the process that had it is gone."""

    max_attempts: int = Field(default=4, ge=1, le=100)
    """Calls made at most, the first included; 1 never repeats. The request's deadline ends them sooner."""
    pause_ms: float = Field(default=20.0, ge=0.0, le=60_000.0)
    """Pause before the first repetition, in milliseconds; it doubles each time, and half of it is left to chance."""
    max_pause_ms: float = Field(default=500.0, ge=0.0, le=60_000.0)
    """Longest pause, in milliseconds."""

    def pause_s(self, attempt: int) -> float:
        """Seconds to wait after ``attempt`` (1, 2, ...) has failed."""
        longest = min(self.pause_ms * 2.0 ** (attempt - 1), self.max_pause_ms) / 1000
        return longest * random.uniform(0.5, 1.0)
