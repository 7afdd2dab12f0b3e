"""Reference D: the row changes of B by hand in groups, without HTTP and Kafka: what the database alone allows.

A process of its own (see apart). Each connection settles group after group, with five statements a group, each its own commit.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from decimal import Decimal

import asyncpg

from orderflow.bench import database
from orderflow.bench.apart import on_end_of_input, run_apart, serve
from orderflow.bench.load import cpu_seconds
from orderflow.bench.servers import Target
from orderflow.engine.ids import new_id

PLACE = """
WITH input AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::numeric[], $4::uuid[]) AS t(order_id, user_id, amount, event_id)),
placed AS (INSERT INTO orders (id, user_id, amount) SELECT order_id, user_id, amount FROM input)
INSERT INTO outbox (event_id, event_type, aggregate_id, payload)
SELECT event_id, 'OrderCreated', order_id, jsonb_build_object('orderId', order_id, 'amount', amount::text) FROM input
"""
MARK = "UPDATE outbox SET published_at = now() WHERE event_id = ANY($1) AND published_at IS NULL"
BEGIN = """
UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, updated_at = now(), entered_at = entered_at || now()
WHERE id = ANY($1) AND state = 'CREATED' AND version = 1
"""
SETTLE = """
WITH input AS (SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::uuid[]) AS t(order_id, created_event, paid_event)),
moved AS (
    UPDATE orders o SET state = 'PAID', version = 3, updated_at = now(), entered_at = o.entered_at || now()
    FROM input i WHERE o.id = i.order_id AND o.state = 'PAYMENT_PENDING' AND o.version = 2 RETURNING o.id, o.amount),
processed AS (INSERT INTO processed_events (event_id, worker_id) SELECT created_event, 'pipeline' FROM input)
INSERT INTO outbox (event_id, event_type, aggregate_id, payload)
SELECT i.paid_event, 'OrderPaid', m.id, jsonb_build_object('orderId', m.id, 'amount', m.amount::text)
FROM input i JOIN moved m ON m.id = i.order_id
"""
AMOUNTS = [Decimal(cents) / 100 for cents in range(100, 100_000, 199)]


@dataclass(frozen=True, slots=True)
class Options:
    """`connections` at work for `seconds` seconds after `warm_up` seconds, with groups of `group` orders."""

    database_url: str
    seconds: float
    warm_up: float
    connections: int = 3
    group: int = 500


@dataclass(frozen=True, slots=True)
class Settled:
    """Orders that went all their way in `seconds` seconds; `in_all` and the client's CPU time count the warm-up too."""

    orders: int
    seconds: float
    in_all: int
    cpu_seconds: float

    @property
    def orders_per_second(self) -> float:
        """The figure."""
        return self.orders / self.seconds


async def settle_group(connection: asyncpg.Connection, size: int) -> None:
    """A group of new orders from nothing to PAID."""
    orders, created, paid, users = ([new_id() for _ in range(size)] for _ in range(4))
    amounts = [AMOUNTS[at % len(AMOUNTS)] for at in range(size)]
    await connection.execute(PLACE, orders, users, amounts, created)
    await connection.execute(MARK, created)
    await connection.execute(BEGIN, orders)
    await connection.execute(SETTLE, orders, created, paid)
    await connection.execute(MARK, paid)


async def run(options: Options) -> Settled:
    """All connections to the end of the time; the last group of each counts whole. Raises OSError, TimeoutError."""
    connections = [await database.connected(options.database_url) for _ in range(options.connections)]
    stopping = False

    def stop() -> None:
        nonlocal stopping
        stopping = True

    on_end_of_input(stop)

    async def until(end: float) -> int:
        async def groups(connection: asyncpg.Connection) -> int:
            done = 0
            while time.monotonic() < end and not stopping:
                await settle_group(connection, options.group)
                done += 1
            return done

        return sum(await asyncio.gather(*map(groups, connections)))

    try:
        before = cpu_seconds()
        warm = await until(time.monotonic() + options.warm_up)
        begun = time.monotonic()
        groups = await until(begun + options.seconds)
        took = time.monotonic() - begun
        return Settled(groups * options.group, took, (warm + groups) * options.group, cpu_seconds() - before)
    finally:
        for connection in connections:
            await connection.close(timeout=database.CONNECT_TIMEOUT)


async def measure(target: Target, *, seconds: float, warm_up: float) -> Settled:
    """The pipeline against that database. Raises ProgramFailed."""
    options = Options(target.database_url, seconds, warm_up)
    return Settled(**await run_apart("orderflow.bench.pipeline", options, limit=seconds + warm_up + 60))


def main() -> int:
    return serve(Options, run)


if __name__ == "__main__":
    sys.exit(main())
