"""Keeping freed memory: what a CPU program of many large temporaries spends on page faults otherwise."""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""
LIMIT = 2**31 - 1
"""mallopt takes an int: blocks up to 2 GiB."""
PAD = 2**28
"""By how much more than needed the heap grows: address space, not memory. Without it the gain is not seen."""


def keep_freed_memory() -> bool:
    """Asks the C library to serve large blocks from the heap and to keep them when they are freed.

    XLA allocates a program's temporaries at every call. Blocks above 32 MiB are mapped fresh each time by default, and
    their first use costs a page fault every 4 KiB.
    The price is that a process holds on to the most it ever needed.

    Returns:
      Whether it worked; only glibc can.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {MMAP_THRESHOLD: LIMIT, TRIM_THRESHOLD: LIMIT, TOP_PAD: PAD}
    return all(mallopt(parameter, value) for parameter, value in wanted.items())
