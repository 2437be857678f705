"""Who answers, of several that can. Pure: the clock is handed in.

1. Those that are well come before those that failed `OPEN_AFTER` times in a row ("open").
2. An open one is tried again after a pause, by one request at a time; every further failure doubles the pause.
3. Among those, what runs here comes before what is elsewhere.
4. Then the one with the fewest requests under way, then the one named first.
5. When all are open, the one whose pause ends first is tried anyway: nobody is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

OPEN_AFTER = 3
PAUSE_S = 5.0
MAX_PAUSE_S = 60.0


class Standing:
    """What is known about an upstream from the requests that went there. It outlives route tables."""

    __slots__ = ("failures", "on_idle", "probing", "retry_at_s", "under_way", "url")

    def __init__(self, url: str = "") -> None:
        self.url = url
        self.under_way = 0
        self.on_idle: Callable[[Standing], None] | None = None
        """Called when the last request has ended. Set once no more are sent there."""
        self.failures = 0
        """In a row."""
        self.retry_at_s = 0.0
        """Open until then; 0: well."""
        self.probing = False
        """Open, and a request is finding out whether it is well again."""

    def begin(self) -> bool:
        """A request goes there; True: it is the one that finds out. Hand that to `end`."""
        self.under_way += 1
        if self.retry_at_s > 0:
            self.probing = True
        return self.probing

    def end(self, probe: bool) -> None:
        self.under_way -= 1
        if probe:  # its client may have left before there was a result
            self.probing = False
        if self.on_idle and not self.under_way:
            self.on_idle(self)

    def succeed(self) -> None:
        self.failures, self.retry_at_s, self.probing = 0, 0.0, False

    def fail(self, now_s: float) -> None:
        self.failures += 1
        self.probing = False
        if self.failures >= OPEN_AFTER:
            self.retry_at_s = now_s + min(PAUSE_S * 2 ** min(self.failures - OPEN_AFTER, 10), MAX_PAUSE_S)

    def open(self, now_s: float) -> bool:
        return self.retry_at_s > 0 and (self.probing or now_s < self.retry_at_s)


def choose(candidates: Sequence[tuple[int, Standing]], now_s: float) -> int:
    """The index of the one to ask. `candidates`: priority (the lowest first) and standing of each; at least one."""

    def rank(index: int) -> tuple[float, ...]:
        priority, standing = candidates[index]
        if standing.open(now_s):
            return (1, standing.retry_at_s, priority, standing.under_way, index)
        return (0, 0, priority, standing.under_way, index)

    return min(range(len(candidates)), key=rank)


def is_failure(status: int) -> bool:
    """Does a reply of this status say that the upstream is not well?"""
    return status >= 500
