"""Order within a key, concurrency across keys: one running delivery a key, the others of that key wait behind it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from orderflow.engine.patience import within

T = TypeVar("T")


class KeyScheduler(Generic[T]):
    """Runs `work(item)` for every item submitted; items of one key one after the other, in the order of submission.

    An exception of `work` goes to `failed` and stops that key's queue: what is behind it must not overtake it.
    """

    def __init__(self, work: Callable[[T], Awaitable[None]], failed: Callable[[BaseException], None]) -> None:
        self._work = work
        self._failed = failed
        self._waiting: dict[Hashable, deque[T]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Keys that are at work."""
        return len(self._tasks)

    def submit(self, key: Hashable, item: T) -> None:
        """Start the item, or queue it behind its key."""
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.append(item)
            return
        self._waiting[key] = deque()
        self._idle.clear()
        task = asyncio.create_task(self._drain(key, item))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _drain(self, key: Hashable, item: T) -> None:
        while True:
            await self._work(item)
            waiting = self._waiting[key]
            if not waiting:
                del self._waiting[key]
                return
            item = waiting.popleft()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def forget_waiting(self, unwanted: Callable[[T], bool]) -> None:
        """Drop what has not begun and is no longer ours, as after a rebalance."""
        for key, waiting in self._waiting.items():
            self._waiting[key] = deque(item for item in waiting if not unwanted(item))

    async def drain(self, timeout: float) -> bool:
        """Wait until nothing runs; False when `timeout` seconds were not enough."""
        try:
            await within(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def cancel(self) -> None:
        """End what runs and wait for its end."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._waiting.clear()
