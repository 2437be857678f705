"""How the process handles memory while it carries traffic. Measured with `scripts/bench gateway`.

Python looks for cycles after every 700 new objects, and now and then goes through all that was ever imported while at
it: requests wait for that. And the C library gives the memory of every large body back to the system only to ask for it
again with the next one: half of the system's time for a 100 KB request.
"""

from __future__ import annotations

import ctypes
import gc

NEW_OBJECTS = 5_000
"""Between two looks for cycles."""
LOOKS = 5
"""So many of them, and it looks at all since the last such look: a look at 25,000 objects takes 3 ms, at 100,000 more
than a request should wait.
"""
KEPT_BYTES = 32 << 20
"""Free memory that is kept for the next body."""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def trim() -> None:
    """Gives free memory back to the system, from between what is in use too. Takes milliseconds for a hundred MB."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def settle() -> None:
    """Call it once everything has been imported and opened: that stays, and later looks for cycles leave it out."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, LOOKS, 20)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other C libraries do without
    if mallopt:
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_TOP_PAD, 1 << 20)
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
