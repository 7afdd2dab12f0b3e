"""What a failure costs, measured: each promise of docs/guarantees.md against servers and processes of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Mapping

import asyncpg

from orderflow.bench import database
from orderflow.engine.shards import SHARD_LOCK
from orderflow.settings import Role
from orderflow.torture.detour import Detour
from orderflow.torture.gateway_promises import unavailable, unknown
from orderflow.torture.stage import PATIENCE, SPLIT, STILL, Measured, Play, Promise, Stage
from orderflow.torture.victims import Victims

ROUNDS = 3
NOTES = 64
IN_FLIGHT = 2_000

_WAKES = """
SELECT array_agg(pid) FROM pg_stat_activity WHERE application_name = 'orderflow wake' AND datname = current_database()
"""
_OWNERS = f"SELECT count(DISTINCT pid) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = {SHARD_LOCK}"
_NOTE = """
INSERT INTO outbox (event_type, aggregate_type, aggregate_id)
SELECT 'Noted', 'note', gen_random_uuid() FROM generate_series(1, $1)
"""
_UNPUBLISHED = "SELECT count(*) FROM outbox WHERE aggregate_type = 'note' AND published_at IS NULL"
_LAST_PUBLISHED = "SELECT extract(epoch FROM max(published_at))::float8 FROM outbox WHERE aggregate_type = 'note'"
_PENDING = "SELECT count(*) FROM orders WHERE state = 'PAYMENT_PENDING'"
_WORKERS = "SELECT count(DISTINCT worker_id) FROM processed_events"
_PENDING_IDS = "SELECT array_agg(id) FROM orders WHERE state = 'PAYMENT_PENDING'"
# As a worker leaves it that died after the charge (or before), with its offset committed by a bug or a reset.
_ABANDON = """
WITH placed AS (
    INSERT INTO orders (id, user_id, amount, state, version, entered_at)
    SELECT gen_random_uuid(), gen_random_uuid(), 10, 'PAYMENT_PENDING', 2, ARRAY[now(), now()] FROM generate_series(1, $1)
    RETURNING *),
charged AS (
    INSERT INTO gateway_charges (id, idempotency_key, reference, amount, status)
    SELECT gen_random_uuid(), 'orderflow-charge-' || id, id, amount, 'settled' FROM placed
    WHERE get_byte(uuid_send(id), 0) < 128)
INSERT INTO outbox (event_type, aggregate_id, published_at, payload)
SELECT 'OrderCreated', id, now(), jsonb_build_object('orderId', id, 'userId', user_id, 'amount', amount::text) FROM placed
"""
_ENDED_AFTER = """
SELECT floor(extract(epoch FROM updated_at) - $1)::integer AS second, count(*) FROM orders WHERE NOT in_flight GROUP BY 1
"""


async def half_open(stage: Stage) -> Measured:
    """From the moment in which the connection carries nothing any more to another that listens."""
    assert stage.servers.postgres is not None
    detour = Detour(stage.servers.postgres.port)
    await detour.start()
    took = []
    try:
        async with stage.running(*SPLIT, detour=detour) as play:
            for _ in range(ROUNDS):
                # The program is ready before its relay listens.
                await play.until(lambda: play.ask(_WAKES))
                before = set(await play.ask(_WAKES))
                begun = time.time()
                detour.swallow()

                async def replaced(before: set[int] = before) -> bool:
                    return bool(set(await play.ask(_WAKES) or ()) - before)

                took.append(await play.until(replaced) - begun)
    finally:
        await detour.stop()
    return Measured(max(took), "heartbeat 2 s, limit of an answer 2 s")


async def lost_notify(stage: Stage) -> Measured:
    """From the commit of a row about which nobody is told to its publication."""
    assert stage.servers.postgres is not None
    took = []
    async with stage.running(*SPLIT) as play:
        connection = await stage.servers.postgres.connect(play.target.database_url.rpartition("/")[2])
        try:
            await connection.execute("SET session_replication_role = replica")
            for _ in range(ROUNDS * 3):
                begun = time.time()
                await connection.execute(_NOTE, 1)
                await play.until(lambda: play.none(_UNPUBLISHED))
                took.append(await play.ask(_LAST_PUBLISHED) - begun)
        finally:
            await connection.close(timeout=5)
    return Measured(max(took), "ORDERFLOW_RELAY_POLL_MS, 800")


async def killed_publisher(stage: Stage) -> Measured:
    """From the SIGKILL of one of two publishers to the publication of events of all shards, written after it."""
    took = []
    async with stage.running("--api", "1", "--publisher", "2", "--worker", "1") as play:
        for _ in range(ROUNDS):
            await play.until(lambda: _equals(play, _OWNERS, 2))
            begun = await _kill_one_of_two(play, "publisher")
            await play.ask(_NOTE, NOTES)
            await play.until(lambda: play.none(_UNPUBLISHED))
            took.append(await play.ask(_LAST_PUBLISHED) - begun)
    return Measured(max(took), "its session ends with it; the other takes the shards at its next look, or its successor does")


async def killed_worker(stage: Stage) -> Measured:
    """From the SIGKILL of one of two workers to the end of every order that was PENDING then."""
    split = ("--api", "1", "--publisher", "1", "--worker", "2")
    async with stage.running(*split, settings={"ORDERFLOW_GATEWAY_DELAY_MS": "1000"}) as play, play.load(rate=400):
        await play.until(lambda: _equals(play, _WORKERS, 2))
        await play.until(lambda: play.at_least(_PENDING, 300))
        pending = await play.ask(_PENDING_IDS)
        begun = await _kill_one_of_two(play, "worker")
        ended = await play.until(lambda: play.none(STILL, pending))
    return Measured(ended - begun, "Kafka's session of 6 s, then the rebalance and the gateway's answer")


async def abandoned(stage: Stage) -> Measured:
    """From the publication of 200 PENDING orders about which no worker hears to the end of the last; half were charged."""
    # The default, unless the run is only to show that it works.
    settings = {"ORDERFLOW_RECONCILE_SECONDS": "4"} if stage.quick else {}
    async with stage.running(*SPLIT, settings=settings) as play:
        begun = time.time()
        await play.ask(_ABANDON, 200)
        ended = await play.until(lambda: play.none(_PENDING))
    return Measured(ended - begun, "ORDERFLOW_RECONCILE_SECONDS, and a quarter of it between two looks")


async def terminated(stage: Stage) -> Measured:
    """From SIGTERM with 2,000 payments in flight to the end of the last process; then it is started again."""
    async with stage.running(*SPLIT, settings={"ORDERFLOW_GATEWAY_DELAY_MS": "4000"}) as play:
        async with play.load(rate=0, connections=64):
            await play.until(lambda: play.at_least(_PENDING, IN_FLIGHT))
        pending = await play.ask(_PENDING)
        begun = time.time()
        code = await play.program.stop()
        took = time.time() - begun
        left = await play.ask(_PENDING)
        await play.program.start()
        return Measured(took, f"exit code {code}; {pending:,} PENDING before, {left:,} after, all ended after the next start")


async def rolling(stage: Stage) -> Measured:
    """Requests that failed while every process was replaced under load."""
    async with stage.running("--api", "2", "--publisher", "1", "--worker", "2") as play:
        async with play.load(rate=500) as load:
            os.kill(play.program.pid, signal.SIGUSR1)
            await play.until(lambda: _logged(play, "ROLLING_RESTART_DONE", 1))
        summary = load.result()
    refused = {status: count for status, count in summary.answers.items() if status != "201"}
    failed = summary.lost_connections + summary.unresolved + sum(refused.values())
    return Measured(failed, f"of {summary.accepted:,}; {json.dumps(refused) if refused else 'every answer a 201'}")


async def postgres_away(stage: Stage) -> Measured:
    """From the return of a PostgreSQL that was away to the first second in which as many orders end as before."""
    assert stage.servers.postgres is not None
    away = 5.0 if stage.quick else 60.0
    async with stage.running(*SPLIT) as play:
        async with play.load(rate=500):
            await asyncio.sleep(10)
            down = time.time()
            await play.close()
            await stage.servers.postgres.stop()
            await asyncio.sleep(away)
            await stage.servers.postgres.start()
            back = time.time()
            await asyncio.sleep(15)
        crashed = play.facts("PROCESS_CRASHED")
        connection = await database.connected(play.target.database_url)
        try:
            before = await _rates(connection, down - 6, 5)
            after = await _rates(connection, back, 15)
        finally:
            await connection.close(timeout=5)
    usual = sum(before.values()) / 5
    reached = [second for second in range(15) if after.get(second, 0) >= 0.9 * usual]
    return Measured(
        reached[0] + 1 if reached else PATIENCE, f"away {away:.0f} s, {usual:.0f} orders/s before, {crashed} processes crashed"
    )


async def kafka_wiped(stage: Stage) -> Measured:
    """Accepted orders that have not ended two minutes after all of Kafka's data was removed under load."""
    assert stage.servers.kafka is not None
    async with stage.running(*SPLIT, settings={"ORDERFLOW_GATEWAY_DELAY_MS": "1000"}) as play:
        async with play.load(rate=300):
            await play.until(lambda: play.at_least(_PENDING, 200))
            begun = time.time()
            await stage.servers.kafka.wipe()
            await stage.servers.kafka.start()
            await asyncio.sleep(2)
        connection = await database.connected(play.target.database_url)
        try:
            await database.until_settled(connection, timeout=PATIENCE)
            orders, events = await database.unsettled(connection)
        finally:
            await connection.close(timeout=5)
        took = time.time() - begun
    return Measured(orders, f"{events} events unsettled; all ended {took:.0f} s after the wipe")


async def _kill_one_of_two(play: Play, role: Role) -> float:
    """SIGKILL the older of two processes; returns the Unix time. Raises TimeoutError where there are not two."""
    victims = Victims(play.program.pid)

    async def both() -> bool:
        return len(await victims.of(role)) == 2

    await play.until(both)
    victim, _ = await victims.of(role)
    begun = time.time()
    os.kill(victim.pid, signal.SIGKILL)
    return begun


async def _rates(connection: asyncpg.Connection, begin: float, seconds: int) -> Mapping[int, int]:
    rows = await connection.fetch(_ENDED_AFTER, begin)
    return {row["second"]: row["count"] for row in rows if 0 <= row["second"] < seconds}


async def _equals(play: Play, statement: str, value: int) -> bool:
    return bool(await play.ask(statement) == value)


async def _logged(play: Play, kind: str, times: int) -> bool:
    return play.facts(kind) >= times


PROMISES = (
    Promise("a half-open LISTEN connection is found and replaced", 5, "s", half_open),
    Promise("a lost NOTIFY costs", 1, "s", lost_notify),
    Promise("a killed publisher's shards are served again", 3, "s", killed_publisher),
    Promise("a killed worker's payments in flight are resumed", 30, "s", killed_worker),
    Promise("a PAYMENT_PENDING order nobody works on is ended through `find`", 60, "s", abandoned),
    Promise("SIGTERM to exit with 2,000 payments in flight", 10, "s", terminated),
    Promise("rolling restart of every process under load", 0, "failed requests", rolling),
    Promise("PostgreSQL back after a minute: full rate within", 5, "s", postgres_away),
    Promise("outcome unknown: orders FAILED with a charge behind them", 0, "orders", unknown),
    Promise("gateway away for five minutes: orders FAILED because of it", 0, "orders", unavailable),
    Promise("Kafka wiped: accepted orders that do not end", 0, "orders", kafka_wiped),
)
