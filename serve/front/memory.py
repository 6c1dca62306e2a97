"""Returns memory that the C library keeps after a burst of large messages; a thread looks every few seconds."""

import ctypes
import functools
import threading

CHECK_S = 5.0
"""Pause between two looks, in seconds."""
GROWTH_BYTES = 64 << 20
"""Growth of the process's memory since the last trim, or since the start, from which the next one is worth its time
(some milliseconds)."""
PAGE_BYTES = 4096


def resident_bytes() -> int:
    """Resident memory of this process; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except OSError:
        return 0


@functools.cache
def start_trimming() -> threading.Thread:
    """Start the thread of this process, once; elsewhere than with glibc it ends at once."""
    thread = threading.Thread(target=_trim_from_time_to_time, name="lookalike-memory", daemon=True)
    thread.start()
    return thread


def _trim_from_time_to_time() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    never, kept = threading.Event(), resident_bytes()
    while trim is not None and not never.wait(CHECK_S):
        if resident_bytes() > kept + GROWTH_BYTES:
            trim(0)
            kept = resident_bytes()
        kept = min(kept, resident_bytes())
