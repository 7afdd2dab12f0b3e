"""T9: a database in which ten million orders have been settled already, for T1 to run on.

    async with growth.filled(servers, orders) as target:
        for each round: throughput.measure(servers, directory, target=target, ...)

The rows are those that the program itself leaves, with ids in the order of time as its own are, spread over thirty days past
and complete to the audit's eye. What differs from a database that has grown is the free space: no row was updated here, so the
room that the fill factor leaves in each page is untouched.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg

from orderflow.bench import database
from orderflow.bench.servers import Servers, Target

CHUNK = 50_000
# For one chunk; the vacuum and the indexes go through everything.
CHUNK_TIMEOUT = 120.0
WHOLE_TIMEOUT = 3_600.0
SPREAD = "30 days"
TABLES = ("orders", "outbox", "processed_events", "gateway_charges")
# For the building of the indexes, in this one session.
SORT_MEMORY = "256MB"

# UUIDv7 of the time `at` (see engine.ids), which PostgreSQL makes by itself from version 18 on only.
_ID = """(lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
          || substr(replace(gen_random_uuid()::text, '-', ''), 14))::uuid"""

# Orders $1 + 1 to $1 + $2 of $3.
_FILL = f"""
WITH new AS MATERIALIZED (
    SELECT {_ID} AS id, {_ID} AS created_event, {_ID} AS paid_event, {_ID} AS charge, gen_random_uuid() AS user_id,
           (1 + random() * 998)::numeric(12,2) AS amount, at, at + interval '8 ms' AS begun, at + interval '20 ms' AS paid
    FROM (SELECT now() - interval '1 hour' - interval '{SPREAD}' * (1 - n::float8 / $3) AS at
          FROM generate_series($1::integer + 1, $1::integer + $2::integer) AS n) AS times),
placed AS (
    INSERT INTO orders (id, user_id, state, version, amount, created_at, updated_at, entered_at)
    SELECT id, user_id, 'PAID', 3, amount, at, paid, ARRAY[at, begun, paid] FROM new),
announced AS (
    INSERT INTO outbox (event_id, event_type, aggregate_id, payload, created_at, published_at)
    SELECT created_event, 'OrderCreated', id, jsonb_build_object('orderId', id, 'userId', user_id, 'amount', amount::text),
           at, at + interval '5 ms' FROM new
    UNION ALL
    SELECT paid_event, 'OrderPaid', id,
           jsonb_build_object('orderId', id, 'userId', user_id, 'amount', amount::text, 'chargeId', charge),
           paid, paid + interval '5 ms' FROM new),
consumed AS (
    INSERT INTO processed_events (event_id, worker_id, processed_at)
    SELECT created_event, 'payment-worker-1', paid FROM new
    UNION ALL
    SELECT paid_event, 'payment-worker-1', paid + interval '10 ms' FROM new)
INSERT INTO gateway_charges (id, idempotency_key, reference, amount, status, created_at)
SELECT charge, 'orderflow-charge-' || id, id, amount, 'settled', paid FROM new
"""

# What the relays of a program that had written these rows would have come to.
_LOW_WATER = """
INSERT INTO outbox_low_water (shard, seq) SELECT shard, max(seq) FROM outbox GROUP BY shard
ON CONFLICT (shard) DO UPDATE SET seq = excluded.seq
"""

# Constraints first: their indexes go with them. Read before, made again after: the fill writes each index once, in order.
_INDEXES = """
SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname) AS drop,
       format('ALTER TABLE %s ADD CONSTRAINT %I %s', conrelid::regclass, conname, pg_get_constraintdef(oid)) AS make
FROM pg_constraint WHERE conrelid = ANY($1::text[]::regclass[]) AND contype IN ('p', 'u')
UNION ALL
SELECT format('DROP INDEX %s', indexrelid::regclass), pg_get_indexdef(indexrelid)
FROM pg_index WHERE indrelid = ANY($1::text[]::regclass[])
                AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
"""


@asynccontextmanager
async def filled(servers: Servers, orders: int) -> AsyncIterator[Target]:
    """A database with that many settled orders and an empty topic, for as many runs as wanted; both are removed afterwards.

    Raises EmbeddedError, or an asyncpg error when the disk is full.
    """
    async with servers.fresh() as target:
        connection = await database.connected(target.database_url)
        try:
            await _fill(connection, orders)
        finally:
            await connection.close(timeout=5)
        yield target


async def _fill(connection: asyncpg.Connection, orders: int) -> None:
    indexes = await connection.fetch(_INDEXES, TABLES)
    await connection.execute(f"SET maintenance_work_mem = '{SORT_MEMORY}'")
    for index in indexes:
        await connection.execute(index["drop"])
    for done in range(0, orders, CHUNK):
        await connection.execute(_FILL, done, min(CHUNK, orders - done), orders, timeout=CHUNK_TIMEOUT)
    for index in indexes:
        await connection.execute(index["make"], timeout=WHOLE_TIMEOUT)
    await connection.execute(_LOW_WATER, timeout=WHOLE_TIMEOUT)
    await connection.execute(f"VACUUM (ANALYZE, FREEZE) {', '.join(TABLES)}", timeout=WHOLE_TIMEOUT)
    # What the filling left in memory must not be written during the runs.
    with suppress(asyncpg.InsufficientPrivilegeError):
        await connection.execute("CHECKPOINT", timeout=WHOLE_TIMEOUT)
