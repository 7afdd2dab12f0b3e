"""L1: single orders on an idle system, one after the other at a fixed pace."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import asyncpg

from orderflow.bench import database
from orderflow.bench.exchange import Address, ask, post_order
from orderflow.bench.load import Record, order_body
from orderflow.bench.program import Program, ProgramFailed
from orderflow.bench.servers import Servers
from orderflow.bench.throughput import SETTLE_TIMEOUT, SPLITS, Audited, audit_run, paying_settings

RATE = 20.0
WARM_UP_ORDERS = 20
PAID_TIMEOUT = 10.0
POLL = 0.001


@dataclass(frozen=True, slots=True)
class Latencies:
    """Milliseconds. `published`: from the start of the order's transaction to Kafka's acknowledgement of its event, both by the
    database's clock. `paid`: from the first byte of the POST until PAID is committed and visible to another connection.
    """

    published: list[float]
    paid: list[float]
    audited: Audited


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -(-len(ordered) * round(share * 1000) // 1000) - 1))]


async def measure(servers: Servers, directory: Path, *, split: str, orders: int) -> Latencies:
    """Place `orders` orders at 20 a second, gateway delay 0. Raises EmbeddedError, ProgramFailed."""
    async with servers.fresh() as target:
        record_file = directory / f"{target.topic}.accepted"
        program = Program(SPLITS[split], paying_settings(target, delay_ms=0), directory, name=target.topic)
        await program.start()
        connection = await database.connected(target.database_url)
        record = Record(str(record_file))
        try:
            await _paced(program.address, connection, record, WARM_UP_ORDERS)
            measured = await _paced(program.address, connection, record, orders)
            settled = await database.until_settled(connection, timeout=SETTLE_TIMEOUT)
            published = await connection.fetch(
                "SELECT extract(epoch FROM published_at - created_at)::float8 * 1000 AS ms FROM outbox "
                "WHERE event_type = 'OrderCreated' AND aggregate_id = ANY($1)",
                [UUID(order_id) for order_id in measured],
            )
            code = await program.stop()
            audited = await audit_run(connection, "single orders at 20/s", record_file, settled=settled, code=code)
            return Latencies([row["ms"] for row in published], list(measured.values()), audited)
        finally:
            record.close()
            await connection.close(timeout=5)
            await program.stop()


async def _paced(address: Address, connection: asyncpg.Connection, record: Record, orders: int) -> dict[str, float]:
    """Milliseconds from the POST to PAID by order id."""
    source = random.Random(1)
    paid: dict[str, float] = {}
    due = time.monotonic()
    for _ in range(orders):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        request = post_order(address, order_body(source))
        sent = time.monotonic()
        answer = await ask(address, request, timeout=PAID_TIMEOUT)
        if answer.status != 201:
            raise ProgramFailed(f"an order on an idle system was answered {answer.status}: {answer.body[:200]!r}")
        record.accepted(answer.order_id)
        await _until_paid(connection, UUID(answer.order_id))
        paid[answer.order_id] = (time.monotonic() - sent) * 1000
        due = max(due + 1 / RATE, time.monotonic())
    return paid


async def _until_paid(connection: asyncpg.Connection, order_id: UUID) -> None:
    end = time.monotonic() + PAID_TIMEOUT
    while await connection.fetchval("SELECT state FROM orders WHERE id = $1", order_id) != "PAID":
        if time.monotonic() >= end:
            raise ProgramFailed(f"order {order_id} was not PAID within {PAID_TIMEOUT:.0f} s")
        await asyncio.sleep(POLL)
