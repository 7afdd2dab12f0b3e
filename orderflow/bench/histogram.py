"""Latencies in logarithmic buckets: each within 1 %, from a microsecond to days, any number of them in some kilobytes."""

from __future__ import annotations

from collections import Counter
from math import ceil, log
from typing import Any, Self

GROWTH = 1.02
_STEPS = 1 / log(GROWTH)
# Shares as they are reported, by name.
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


class Histogram:
    """Of seconds. A value is known by its bucket's middle, at the most 1 % away; the largest one is kept exactly."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.largest = 0.0

    def record(self, seconds: float, times: int = 1) -> None:
        """Add a value; what is shorter than a microsecond counts as one."""
        self._counts[int(log(max(seconds, 1e-6) * 1e6) * _STEPS + 1e-9)] += times
        self.largest = max(self.largest, seconds)

    def merge(self, other: Histogram) -> None:
        """Add all values of another one."""
        self._counts.update(other._counts)
        self.largest = max(self.largest, other.largest)

    @property
    def count(self) -> int:
        """How many values there are."""
        return self._counts.total()

    def percentile(self, share: float) -> float:
        """The smallest value, in seconds, that at least `share` (0 to 1) of the values do not exceed; 0 of none."""
        rank = max(1, ceil(share * self.count - 1e-9))
        for bucket in sorted(self._counts):
            rank -= self._counts[bucket]
            if rank <= 0:
                return min(_middle(bucket), self.largest)
        return 0.0

    def as_json(self) -> dict[str, Any]:
        """Milliseconds: the percentiles, `max`, and `buckets`, which are pairs of a value and how often it came."""
        pairs = [[round(_middle(bucket) * 1000, 6), self._counts[bucket]] for bucket in sorted(self._counts)]
        named = {name: self.percentile(share) * 1000 for name, share in PERCENTILES.items()}
        return {"count": self.count, **named, "max": self.largest * 1000, "buckets": pairs}

    @classmethod
    def of_json(cls, document: dict[str, Any]) -> Self:
        """What `as_json` gave."""
        histogram = cls()
        for milliseconds, times in document["buckets"]:
            histogram.record(milliseconds / 1000, times)
        histogram.largest = document["max"] / 1000
        return histogram


def _middle(bucket: int) -> float:
    return float(GROWTH ** (bucket + 0.5) * 1e-6)
