"""Returns memory that the C library keeps after a burst of large messages; a thread looks every few seconds.

What a process has imported and built by then is left out of garbage collections: a full one over all of it takes .14 s,
.5 s with an encoder, in which nothing is answered.
"""

import ctypes
import functools
import gc
import threading

CHECK_S = 5.0
"""Pause between two looks, in seconds."""
LONGEST_S = 20.0
"""Longest pause, while looks find nothing to return."""
GROWTH = 1.05
"""Memory of the process per byte of its least so far, from which a trim is worth its time (some milliseconds)."""
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
    """Freeze this process' objects and start its thread, once; elsewhere than with glibc the thread ends at once."""
    gc.freeze()
    thread = threading.Thread(target=_trim_from_time_to_time, name="lookalike-memory", daemon=True)
    thread.start()
    return thread


def _trim_from_time_to_time() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    never, least, pause_s = threading.Event(), resident_bytes(), CHECK_S
    while trim is not None and not never.wait(pause_s):
        before = resident_bytes()
        if before > least * GROWTH:
            gc.collect()  # failed requests may be held by their tracebacks
            trim(0)
            gained = before - resident_bytes() > before * (GROWTH - 1)
            pause_s = CHECK_S if gained else min(2 * pause_s, LONGEST_S)  # what is left is in use
        least = min(least, resident_bytes())
