"""The orders' SQL against a real PostgreSQL: placing in groups, keys, paging, and the state machine's second home."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import asyncpg
import orjson
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orderflow.engine.handoff import Handoff
from orderflow.engine.ids import new_id
from orderflow.engine.postgres import Database
from orderflow.orders import store
from orderflow.orders.idempotency import request_hash
from orderflow.orders.model import Failure, IllegalTransition, State, may_go, path_to
from orderflow.orders.service import OrderService
from orderflow.orders.store import KeyReused, NewOrder, Placed

USER = uuid4()
TEN = Decimal("10.00")


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, size=4, timeout=5.0)
    yield opened
    await opened.close()


def new_order(amount: Decimal = TEN, key: str | None = None) -> NewOrder:
    return NewOrder(new_id(), new_id(), USER, amount, key, request_hash(USER, amount) if key else None)


async def counts(connection: asyncpg.Connection) -> tuple[int, int, int]:
    """Rows in orders, outbox, idempotency_keys."""
    row = await connection.fetchrow(
        "SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM outbox), (SELECT count(*) FROM idempotency_keys)"
    )
    assert row is not None
    return tuple(row)


async def insert(connection: asyncpg.Connection, state: State, version: int, failure: Failure | None) -> Any:
    return await connection.fetchval(
        "INSERT INTO orders (id, user_id, state, version, amount, failure, entered_at) "
        "VALUES (gen_random_uuid(), gen_random_uuid(), $1, $2, 1, $3, array_fill(now(), ARRAY[$2::integer])) RETURNING id",
        state, version, failure,
    )  # fmt: skip


async def move(connection: asyncpg.Connection, order_id: Any, new: State, version: int, failure: Failure | None) -> bool:
    """Whether the database lets the order go there; a row that breaks another rule is an error of the test."""
    try:
        async with connection.transaction():
            await connection.execute(
                "UPDATE orders SET state = $2, version = $3, failure = $4, "
                "entered_at = array_fill(now(), ARRAY[$3::integer]) WHERE id = $1",
                order_id, new, version, failure,
            )  # fmt: skip
    except asyncpg.CheckViolationError as error:
        if error.constraint_name != "orders_legal_transition":
            raise
        return False
    return True


def reasons(state: State) -> tuple[Failure | None, ...]:
    return tuple(Failure) if state is State.FAILED else (None,)


async def test_model_and_database_agree_on_every_transition(connection: asyncpg.Connection) -> None:
    legal = 0
    for old, version in itertools.product(State, range(1, 7)):
        try:
            path_to(old, version)
        except IllegalTransition:
            continue
        for failure, new, step in itertools.product(reasons(old), State, (-1, 0, 1, 2)):
            if (new, step) == (old, 0) or version + step < 1:
                continue
            order_id = await insert(connection, old, version, failure)
            expected = may_go(old, new, failure) and step == 1
            moved = await move(connection, order_id, new, version + step, reasons(new)[0])
            assert moved == expected, f"{old} ({version}, {failure}) -> {new} ({version + step})"
            legal += moved
    assert legal == 2 + 2 * 5 + 5  # from CREATED, from PENDING and from FAILED by error, versions 2 to 6 each


@pytest.mark.parametrize(
    ("state", "version", "failure", "amount"),
    [
        ("NEW", 1, None, "1"), ("", 1, None, "1"), ("CREATED", 0, None, "1"), ("CREATED", -1, None, "1"),
        ("CREATED", 2, None, "1"), ("PAYMENT_PENDING", 1, None, "1"), ("PAID", 1, None, "1"), ("PAID", 2, None, "1"),
        ("FAILED", 1, "error", "1"), ("PAID", 3, "error", "1"), ("FAILED", 2, "boredom", "1"),
        ("CREATED", 1, None, "0"), ("CREATED", 1, None, "-0.01"),
    ],
)  # fmt: skip
async def test_the_database_refuses_what_no_order_can_be(
    connection: asyncpg.Connection, state: str, version: int, failure: str | None, amount: str
) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(
            "INSERT INTO orders (id, user_id, state, version, amount, failure, entered_at) "
            "VALUES (gen_random_uuid(), gen_random_uuid(), $1, $2, $4, $3, array_fill(now(), ARRAY[greatest($2, 0)]))",
            state, version, failure, Decimal(amount),
        )  # fmt: skip


async def test_legal_transitions_by_plain_sql_are_completed(connection: asyncpg.Connection) -> None:
    new = """
        INSERT INTO orders (id, user_id, state, version, amount)
        VALUES (gen_random_uuid(), gen_random_uuid(), $1, $2, 1) RETURNING id
    """
    move = "UPDATE orders SET state = $2, version = version + 1 WHERE id = $1"
    order_id = await connection.fetchval(new, "CREATED", 1)
    for state in ("PAYMENT_PENDING", "FAILED"):
        await connection.execute(move, order_id, state)
    look = "SELECT version, failure, cardinality(entered_at) FROM orders WHERE id = $1"
    row = await connection.fetchrow(look, order_id)
    assert tuple(row) == (3, None, 3)
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(move, order_id, "PAYMENT_PENDING")  # why it failed is not known: nothing to redrive
    await connection.execute("UPDATE orders SET failure = 'error' WHERE id = $1", order_id)
    await connection.execute(move, order_id, "PAYMENT_PENDING")
    row = await connection.fetchrow(look, order_id)
    assert tuple(row) == (4, None, 4)
    for state, version in (("PAYMENT_PENDING", 2), ("PAID", 3), ("FAILED", 2)):
        await connection.fetchval(new, state, version)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(State), st.sampled_from(Failure), st.integers(-1, 2)), max_size=10))
async def test_model_and_database_walk_together(
    connection: asyncpg.Connection, wishes: list[tuple[State, Failure, int]]
) -> None:
    order_id = await insert(connection, State.CREATED, 1, None)
    state, version, failure = State.CREATED, 1, None
    for new, why, step in wishes:
        reason = why if new is State.FAILED else None
        if (new, step) == (state, 0):
            continue
        moved = await move(connection, order_id, new, version + step, reason) if version + step >= 1 else False
        assert moved == (may_go(state, new, failure) and step == 1)
        if moved:
            state, version, failure = new, version + 1, reason
    stored = await connection.fetchrow("SELECT state, version, failure FROM orders WHERE id = $1", order_id)
    assert tuple(stored or ()) == (state, version, failure)


async def test_an_order_and_its_event_are_written_together(database: Database, connection: asyncpg.Connection) -> None:
    order = NewOrder(new_id(), new_id(), USER, Decimal("299.90"), headers='{"traceparent": "x"}')
    [placed] = await store.place(database, [order])
    assert isinstance(placed, Placed)
    assert not placed.replayed
    event = await connection.fetchrow("SELECT * FROM outbox")
    assert event is not None
    assert (event["event_id"], event["event_type"], event["aggregate_type"]) == (order.event_id, "OrderCreated", "order")
    assert (event["aggregate_id"], event["published_at"], event["attempt"]) == (order.order_id, None, 1)
    assert orjson.loads(event["payload"]) == {"orderId": str(order.order_id), "userId": str(USER), "amount": "299.90"}
    assert orjson.loads(event["headers"]) == {"traceparent": "x"}
    assert event["created_at"] == placed.created_at
    stored = await store.get(database, order.order_id)
    assert stored is not None
    assert (stored.state, stored.version, stored.amount, stored.entered_at) == (
        State.CREATED,
        1,
        order.amount,
        [placed.created_at],
    )


async def test_an_order_whose_event_cannot_be_written_is_not_placed(database: Database, connection: asyncpg.Connection) -> None:
    await connection.execute("ALTER TABLE outbox ADD CONSTRAINT nothing_new CHECK (false)")
    for order in (new_order(), new_order(key="k")):
        with pytest.raises(asyncpg.CheckViolationError, match="nothing_new"):
            await store.place(database, [order])
    assert await counts(connection) == (0, 0, 0)


async def test_placing_the_same_rows_again_changes_nothing(database: Database, connection: asyncpg.Connection) -> None:
    orders = [new_order(), new_order(key="k"), new_order()]
    first = await store.place(database, orders)
    assert await store.place(database, orders) == first
    mixed = await store.place(database, [*orders, new_order()])
    assert mixed[:3] == first
    assert await counts(connection) == (4, 4, 1)


async def test_a_key_gives_the_first_order_again_and_refuses_another_body(
    database: Database, connection: asyncpg.Connection
) -> None:
    first = new_order(key="k")
    [placed] = await store.place(database, [first])
    again, other, fresh = await store.place(
        database, [new_order(key="k"), new_order(Decimal("11.00"), key="other"), new_order()]
    )
    assert isinstance(placed, Placed)
    assert again == Placed(first.order_id, USER, TEN, placed.created_at, replayed=True)
    assert isinstance(other, Placed)
    assert isinstance(fresh, Placed)
    assert await store.place(database, [new_order(Decimal("10.01"), key="k")]) == [KeyReused()]
    assert await counts(connection) == (3, 3, 2)


async def test_a_key_is_forgotten_after_a_day(database: Database, connection: asyncpg.Connection) -> None:
    await store.place(database, [new_order(key="k")])

    async def aged(age: timedelta) -> Placed | KeyReused:
        await connection.execute("UPDATE idempotency_keys SET created_at = now() - $1::interval", age)
        return (await store.place(database, [new_order(Decimal("11.00"), key="k")]))[0]

    assert await aged(timedelta(hours=23, minutes=59)) == KeyReused()
    fresh = await aged(timedelta(hours=24, seconds=1))
    assert isinstance(fresh, Placed)
    assert not fresh.replayed
    [again] = await store.place(database, [new_order(Decimal("11.00"), key="k")])
    assert again == Placed(fresh.order_id, USER, fresh.amount, fresh.created_at, replayed=True)
    assert await counts(connection) == (2, 2, 1)


async def test_a_bad_row_is_seen_by_its_own_caller_only(database: Database, connection: asyncpg.Connection) -> None:
    handoff = Handoff()
    service = OrderService(database, batch_size=50, batches_in_flight=1, handoff=handoff)
    amounts = [TEN] * 12 + [Decimal("0.00")] + [TEN] * 7 + [Decimal("-1.00")] + [TEN] * 9
    results = await asyncio.gather(*(service.place(USER, amount) for amount in amounts), return_exceptions=True)
    bad = [index for index, result in enumerate(results) if isinstance(result, BaseException)]
    assert bad == [12, 20]
    assert all(isinstance(results[index], asyncpg.CheckViolationError) for index in bad)
    assert await counts(connection) == (28, 28, 0)
    assert handoff.woken.is_set()
    await service.close()


async def test_the_newest_come_page_by_page_by_an_index(database: Database, connection: asyncpg.Connection) -> None:
    await store.place(database, [new_order() for _ in range(300)])
    await connection.execute("ANALYZE orders")
    seen = []
    after = None
    while page := await store.newest(database, state=None, limit=70, after=after):
        seen += [order.id for order in page]
        after = (page[-1].created_at, page[-1].id)
    expected = await connection.fetch("SELECT id FROM orders ORDER BY created_at DESC, id DESC")
    assert seen == [row["id"] for row in expected]
    assert len(await store.newest(database, state=State.CREATED, limit=500, after=None)) == 300
    assert await store.newest(database, state=State.PAID, limit=500, after=None) == []
    # A generic plan must not lose the keyset condition: it is what a prepared statement ends up with.
    await connection.execute("SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_sort = off")
    plan = await connection.fetch(
        "EXPLAIN (ANALYZE, TIMING OFF, COSTS OFF, SUMMARY OFF) SELECT id FROM orders WHERE (created_at, id) < ($2, $3) "
        "ORDER BY created_at DESC, id DESC LIMIT $1", 10, *(after or ()),
    )  # fmt: skip
    assert any("Index Cond" in row[0] for row in plan), plan


async def test_the_timeline_tells_what_became_of_each_event(database: Database, connection: asyncpg.Connection) -> None:
    order = new_order()
    await store.place(database, [order])
    await connection.execute("UPDATE outbox SET published_at = now()")
    await connection.execute("INSERT INTO processed_events (event_id, worker_id) VALUES ($1, 'w')", order.event_id)
    paid = await connection.fetchval(
        "INSERT INTO outbox (event_type, aggregate_id, available_at) VALUES ('OrderPaid', $1, 'infinity') RETURNING event_id",
        order.order_id,
    )
    await connection.execute("INSERT INTO dead_letter_events (event_id, reason) VALUES ($1, 'because')", paid)
    created, buried = await store.timeline(database, order.order_id)
    assert created["worker_id"] == "w"
    assert created["processed_at"] > created["created_at"]
    assert (buried["event_id"], buried["reason"], buried["published_at"]) == (paid, "because", None)
    assert buried["buried_at"] is not None
