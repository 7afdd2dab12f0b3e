"""Group commit: many awaiting callers, one statement.

Alone, a caller waits for nobody: its item is flushed at once. While flushes run, what arrives queues up and goes together
in the next. The idea is PostgreSQL's own group commit (`commit_delay`), one layer up, where it saves statements as well.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from orderflow.engine.patience import Patience, is_transient

T = TypeVar("T")
R = TypeVar("R")
Flush = Callable[[Sequence[T]], Awaitable[Sequence[R]]]


class Overloaded(Exception):
    """The queue is full; the item was not accepted and nothing was written."""


class WrongCount(RuntimeError):
    """`flush` returned fewer or more results than it was given items: no result can be told from another."""


class _Caller(Generic[R]):
    """Who handed in an item and does not wait: called in place of a future, without a turn of the loop in between."""

    __slots__ = ("_failed", "_then")

    def __init__(self, then: Callable[[R], None], failed: Callable[[BaseException], None]) -> None:
        self._then = then
        self._failed = failed

    def done(self) -> bool:
        return False

    def set_result(self, result: R) -> None:
        self._then(result)

    def set_exception(self, error: BaseException) -> None:
        self._failed(error)

    def cancel(self) -> None:
        """Nobody waits."""


_Item = tuple[T, asyncio.Future[R] | _Caller[R]]


class Batcher(Generic[T, R]):
    """Collects items and flushes them in groups of at most `size`, at most `in_flight` groups at a time.

    `flush` takes the items and returns one result for each, in order. It has to be safe to repeat: after a lost connection,
    whose commit may or may not have happened, the same items are flushed again until `patience` ends.
    If a group fails for another reason it is halved until the one item that fails is alone: only its caller sees the error.
    `linger`: seconds that the first item of a group waits for company, for what is in no hurry and comes one by one.
    """

    def __init__(
        self, flush: Flush[T, R], *, size: int = 500, in_flight: int = 4, queue: int = 100_000,
        patience: Patience | None = None, linger: float = 0.0,
    ) -> None:  # fmt: skip
        self._flush = flush
        self._size = size
        self._in_flight = in_flight
        self._limit = queue
        self._patience = patience or Patience()
        self._linger = linger
        self._queue: deque[_Item[T, R]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._scheduled = False

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """True when nothing is queued and nothing is being flushed."""
        return not self._queue and not self._running

    async def submit(self, item: T) -> R:
        """Hand in one item and wait until its group is settled.

        Raises Overloaded when the queue is full, and whatever `flush` raises for this item.
        """
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._append(item, future)
        return await future

    def hand_in(self, item: T, then: Callable[[R], None], failed: Callable[[BaseException], None]) -> None:
        """Hand in one item and go on; `then` is called with its result, or `failed` with its error. Neither may raise.

        Raises Overloaded when the queue is full.
        """
        self._append(item, _Caller(then, failed))

    def _append(self, item: T, caller: asyncio.Future[R] | _Caller[R]) -> None:
        if len(self._queue) >= self._limit:
            raise Overloaded(f"{self._limit} items are waiting already")
        self._queue.append((item, caller))
        if len(self._running) < self._in_flight:
            self._schedule()

    def _schedule(self) -> None:
        # One turn of the loop later: requests that were read in the same turn share the first statement.
        if not self._scheduled:
            self._scheduled = True
            loop = asyncio.get_running_loop()
            loop.call_later(self._linger, self._start) if self._linger else loop.call_soon(self._start)

    def _start(self) -> None:
        self._scheduled = False
        while self._queue and len(self._running) < self._in_flight:
            group: list[_Item[T, R]] = []
            while self._queue and len(group) < self._size:
                item, future = self._queue.popleft()
                # A caller that gave up while it queued has written nothing, and its item never will be.
                if not future.done():
                    group.append((item, future))
            if group:
                task = asyncio.create_task(self._settle(group))
                self._running.add(task)
                task.add_done_callback(partial(self._finished, group))

    def _finished(self, group: list[_Item[T, R]], task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        # A flush that was cancelled, perhaps before its first step or between two halves, has left callers waiting.
        for _, future in group:
            future.cancel()
        if self._linger and 0 < len(self._queue) < self._size:
            # Behind a flush as well: started at once, the next group would be the few that came meanwhile, and so on for ever.
            self._schedule()
        elif self._queue:
            self._start()

    async def _settle(self, group: list[_Item[T, R]]) -> None:
        try:
            results = await self._patience.run(lambda: self._flush([item for item, _ in group]))
            if len(results) != len(group):
                raise WrongCount(f"{len(group)} items were flushed, and {len(results)} results came back")
        except Exception as error:
            # Halving on a wrong count would flush again what was written, and find nothing wrong with it.
            if len(group) == 1 or is_transient(error) or isinstance(error, WrongCount):
                for _, future in group:
                    if not future.done():
                        future.set_exception(error)
                return
            middle = len(group) // 2
            await self._settle(group[:middle])
            await self._settle(group[middle:])
            return
        for (_, future), result in zip(group, results, strict=True):
            if not future.done():
                future.set_result(result)

    async def close(self) -> None:
        """End the flushes under way; their callers and those that queue are cancelled."""
        # The queue first: each flush that ends would start the next one from it.
        while self._queue:
            self._queue.popleft()[1].cancel()
        running = tuple(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
