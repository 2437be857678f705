"""What the gateway counts: plain numbers, added to once per request and read when somebody asks. No locks: the event
loop is the only writer. Whoever reads elsewhere copies what can grow before looking at it, in one step.

One series for each way a request can go: (model, provider, adapter). Their number is bounded, because only routes that
exist have one; what names something unknown is counted under `other`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from nimhost.gateway.routes import Target
from nimhost.refs import Ref

MOST_SERIES = 2000
"""With more of them, what comes anew is counted under `other`: a gateway whose routes change for ever."""
FAST_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
SLOW_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PER_S = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0)


class Labels(NamedTuple):
    model: str
    provider: str
    adapter: str


OTHER = Labels("other", "", "")


class Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bucket alone; the last has what is above all bounds."""
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: (upper bound, how many up to there), the last of them `+Inf`."""
        found, so_far = [], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts[:], strict=True):
            so_far += count
            found.append((bound, float(so_far)))
        return found


class Series:
    """Of one way."""

    __slots__ = ("completion_tokens", "duration_s", "errors", "first_byte_s", "in_flight", "labels", "overhead_s",
                 "prompt_tokens", "requests", "tokens_per_s")  # fmt: skip

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.requests: dict[int, int] = {}
        """By status."""
        self.errors: dict[str, int] = {}
        """By kind."""
        self.in_flight = self.prompt_tokens = self.completion_tokens = 0
        self.first_byte_s, self.duration_s = Histogram(SLOW_S), Histogram(SLOW_S)
        self.overhead_s, self.tokens_per_s = Histogram(FAST_S), Histogram(PER_S)


class Metrics:
    def __init__(self) -> None:
        self.other = Series(OTHER)
        self._series: dict[tuple[Ref, Ref, str], Series] = {}

    def series(self, target: Target) -> Series:
        key = (target.ref, target.route.upstream.provider, target.served_name)
        return self._series.get(key) or self._new(key)

    def all(self) -> Sequence[Series]:
        """In the order in which they came about, and at the end the others, if there were any. No two have the same
        labels."""
        other = [self.other] if self.other.requests or self.other.in_flight else []
        return [*dict.fromkeys(self._series.values()), *other]

    def _new(self, key: tuple[Ref, Ref, str]) -> Series:
        if len(self._series) >= MOST_SERIES:
            return self.other
        labels = labels_of(*key)
        same = next((series for series in self._series.values() if series.labels == labels), None)
        series = self._series[key] = same or Series(labels)
        return series


def labels_of(ref: Ref, provider: Ref, served_name: str) -> Labels:
    """On a provider's own route it may be a model that nobody knows: `model` is empty then."""
    model = str(ref) if served_name else ""
    return Labels(model, str(provider), ref.name if "--" in ref.name else "")
