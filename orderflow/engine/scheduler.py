"""Order within a key, concurrency across keys: one item of a key at work, the others of that key wait behind it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from orderflow.engine.patience import within
from orderflow.engine.seams import seam

T = TypeVar("T")


class KeyScheduler(Generic[T]):
    """Calls `start(key, item)` for every item submitted: of one key, the next when `finished` was called for the one before.

    A key whose item never finishes, as after an error, starts no other: what is behind it must not overtake it.
    """

    def __init__(self, start: Callable[[Hashable, T], None]) -> None:
        self._start = start
        # None: nothing waits behind the item at work, which is how nearly all keys come and go.
        self._waiting: dict[Hashable, deque[T] | None] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Keys that are at work."""
        return len(self._waiting)

    def submit(self, key: Hashable, item: T) -> None:
        """Start the item, or queue it behind its key."""
        if key not in self._waiting:
            self._waiting[key] = None
            self._idle.clear()
            self._start(key, item)
        elif (queue := self._waiting[key]) is not None:
            queue.append(item)
        else:
            self._waiting[key] = deque((item,))

    def finished(self, key: Hashable) -> None:
        """Go on to the key's next item. Not to be called from inside `start`."""
        queue = self._waiting.get(key)
        if queue:
            self._start(key, queue.popleft())
            return
        self._waiting.pop(key, None)
        if not self._waiting:
            self._idle.set()

    def forget_waiting(self, unwanted: Callable[[T], bool]) -> None:
        """Drop what has not begun and is no longer ours, as after a rebalance."""
        for key, queue in self._waiting.items():
            if queue:
                self._waiting[key] = deque(item for item in queue if not unwanted(item))

    def forget_all(self) -> None:
        """Nothing waits, and nothing that is at work will tell of its end any more."""
        self._waiting.clear()
        self._idle.set()

    @seam
    async def drain(self, timeout: float) -> bool:
        """Wait until nothing is at work; False when `timeout` seconds were not enough."""
        try:
            await within(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True
