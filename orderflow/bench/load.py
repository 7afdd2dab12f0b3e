"""The load generator for throughput, a process of its own (see apart): a closed loop, or clients who do not give up.

Each accepted order's id is in the record file before the next request goes out on that connection: what the file holds, a
client was told.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from orderflow.bench.apart import on_end_of_input, serve
from orderflow.bench.exchange import Address, Answer, Exchange, post_order
from orderflow.bench.histogram import Histogram

CONNECT_TIMEOUT = 5.0
# Longer than the API may take for a request: a connection that stays silent is a failure and not a slow answer.
LAST_ANSWERS_TIMEOUT = 30.0
BODIES = 256
# Of `accepted_over_time`, in seconds.
SLOT = 0.25


@dataclass(frozen=True, slots=True)
class Options:
    """What to send. `seconds` is how long new orders are placed; `record` the file for accepted ids, appended to.

    `persistent`: clients with an idempotency key for each order, who repeat a request until it is answered with 201, together
    `rate` orders a second at the most; `patience` seconds after the end they give up. Otherwise a closed loop: each connection
    sends the next request when the one before is answered.
    """

    host: str
    port: int
    connections: int
    seconds: float
    record: str
    persistent: bool = False
    rate: float = 0.0
    patience: float = 30.0
    seed: int = 1


@dataclass(slots=True)
class Summary:
    """What came of it. Times are Unix seconds, latencies milliseconds from the send to the answer."""

    first_sent: float = 0.0
    last_answered: float = 0.0
    accepted: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    lost_connections: int = 0
    # Keys whose request never got a 201: the order may or may not exist.
    unresolved: int = 0
    # Keys that got two different orders, and answers that a good request must never get.
    contradictions: list[str] = field(default_factory=list)
    latency_p50: float = 0.0
    latency_p99: float = 0.0
    latency_max: float = 0.0
    # A Histogram's JSON.
    latencies: dict[str, Any] = field(default_factory=dict)
    # Orders accepted in each SLOT seconds since the first was sent.
    accepted_over_time: list[int] = field(default_factory=list)
    # The generator's own: CPU time of the sending, and the peak of its memory.
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    def take_latencies(self, latencies: Histogram) -> None:
        """Fill in what tells of them."""
        self.latency_p50 = latencies.percentile(0.5) * 1000
        self.latency_p99 = latencies.percentile(0.99) * 1000
        self.latency_max = latencies.largest * 1000
        self.latencies = latencies.as_json()


class Record:
    """The file of accepted order ids, one a line; each is written before `accepted` returns."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def accepted(self, order_id: str) -> None:
        """Note an order for which a 201 has arrived."""
        os.write(self._descriptor, order_id.encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def order_body(source: random.Random) -> bytes:
    """A JSON body for POST /orders: any user, 1.00 to 999.99."""
    user = uuid.UUID(int=source.getrandbits(128), version=4)
    return json.dumps({"userId": str(user), "amount": f"{source.randint(100, 99_999) / 100:.2f}"}).encode()


class ClosedLoop:
    """As many connections as asked for; on each the next order is sent as soon as the one before is answered."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._address = Address(options.host, options.port)
        source = random.Random(options.seed)
        # Encoded beforehand: the generator's work is taken from the program that it measures.
        self._requests = cycle([post_order(self._address, order_body(source)) for _ in range(BODIES)])
        self._sent: dict[Exchange, float] = {}
        self._latencies = Histogram()
        self._slots: Counter[int] = Counter()
        self._answers: Counter[str] = Counter()
        self._lost = 0
        self._record = Record(options.record)
        self._begun = self._end = 0.0
        self._idle = asyncio.Event()

    async def run(self) -> Summary:
        """Load for the time asked for, and wait for the last answers. Raises OSError or TimeoutError when nobody listens."""
        exchanges = [
            await Exchange.open(self._address, self._ended, timeout=CONNECT_TIMEOUT) for _ in range(self._options.connections)
        ]
        before = cpu_seconds()
        summary = Summary(first_sent=time.time())
        self._begun = time.monotonic()
        self._end = self._begun + self._options.seconds
        on_end_of_input(self._stop)
        for exchange in exchanges:
            self._send(exchange)
        try:
            async with asyncio.timeout(self._options.seconds + LAST_ANSWERS_TIMEOUT):
                await self._idle.wait()
        except TimeoutError:
            self._answers["none"] += len(self._sent)
        summary.last_answered = time.time()
        for exchange in exchanges:
            exchange.close()
        self._record.close()
        summary.accepted, summary.answers = self._answers["201"], dict(self._answers)
        summary.lost_connections = self._lost
        summary.take_latencies(self._latencies)
        summary.accepted_over_time = [self._slots[slot] for slot in range(max(self._slots, default=-1) + 1)]
        summary.cpu_seconds, summary.peak_bytes = cpu_seconds() - before, peak_bytes()
        return summary

    def _stop(self) -> None:
        self._end = time.monotonic()

    def _send(self, exchange: Exchange) -> None:
        self._sent[exchange] = time.monotonic()
        exchange.send(next(self._requests))

    def _ended(self, exchange: Exchange, answer: Answer | None) -> None:
        now = time.monotonic()
        sent = self._sent.pop(exchange, now)
        if answer is None:
            self._lost += 1
        else:
            if answer.status == 201:
                self._record.accepted(answer.order_id)
                self._latencies.record(now - sent)
                self._slots[int((now - self._begun) / SLOT)] += 1
            self._answers[str(answer.status)] += 1
            if now < self._end:
                self._send(exchange)
        if not self._sent:
            self._idle.set()


def cpu_seconds() -> float:
    """User and system time of this process until now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> int:
    """The most memory that this process has held; macOS tells bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


async def run(options: Options) -> Summary:
    """Send that load to its end."""
    if options.persistent:
        from orderflow.bench.persistent import PersistentClients

        return await PersistentClients(options).run()
    return await ClosedLoop(options).run()


def main() -> int:
    return serve(Options, run)


if __name__ == "__main__":
    sys.exit(main())
