"""How long a relay rests between two rounds while the machine is busy.

Rounds that follow each other at once are as small as they can be, and so are those of every worker that gets their events.
With many processes on few cores, all of them together spend the cores on statements instead of on rows. How busy the machine is
shows in how long a round takes beside the shortest one: on an idle machine nothing rests, and no latency is added. Of two
relays each finds half of the events: each rests for twice as long, so that together they come to the rounds that one would do.
"""

from __future__ import annotations

import time

FACTOR = 2.0
MOST_SECONDS = 0.05
# Beyond so many relays the rest grows no longer: it is a latency.
MOST_RELAYS = 4.0
# What a round took longer ago than this says nothing of now.
STALE_SECONDS = 0.2
# A round of up to so many times the shortest is no sign of anything.
USUAL = 2.0
# In so many seconds the shortest is forgotten: what has become slower for good must not look busy for ever.
FORGET_SECONDS = 600.0


class Pace:
    """Of one loop."""

    def __init__(self) -> None:
        self._shortest = 0.0
        self._took = 0.0
        self._at = float("-inf")

    def note(self, seconds: float) -> None:
        """A round took so long."""
        now = time.monotonic()
        forgotten = min(1.0, (now - self._at) / FORGET_SECONDS)
        self._shortest = min(seconds, self._shortest + (seconds - self._shortest) * forgotten)
        self._took, self._at = seconds, now

    def rest(self, relays: float = 1.0) -> float:
        """Seconds to rest before the next round: MOST_SECONDS at the most, for each of the relays that share the work out."""
        if time.monotonic() - self._at > STALE_SECONDS:
            return 0.0
        return min(relays, MOST_RELAYS) * min(MOST_SECONDS, FACTOR * max(0.0, self._took - USUAL * self._shortest))
