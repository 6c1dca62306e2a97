"""How long to wait before a failed call is made again; for the service and, without dependencies, for clients."""

import math
import random


def backoff_s(failed: int, first_s: float, longest_s: float = math.inf) -> float:
    """Seconds to wait after ``failed`` (1, 2, ...) attempts: doubled each time, less up to half of it by chance."""
    return min(first_s * 2.0 ** (failed - 1), longest_s) * random.uniform(0.5, 1.0)
