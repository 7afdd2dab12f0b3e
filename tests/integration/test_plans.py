"""Every statement of the hot path goes by an index, whenever it was planned, and costs the same however full the tables are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from orderflow import retention
from orderflow.engine import janitor, outbox, processed
from orderflow.engine.ids import new_id
from orderflow.engine.outbox import SHARDS
from orderflow.engine.postgres import _BY_INDEX
from orderflow.orders import store as orders
from orderflow.payments import simulated, store
from orderflow.payments.handlers import SUBJECTS

GROUP = 100
SMALL, LARGE = 1_000, 20_000
SHARD_LIST = list(range(SHARDS))

# Settled orders as the program leaves them.
FILL = """
WITH new AS (SELECT gen_random_uuid() AS id FROM generate_series(1, $1::integer)),
placed AS (
    INSERT INTO orders (id, user_id, amount, state, version, entered_at)
    SELECT id, id, 10, 'PAID', 3, ARRAY[now(), now(), now()] FROM new),
told AS (
    INSERT INTO outbox (event_type, aggregate_id, published_at)
    SELECT kind, id, now() FROM new CROSS JOIN (VALUES ('OrderCreated'), ('OrderPaid')) AS k(kind) RETURNING event_id),
charged AS (
    INSERT INTO gateway_charges (id, idempotency_key, reference, amount, status)
    SELECT id, 'orderflow-charge-' || id, id, 10, 'settled' FROM new)
INSERT INTO processed_events (event_id, worker_id) SELECT event_id, 'w' FROM told
"""


@dataclass(frozen=True)
class Statement:
    """A statement of the hot path and the types of its parameters."""

    sql: str
    types: str


STATEMENTS = {
    "place": Statement(orders._PLACE, "uuid[], uuid[], numeric[], uuid[], jsonb[]"),
    "place with keys": Statement(orders._PLACE_CAREFULLY, "uuid[], uuid[], numeric[], uuid[], jsonb[], text[], bytea[]"),
    "earlier": Statement(orders._EARLIER, "text[]"),
    "oldest created": Statement(orders._OLDEST_CREATED, "timestamptz, interval, integer"),
    "fetch due": Statement(outbox._FETCH_DUE, "integer[], bigint[], integer, integer"),
    "next due": Statement(outbox._NEXT_DUE, "integer[]"),
    "mark published": Statement(outbox._MARK_PUBLISHED, "uuid[], integer"),
    "mark published, each": Statement(outbox._MARK_PUBLISHED_EACH, "uuid[], integer[]"),
    "republish": Statement(outbox._REPUBLISH_IF_ATTEMPT, "uuid[], integer[], interval[], jsonb[], boolean[]"),
    "begin": Statement(store._BEGIN_IF_FRESH, "uuid[], uuid[], integer[]"),
    "resume": Statement(store._RESUME, "uuid[]"),
    "look up": Statement(processed._LOOK_UP, "uuid[]"),
    "charge": Statement(simulated._CHARGE, "uuid[], text[], uuid[], numeric[], boolean[]"),
    "settle": Statement(store._SETTLE, "uuid[], uuid[], integer[], boolean[], uuid[], jsonb[], jsonb[], text"),
    "record": Statement(processed.record_statement(SUBJECTS), "uuid[], text[], uuid[], text"),
    "judge": Statement(janitor._EXAMINE, "smallint[], bigint[], integer, interval"),
    "watch": Statement(janitor._STILL_UNSETTLED, "uuid[]"),
    "old page": Statement(retention._PAGE, "smallint[], bigint[], integer, interval"),
}


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


@pytest.fixture
async def session(connection: asyncpg.Connection, database_url: str) -> asyncpg.Connection:
    """A session with the roles' settings, its statements prepared while every table is empty."""
    for name, value in _BY_INDEX.items():
        await connection.execute(f"SET {name} = {value}")
    for name, statement in STATEMENTS.items():
        await connection.execute(f'PREPARE "{name}" ({statement.types}) AS {statement.sql}')
    return connection


def text(value: object) -> str:
    match value:
        case list():
            quoted = (text(item).replace("\\", "\\\\").replace('"', '\\"') for item in value)
            return "{" + ",".join(f'"{item}"' for item in quoted) + "}"
        case timedelta():
            return f"{value.total_seconds()} s"
        case bytes():
            return f"\\x{value.hex()}"
        case _:
            return str(value)


async def explained(session: asyncpg.Connection, name: str, *arguments: object) -> dict[str, Any]:
    """What the statement does with these arguments; nothing is kept."""
    transaction = session.transaction()
    await transaction.start()
    try:
        values = ", ".join("NULL" if value is None else f"'{text(value)}'" for value in arguments)
        told = await session.fetchval(f'EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE "{name}" ({values})')
    finally:
        await transaction.rollback()
    plan: dict[str, Any] = json.loads(told)[0]["Plan"]
    return plan


async def cost(session: asyncpg.Connection) -> dict[str, int]:
    """The blocks that each statement looks at for a group of new orders, on tables as they are."""
    ids, events = [new_id() for _ in range(GROUP)], [new_id() for _ in range(GROUP)]
    placed = [orders.NewOrder(order_id, event_id, uuid4(), 10) for order_id, event_id in zip(ids, events, strict=True)]  # type: ignore[arg-type]
    after = await session.fetchval("SELECT coalesce(max(seq), 0) FROM outbox")
    await orders.place(session, placed)
    ones, amounts, new = [1] * GROUP, [10] * GROUP, [new_id() for _ in range(GROUP)]
    keys = [f"key-{order_id}" for order_id in ids]
    found = {
        "place": (new, new, amounts, new, None),
        "place with keys": (new, new, amounts, new, None, keys, [b"h"] * GROUP),
        "earlier": (keys,),
        "oldest created": (None, timedelta(minutes=10), 200),
        "fetch due": (SHARD_LIST, [after] * SHARDS, 32, 1000),
        "next due": (SHARD_LIST,),
        "mark published": (events, 1),
        "mark published, each": (events, ones),
        "republish": (events, ones, [timedelta(seconds=1)] * GROUP, ["{}"] * GROUP, [False] * GROUP),
        "begin": (events, ids, ones),
        "resume": (events,),
        "look up": (events,),
        "charge": (new, keys, ids, amounts, [True] * GROUP),
        "settle": (events, ids, ones, [True] * GROUP, new, ["{}"] * GROUP, None, "w"),
        "record": (events, ["OrderCreated"] * GROUP, ids, "w"),
        "judge": (SHARD_LIST, [after] * SHARDS, 640, timedelta(0)),
        "watch": (events,),
        "old page": (SHARD_LIST, [after] * SHARDS, 16, timedelta(0)),
    }
    plans = {name: await explained(session, name, *arguments) for name, arguments in found.items()}
    for name, plan in plans.items():
        for node in nodes(plan):
            kind = node["Node Type"]
            if node.get("Relation Name") == "gateway_control":
                continue  # a table of one row
            assert kind not in ("Seq Scan", "Bitmap Heap Scan", "Hash Join", "Merge Join"), (name, kind)
            if kind in ("Index Scan", "Index Only Scan") and node["Index Name"] != "outbox_scheduled":
                assert "Index Cond" in node, (name, node["Index Name"])
            if kind == "Nested Loop":
                # One set against another would be looked at as often as both have rows.
                inner = node["Plans"][1]
                assert inner["Node Type"] not in ("CTE Scan", "Function Scan") or inner["Actual Loops"] <= 1, (name, node)
    return {name: plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for name, plan in plans.items()}


async def test_by_index_and_at_the_same_cost_however_full_the_tables_are(session: asyncpg.Connection) -> None:
    await session.execute(FILL.replace("$1::integer", str(SMALL)))
    small = await cost(session)
    await session.execute(FILL.replace("$1::integer", str(LARGE)))
    large = await cost(session)
    # Twenty times the rows are one level more in an index.
    grown = {name: (small[name], large[name]) for name in small if large[name] > small[name] * 2 + GROUP}
    assert grown == {}
