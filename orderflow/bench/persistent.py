"""Clients who do not give up: one idempotency key an order, the same request again until it is answered with 201.

Some ask once more after the 201, as a client does whose answer was lost on the way: both answers must name the same order.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter

from orderflow.bench.apart import on_end_of_input
from orderflow.bench.exchange import Address, Answer, Exchange, post_order
from orderflow.bench.histogram import Histogram
from orderflow.bench.load import CONNECT_TIMEOUT, Options, Record, Summary, order_body

ANSWER_TIMEOUT = 12.0
RETRY_PAUSE = 0.2
# On a connection that the server is about to close.
LAST_ANSWER = b"connection: close"
ASK_AGAIN = 0.02
# What a well-formed request may be told besides 201; anything else breaks the contract, and is tried again all the same.
ASK_AGAIN_LATER = frozenset({409, 429, 503})


class PersistentClients:
    """`connections` clients that together place at most `rate` orders a second."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._address = Address(options.host, options.port)
        self._record = Record(options.record)
        self._answers: Counter[str] = Counter()
        self._latencies = Histogram()
        self._summary = Summary()
        self._end = 0.0

    async def run(self) -> Summary:
        """Load for the time asked for, then repeat what is still unanswered for `patience` seconds at the most."""
        summary = self._summary
        summary.first_sent = time.time()
        self._end = time.monotonic() + self._options.seconds
        on_end_of_input(self._stop)
        await asyncio.gather(*(self._client(number) for number in range(self._options.connections)))
        summary.last_answered = time.time()
        self._record.close()
        summary.answers = dict(self._answers)
        summary.take_latencies(self._latencies)
        return summary

    def _stop(self) -> None:
        self._end = time.monotonic()

    async def _client(self, number: int) -> None:
        source = random.Random(f"{self._options.seed}/{number}")
        connection = _Connection(self._address)
        pace = self._options.connections / self._options.rate if self._options.rate else 0.0
        due = time.monotonic() + pace * source.random()
        try:
            while due < self._end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await self._place(connection, source)
                # A client that was held up does not catch up: the load is bounded by the rate from above only.
                due = max(due + pace, time.monotonic())
        finally:
            connection.close()

    async def _place(self, connection: _Connection, source: random.Random) -> None:
        # Random, and not from the seed: a second run against the same database must not meet the keys of the first.
        key = str(uuid.uuid4())
        request = post_order(self._address, order_body(source), key=key)
        begun = time.monotonic()
        order_id = await self._until_accepted(connection, request)
        if order_id is None:
            self._summary.unresolved += 1
            return
        self._latencies.record(time.monotonic() - begun)
        self._summary.accepted += 1
        self._record.accepted(order_id)
        if source.random() < ASK_AGAIN:
            again = await self._until_accepted(connection, request)
            if again is not None and again != order_id:
                self._record.accepted(again)
                self._summary.contradictions.append(f"key {key}: order {order_id}, then order {again}")

    async def _until_accepted(self, connection: _Connection, request: bytes) -> str | None:
        while True:
            answer = await connection.ask(request)
            if answer is None:
                self._summary.lost_connections += 1
            else:
                self._answers[str(answer.status)] += 1
                if answer.status == 201:
                    return answer.order_id
                if answer.status not in ASK_AGAIN_LATER:
                    self._summary.contradictions.append(f"a good request was answered {answer.status}: {answer.body[:300]!r}")
            if time.monotonic() >= self._end + self._options.patience:
                return None
            await asyncio.sleep(RETRY_PAUSE * random.uniform(0.5, 1.5))


class _Connection:
    """Opened when it is needed, and again after it was lost."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._exchange: Exchange | None = None
        self._waiting: asyncio.Future[Answer | None] | None = None

    async def ask(self, request: bytes) -> Answer | None:
        """The answer, or None when the connection was refused, lost, or silent for too long."""
        try:
            if self._exchange is None:
                self._exchange = await Exchange.open(self._address, self._ended, timeout=CONNECT_TIMEOUT)
            self._waiting = asyncio.get_running_loop().create_future()
            self._exchange.send(request)
            async with asyncio.timeout(ANSWER_TIMEOUT):
                answer = await self._waiting
            if answer is not None and LAST_ANSWER in answer.head:
                self.close()
            return answer
        except (OSError, TimeoutError):
            self.close()
            return None

    def _ended(self, exchange: Exchange, answer: Answer | None) -> None:
        if answer is None:
            self._exchange = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)

    def close(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
