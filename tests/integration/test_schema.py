"""The schema refuses what must never be: unknown states, broken versions, illegal transitions, half-explained rows."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest

from orderflow.engine.outbox import SHARDS
from orderflow.migrations import schema_sql
from orderflow.orders.model import Failure, State, may_go
from tests.rows import one_database

database_url = one_database


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection in a transaction that is rolled back afterwards."""
    opened = await asyncpg.connect(database_url, timeout=10)
    transaction = opened.transaction()
    await transaction.start()
    try:
        yield opened
    finally:
        await opened.close()


# Where an order can stand: state, a version that fits it, and why it failed.
STANDINGS = [
    (State.CREATED, 1, None),
    (State.PAYMENT_PENDING, 2, None),
    (State.PAYMENT_PENDING, 4, None),
    (State.PAID, 3, None),
    (State.FAILED, 2, Failure.ERROR),
    (State.FAILED, 3, Failure.ERROR),
    (State.FAILED, 3, Failure.DECLINED),
]


async def insert(
    connection: asyncpg.Connection, state: str, version: int, failure: str | None = None, amount: str = "1"
) -> UUID:
    order_id = uuid4()
    await connection.execute(
        "INSERT INTO orders (id, user_id, state, version, failure, amount, entered_at)"
        " VALUES ($1, gen_random_uuid(), $2, $3, $4, $5::text::numeric, array_fill(now(), ARRAY[greatest($3, 0)]))",
        order_id, state, version, failure, amount,
    )  # fmt: skip
    return order_id


@pytest.mark.parametrize(
    ("state", "version", "failure", "amount", "constraint"),
    [
        ("SHIPPED", 3, None, "1", "orders_state_known"),
        ("paid", 3, None, "1", "orders_state_known"),
        ("", 1, None, "1", "orders_state_known"),
        ("CREATED", 0, None, "1", "orders_version_fits"),
        ("CREATED", -1, None, "1", "orders_version_fits"),
        ("CREATED", 2, None, "1", "orders_version_fits"),
        ("PAYMENT_PENDING", 1, None, "1", "orders_version_fits"),
        ("FAILED", 1, "error", "1", "orders_version_fits"),
        ("PAID", 2, None, "1", "orders_version_fits"),
        ("CREATED", 1, None, "0", "orders_amount_positive"),
        ("CREATED", 1, None, "-0.01", "orders_amount_positive"),
        ("CREATED", 1, None, "0.004", "orders_amount_positive"),
        ("FAILED", 3, "bad luck", "1", "orders_failure_explains"),
        ("PAID", 3, "error", "1", "orders_failure_explains"),
    ],
)
async def test_an_order_that_cannot_be(
    connection: asyncpg.Connection, state: str, version: int, failure: str | None, amount: str, constraint: str
) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await insert(connection, state, version, failure, amount)
    # Other constraints may be broken as well, and which is told first is PostgreSQL's affair.
    broken = {"orders_state_known", "orders_version_fits"} if constraint == "orders_state_known" else {constraint}
    broken |= {"orders_history_complete"} if version < 1 else set()
    assert refused.value.constraint_name in broken


async def test_amounts_keep_two_decimals_and_have_a_ceiling(connection: asyncpg.Connection) -> None:
    order_id = await insert(connection, "CREATED", 1, amount="9999999999.99")
    assert str(await connection.fetchval("SELECT amount FROM orders WHERE id = $1", order_id)) == "9999999999.99"
    with pytest.raises(asyncpg.NumericValueOutOfRangeError):
        await insert(connection, "CREATED", 1, amount="10000000000")


@pytest.mark.parametrize("amount", ["NaN", "Infinity", "-Infinity"])
async def test_an_amount_is_a_number(connection: asyncpg.Connection, amount: str) -> None:
    with pytest.raises((asyncpg.CheckViolationError, asyncpg.NumericValueOutOfRangeError)):
        await insert(connection, "CREATED", 1, amount=amount)


async def go(connection: asyncpg.Connection, order_id: UUID, state: State, step: int, failure: Failure | None) -> bool:
    try:
        async with connection.transaction():
            await connection.execute(
                "UPDATE orders SET state = $2, version = version + $3, failure = $4,"
                " entered_at = (entered_at || now())[1:version + $3] WHERE id = $1",
                order_id, state.value, step, failure,
            )  # fmt: skip
    except asyncpg.CheckViolationError:
        return False
    return True


@pytest.mark.parametrize(("state", "version", "failure"), STANDINGS, ids=lambda value: str(value or ""))
async def test_every_transition_is_legal_here_and_in_the_model_or_in_neither(
    connection: asyncpg.Connection, state: State, version: int, failure: Failure | None
) -> None:
    for new, step, why in itertools.product(State, (-1, 0, 1, 2), (Failure.ERROR, Failure.DECLINED)):
        order_id = await insert(connection, state, version, failure)
        went = await go(connection, order_id, new, step, why if new is State.FAILED else None)
        # To write the same state again is no transition: a FAILED order may even be told another cause by hand.
        same = new is state and step == 0
        assert went == (same or (step == 1 and may_go(state, new, failure))), (state, version, new, step)
        row = await connection.fetchrow("SELECT state, version FROM orders WHERE id = $1", order_id)
        assert tuple(row) == ((new, version + step) if went else (state, version))


async def test_the_jump_to_paid_is_refused_with_a_hint(connection: asyncpg.Connection) -> None:
    order_id = await insert(connection, "CREATED", 1)
    with pytest.raises(
        asyncpg.CheckViolationError, match=r"cannot go from CREATED \(version 1\) to PAID \(version 3\)"
    ) as refused:
        await connection.execute(
            "UPDATE orders SET state = 'PAID', version = 3, entered_at = array_fill(now(), ARRAY[3]) WHERE id = $1", order_id
        )
    assert refused.value.constraint_name == "orders_legal_transition"
    assert "PAYMENT_PENDING" in (refused.value.hint or "")


async def test_a_declined_order_never_goes_back(connection: asyncpg.Connection) -> None:
    order_id = await insert(connection, "FAILED", 3, "declined")
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(
            "UPDATE orders SET state = 'PAYMENT_PENDING', version = 4, failure = NULL, entered_at = entered_at || now()"
            " WHERE id = $1",
            order_id,
        )


async def test_a_version_rises_by_one_or_not_at_all(connection: asyncpg.Connection) -> None:
    order_id = await insert(connection, "CREATED", 1)
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute("UPDATE orders SET version = 2, entered_at = entered_at || now() WHERE id = $1", order_id)


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO outbox (event_type, aggregate_id, attempt) VALUES ('X', gen_random_uuid(), 0)",
        "INSERT INTO outbox (event_type, aggregate_id, attempt, first_attempt) VALUES ('X', gen_random_uuid(), 2, 3)",
        "INSERT INTO dead_letter_events (event_id, reason, discarded_at) VALUES (gen_random_uuid(), 'x', now())",
        "INSERT INTO dead_letter_events (event_id, reason, discard_reason) VALUES (gen_random_uuid(), 'x', 'y')",
        "INSERT INTO idempotency_keys (key, request_hash, order_id) VALUES ('', '', gen_random_uuid())",
        "INSERT INTO idempotency_keys (key, request_hash, order_id) VALUES (repeat('k', 256), '', gen_random_uuid())",
        "INSERT INTO gateway_charges VALUES (gen_random_uuid(), 'k', gen_random_uuid(), 1, 'perhaps')",
        "UPDATE gateway_control SET mode = 'generous'",
        "INSERT INTO gateway_control (only_row, mode) VALUES (false, 'random')",
    ],
)
async def test_other_rows_that_cannot_be(connection: asyncpg.Connection, sql: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(sql)


async def test_one_charge_a_key_and_one_gateway_mode(connection: asyncpg.Connection) -> None:
    charge = "INSERT INTO gateway_charges VALUES (gen_random_uuid(), 'k', gen_random_uuid(), 1, 'settled')"
    await connection.execute(charge)
    with pytest.raises(asyncpg.UniqueViolationError):
        async with connection.transaction():
            await connection.execute(charge)
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute("INSERT INTO gateway_control (mode) VALUES ('hang')")


CONTRACT = {
    "orders": {
        "id": "uuid", "user_id": "uuid", "state": "text", "version": "integer", "amount": "numeric",
        "created_at": "timestamp with time zone", "updated_at": "timestamp with time zone",
    },
    "outbox": {
        "event_id": "uuid", "event_type": "text", "aggregate_type": "text", "aggregate_id": "uuid", "payload": "jsonb",
        "created_at": "timestamp with time zone", "published_at": "timestamp with time zone",
    },
    "processed_events": {"event_id": "uuid", "worker_id": "text", "processed_at": "timestamp with time zone"},
    "dead_letter_events": {
        "event_id": "uuid", "event_type": "text", "aggregate_id": "uuid", "payload": "jsonb", "reason": "text",
        "failed_at": "timestamp with time zone",
    },
}  # fmt: skip


@pytest.mark.parametrize("table", CONTRACT)
async def test_the_columns_that_others_read(connection: asyncpg.Connection, table: str) -> None:
    rows = await connection.fetch("SELECT column_name, data_type FROM information_schema.columns WHERE table_name = $1", table)
    assert CONTRACT[table].items() <= dict(rows).items()


async def test_a_row_of_plain_sql_needs_no_column_of_ours(connection: asyncpg.Connection) -> None:
    row = await connection.fetchrow(
        "INSERT INTO outbox (event_id, event_type, aggregate_type, aggregate_id, payload, created_at)"
        " VALUES (gen_random_uuid(), 'Shipped', 'parcel', gen_random_uuid(), '{}', now()) RETURNING *"
    )
    assert (row["attempt"], row["first_attempt"], row["published_at"], row["available_at"]) == (1, 1, None, None)


async def test_shards_are_those_of_the_relay_and_about_even(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO outbox (event_type, aggregate_id) SELECT 'X', gen_random_uuid() FROM generate_series(1, 4000)"
    )
    counts = dict(await connection.fetch("SELECT shard, count(*) FROM outbox GROUP BY shard"))
    assert sorted(counts) == list(range(SHARDS))
    assert min(counts.values()) > 4000 / SHARDS / 2


async def test_schema_sql_is_safe_to_run_twice_and_changes_no_row(connection: asyncpg.Connection) -> None:
    order_id = await insert(connection, "CREATED", 1)
    await connection.execute("UPDATE gateway_control SET mode = 'hang'")
    before = await fingerprint(connection)
    await connection.execute(schema_sql())
    await connection.execute(schema_sql())
    assert await fingerprint(connection) == before
    assert await connection.fetchval("SELECT mode FROM gateway_control") == "hang"
    assert await connection.fetchval("SELECT state FROM orders WHERE id = $1", order_id) == "CREATED"


async def fingerprint(connection: asyncpg.Connection) -> list[tuple[str, ...]]:
    """Every constraint, index, trigger and function of ours, with its definition."""
    rows = await connection.fetch("""
        SELECT 'constraint' AS kind, conname::text AS name, pg_get_constraintdef(oid) AS text FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace
        UNION ALL SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL SELECT 'function', proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        ORDER BY 1, 2, 3""")
    return [tuple(row) for row in rows]


async def test_a_statement_of_many_rows_notifies_once(database_url: str) -> None:
    listener = await asyncpg.connect(database_url, timeout=10)
    connection = await asyncpg.connect(database_url, timeout=10)
    heard: list[str] = []
    try:
        await listener.add_listener("orderflow_outbox", lambda *arguments: heard.append(arguments[3]))
        await connection.execute(
            "INSERT INTO outbox (event_type, aggregate_id) SELECT 'X', gen_random_uuid() FROM generate_series(1, 500)"
        )
        # Notifications arrive in the order of commits: when this one is there, all before it are.
        await connection.execute("NOTIFY orderflow_outbox, 'last'")
        while "last" not in heard:
            await listener.execute("SELECT 1")
    finally:
        await listener.close()
        await connection.close()
    assert heard == ["", "last"]
