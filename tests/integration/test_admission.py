"""Admission by the age of the backlog: what counts as backlog, what is answered all the same, and when it ends."""

from __future__ import annotations

import asyncpg

from orderflow.orders.admission import PAGE, Admission
from tests.pipeline import opened, watching
from tests.rows import place
from tests.serving import Answer, serving
from tests.waiting import eventually

LIMIT = 300.0


async def waits_for(connection: asyncpg.Connection, seconds: float, orders: int = 1) -> list[str]:
    """Place orders as of that long ago; their ids."""
    placed = [order_id for order_id, _ in await place(connection, orders)]
    await connection.execute(
        "UPDATE orders SET created_at = now() - make_interval(secs => $2) WHERE id = ANY($1)", placed, seconds
    )
    return [str(order_id) for order_id in placed]


async def moves_on(connection: asyncpg.Connection) -> None:
    """A worker takes every order up."""
    await connection.execute(
        "UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, entered_at = entered_at || now() WHERE state = 'CREATED'"
    )


def refused(answer: Answer) -> bool:
    assert (answer.status, answer.headers["Retry-After"]) == (429, "5"), answer
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.body["type"] == "urn:orderflow:problem:backlogged"
    return True


async def test_new_orders_are_refused_and_everything_else_is_answered(
    connection: asyncpg.Connection, database_url: str
) -> None:
    async with serving(database_url) as api:
        first = await api.place(key="early")
    (oldest,) = await waits_for(connection, LIMIT + 60)
    async with serving(database_url) as api:
        await eventually(lambda: any(event == "ORDERS_REFUSED" for _, event, _ in api.facts), what="it has looked")
        before = await connection.fetchval("SELECT count(*) FROM orders")
        assert refused(await api.place())
        assert refused(await api.place(key="late"))
        assert (await api.ask("GET", f"/orders/{oldest}")).body["state"] == "CREATED"
        assert (await api.ask("GET", "/orders")).status == 200
        assert api.health.ready
        again = await api.place(key="early")
        assert (again.status, again.headers["Idempotency-Replayed"], again.raw) == (201, "true", first.raw)
        assert (await api.place("11.00", key="early")).status == 422
        assert await connection.fetchval("SELECT count(*) FROM orders") == before
        # As soon as it is worked off.
        await moves_on(connection)
        await eventually(lambda: any(event == "ORDERS_ACCEPTED" for _, event, _ in api.facts), what="it has looked again")
        assert (await api.place()).status == 201
        placed = await api.place(key="late")
        assert (placed.status, placed.headers.get("Idempotency-Replayed")) == (201, None)


async def test_an_outage_that_is_shorter_than_the_limit_refuses_nobody(
    connection: asyncpg.Connection, database_url: str
) -> None:
    await waits_for(connection, LIMIT - 60, orders=3)
    async with serving(database_url) as api:
        await eventually(lambda: any(fields.get("seconds", 0) > 200 for _, _, fields in api.facts), what="it has looked")
        assert (await api.place()).status == 201


async def test_off_nothing_is_asked_and_nobody_is_refused(connection: asyncpg.Connection, database_url: str) -> None:
    await waits_for(connection, 86_400)
    async with serving(database_url, max_backlog_age_seconds=0) as api:
        for _ in range(3):
            assert (await api.place()).status == 201
        assert not [event for _, event, _ in api.facts if event == "BACKLOG_SEEN"]


async def test_an_idle_process_asks_nothing(connection: asyncpg.Connection, database_url: str) -> None:
    async with serving(database_url) as api:
        admission = api.api.admission
        await eventually(lambda: not admission.news, what="it has looked")
        assert (await api.place()).status == 201
        await eventually(lambda: admission.age > 0, what="the order is seen")
        await moves_on(connection)
        await eventually(lambda: not admission.age, what="nothing waits any more")
        assert not admission.news


async def test_what_will_never_be_worked_off_closes_no_shop(connection: asyncpg.Connection, database_url: str) -> None:
    old = LIMIT + 100
    # Never had an event; buried; processed by somebody's hand; an unknown outcome, which waits for the gateway alone.
    await waits_for(connection, old, orders=PAGE + 50)
    await connection.execute("DELETE FROM outbox")
    buried, processed, unknown = await place(connection, 3)
    await connection.execute("UPDATE outbox SET available_at = 'infinity' WHERE event_id = $1", buried.event_id)
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", processed.event_id)
    await connection.execute(
        "UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, entered_at = entered_at || now() WHERE id = $1",
        unknown.order_id,
    )
    await connection.execute("UPDATE orders SET created_at = now() - make_interval(secs => $1)", old)
    async with opened(database_url, by_index=True) as database:
        admission = Admission(LIMIT)
        for _ in range(3):
            await admission.run_once(database)
            assert (admission.refusing, admission.age) == (False, 0.0)
        # Among all of these, one that waits is found.
        await waits_for(connection, LIMIT + 50)
        admission = Admission(LIMIT)
        for _ in range(3):
            await admission.run_once(database)
        assert admission.refusing


async def test_it_ends_a_little_below_the_limit_and_is_told_once(connection: asyncpg.Connection, database_url: str) -> None:
    with watching() as facts:
        async with opened(database_url, by_index=True) as database:
            admission = Admission(LIMIT)
            for age, refusing in ((LIMIT - 5, False), (LIMIT + 5, True), (LIMIT - 5, True), (LIMIT * 0.8, False)):
                await moves_on(connection)
                await waits_for(connection, age)
                # Each order is older than what was found before: a view that begins anew.
                admission._after = None
                await admission.run_once(database)
                assert admission.refusing is refusing, age
    assert len(facts.of("ORDERS_REFUSED")) == len(facts.of("ORDERS_ACCEPTED")) == 1


async def test_the_oldest_is_found_from_where_the_last_look_ended(connection: asyncpg.Connection, database_url: str) -> None:
    async with opened(database_url, by_index=True) as database:
        admission = Admission(LIMIT)
        for age in (200, 100):
            await waits_for(connection, age)
        ages = []
        for _ in range(3):
            await admission.run_once(database)
            ages.append(admission.age)
            await connection.execute(
                "UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, entered_at = entered_at || now()"
                " WHERE id = (SELECT id FROM orders WHERE state = 'CREATED' ORDER BY created_at LIMIT 1)"
            )
        assert 200 <= ages[0] < 300
        assert 100 <= ages[1] < 200
        assert ages[2] == 0.0
        await place(connection)
        await admission.run_once(database)
        assert 0.0 < admission.age < 60
