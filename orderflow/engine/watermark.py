"""The contiguous watermark: the offset up to which every delivery of a partition is finished.

Deliveries finish in any order; committing the highest finished one would lose those before it that are still at work.
"""

from __future__ import annotations

from collections import deque


class Watermark:
    """Tracks one partition. Offsets are taken in rising order and finished in any order; gaps (compaction) are fine."""

    def __init__(self) -> None:
        self._taken: deque[int] = deque()
        self._finished: set[int] = set()
        self._next: int | None = None

    def take(self, offset: int) -> bool:
        """Note a delivery as begun; False for one that was taken before (a fetch that went back)."""
        if self._taken and offset <= self._taken[-1]:
            return False
        if self._next is not None and offset < self._next:
            return False
        self._taken.append(offset)
        return True

    def finish(self, offset: int) -> None:
        """Note a delivery as settled."""
        self._finished.add(offset)
        while self._taken and self._taken[0] in self._finished:
            head = self._taken.popleft()
            self._finished.discard(head)
            self._next = head + 1

    @property
    def position(self) -> int | None:
        """The offset to commit: the next one to read after a restart; None before anything is finished."""
        return self._next

    @property
    def in_flight(self) -> int:
        """Deliveries at or after the watermark that are not finished, finished ones behind a gap not counted."""
        return len(self._taken) - len(self._finished)

    @property
    def held(self) -> int:
        """Offsets kept in memory: unfinished ones and those finished behind them."""
        return len(self._taken)
