"""The load generator for latency, a process of its own (see apart): an open loop from POST to PAID.

Each order has a fixed time at which it is due. Latencies count from there: an order that finds no free connection waits, and
its waiting counts. PAID is what another connection to the database sees.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any
from uuid import UUID

from orderflow.bench import database
from orderflow.bench.apart import on_end_of_input, serve
from orderflow.bench.arrivals import arrive
from orderflow.bench.exchange import Address, Answer, Exchange, post_order
from orderflow.bench.histogram import Histogram
from orderflow.bench.load import BODIES, CONNECT_TIMEOUT, Record, order_body
from orderflow.engine.outbox import CHANNEL
from orderflow.engine.patience import within

# Seconds: the longest time between two looks, and the shortest where notifications come all the time.
LOOK_EVERY = 0.01
PAUSE = 0.001
# Of so many orders a second the end is looked for; of the others it would be the looking that is measured.
FOLLOWED_RATE = 100.0
_PAID = "SELECT id FROM orders WHERE id = ANY($1) AND state = 'PAID'"


@dataclass(frozen=True, slots=True)
class Options:
    """`rate` orders a second for `seconds` seconds over `connections` connections; `record` is the file for accepted ids.

    `patience`: seconds after the last arrival in which the orders may still become PAID.
    """

    host: str
    port: int
    database_url: str
    rate: float
    seconds: float
    record: str
    connections: int = 64
    patience: float = 30.0
    seed: int = 1


@dataclass(slots=True)
class Paced:
    """What came of it; `accepted` and `paid` are the JSON of a Histogram each, from the time at which the order was due.

    `begun`: Unix seconds, just before the first was due.
    """

    rate: float
    begun: float
    answers: dict[str, int]
    lost_connections: int
    accepted: dict[str, Any]
    paid: dict[str, Any]
    # Followed, and not PAID in time.
    unpaid: int
    followed: int


@dataclass(slots=True)
class _State:
    """Orders under way: `waiting` for a connection, `sent`, and `followed` until they are PAID; each with its due time."""

    free: list[Exchange] = field(default_factory=list)
    waiting: deque[float] = field(default_factory=deque)
    sent: dict[Exchange, float] = field(default_factory=dict)
    followed: dict[UUID, float] = field(default_factory=dict)


class OpenLoop:
    """Places orders when they are due, and looks for the end of those that it follows."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._address = Address(options.host, options.port)
        source = random.Random(options.seed)
        self._requests = cycle([post_order(self._address, order_body(source)) for _ in range(BODIES)])
        self._every = max(1, round(options.rate / FOLLOWED_RATE))
        self._state = _State()
        self._answers: Counter[str] = Counter()
        self._lost = self._followed = 0
        self._accepted, self._paid = Histogram(), Histogram()
        self._record = Record(options.record)
        self._answered = asyncio.Event()
        self._stopping = False

    async def run(self) -> Paced:
        """To the end of the last order. Raises OSError or TimeoutError when a server does not answer."""
        options, state = self._options, self._state
        on_end_of_input(self._stop)
        connection = await database.connected(options.database_url)
        exchanges = [
            await Exchange.open(self._address, self._ended, timeout=CONNECT_TIMEOUT) for _ in range(options.connections)
        ]
        state.free = list(exchanges)
        looking = asyncio.create_task(self._look(connection))
        begun = time.time()
        try:
            await arrive(options.rate, options.seconds, self._arrived)
            await self._until_idle(looking)
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            for exchange in exchanges:
                exchange.close()
            self._record.close()
            await connection.close(timeout=CONNECT_TIMEOUT)
        self._answers["none"] += len(state.waiting) + len(state.sent)
        return Paced(
            options.rate, begun, {answer: n for answer, n in self._answers.items() if n}, self._lost, self._accepted.as_json(),
            self._paid.as_json(), len(state.followed), self._followed,
        )  # fmt: skip

    async def _until_idle(self, looking: asyncio.Task[None]) -> None:
        end, state = time.monotonic() + self._options.patience, self._state
        while state.followed or state.waiting or state.sent:
            if looking.done():
                looking.result()
            if time.monotonic() >= end:
                return
            await asyncio.sleep(0.01)

    def _stop(self) -> None:
        self._stopping = True

    def _arrived(self, due: float) -> None:
        if self._stopping:
            return
        if self._state.free:
            self._send(self._state.free.pop(), due)
        else:
            self._state.waiting.append(due)

    def _send(self, exchange: Exchange, due: float) -> None:
        self._state.sent[exchange] = due
        exchange.send(next(self._requests))

    def _ended(self, exchange: Exchange, answer: Answer | None) -> None:
        now, state = time.monotonic(), self._state
        due = state.sent.pop(exchange, now)
        if answer is None:
            self._lost += 1
            return
        self._answers[str(answer.status)] += 1
        if answer.status == 201:
            self._accepted.record(now - due)
            self._record.accepted(answer.order_id)
            if (self._accepted.count - 1) % self._every == 0:
                state.followed[UUID(answer.order_id)] = due
                self._followed += 1
                self._answered.set()
        if state.waiting:
            self._send(exchange, state.waiting.popleft())
        else:
            state.free.append(exchange)

    async def _look(self, connection: Any) -> None:
        """Look after each notification: every settlement comes with one, as it writes an event into the outbox."""
        followed, news = self._state.followed, asyncio.Event()
        await connection.add_listener(CHANNEL, lambda *_: news.set())
        while True:
            if not followed:
                self._answered.clear()
                await self._answered.wait()
            with suppress(TimeoutError):
                await within(news.wait(), LOOK_EVERY)
            news.clear()
            paid = await connection.fetch(_PAID, list(followed))
            now = time.monotonic()
            for row in paid:
                self._paid.record(now - followed.pop(row["id"]))
            if self._every > 1:
                await asyncio.sleep(PAUSE)


async def run(options: Options) -> Paced:
    """Place that load to its end."""
    return await OpenLoop(options).run()


def main() -> int:
    return serve(Options, run)


if __name__ == "__main__":
    sys.exit(main())
