"""The continuous auditor: finds what is wrong with old orders, tells it once, and leaves work under way alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import pytest

from orderflow import auditor as auditor_module
from orderflow.auditor import Auditor
from orderflow.engine.postgres import close_connection, connect
from orderflow.health import Health
from tests.old import backdate, finished
from tests.pipeline import running, watching
from tests.rows import place
from tests.serving import serving
from tests.waiting import eventually

HOUR = 1 / 24


@asynccontextmanager
async def session(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A session for an auditor's turns, as `run` opens it."""
    opened = await connect(url, timeout=10.0, application="orderflow auditor")
    try:
        await opened.execute("SET enable_seqscan = off")
        yield opened
    finally:
        await close_connection(opened)


async def charge_again(connection: asyncpg.Connection, order_id: UUID) -> None:
    await connection.execute(
        "INSERT INTO gateway_charges SELECT gen_random_uuid(), gen_random_uuid()::text, id, amount, 'settled', now()"
        " FROM orders WHERE id = $1",
        order_id,
    )


async def test_a_sound_history_is_looked_at_and_nothing_is_told(connection: asyncpg.Connection, database_url: str) -> None:
    await finished(connection, database_url, 3)
    await finished(connection, database_url, 2, "decline")
    await finished(connection, database_url, 1, "error")
    await backdate(connection, HOUR)
    health = Health()
    auditor = Auditor(database_url, health)
    async with session(database_url) as own:
        with watching() as facts:
            assert await auditor.run_once(own) == 0
    assert facts.of("AUDIT_VIOLATION") == []
    nothing = {"I1": 0, "I2": 0, "I3": 0, "I4": 0, "I5": 0, "I6": 0}
    assert facts.of("AUDITED") == [{"orders": 6, "violations": nothing}]
    shown = health.snapshot()["audit"]
    assert (shown["violations"], shown["byInvariant"], shown["orders"]) == (0, nothing, 6)


async def test_a_violation_is_told_once_until_it_is_gone(connection: asyncpg.Connection, database_url: str) -> None:
    ((wrong, _), _) = await finished(connection, database_url, 2)
    await backdate(connection, HOUR)
    await charge_again(connection, wrong)
    health = Health()
    auditor = Auditor(database_url, health)
    async with session(database_url) as own:
        with watching() as facts:
            for _ in range(3):
                assert await auditor.run_once(own) == 1
            assert [(fact["invariant"], fact["orderId"]) for fact in facts.of("AUDIT_VIOLATION")] == [("I3", wrong)]
            assert "PAID with 2 settled charges" in facts.of("AUDIT_VIOLATION")[0]["violation"]
            assert health.snapshot()["audit"]["byInvariant"]["I3"] == 1
            await connection.execute(
                "DELETE FROM gateway_charges WHERE created_at = (SELECT max(created_at) FROM gateway_charges)"
            )
            assert await auditor.run_once(own) == 0
            await charge_again(connection, wrong)
            assert await auditor.run_once(own) == 1
            assert len(facts.of("AUDIT_VIOLATION")) == 2


BROKEN = {
    "I1": "DELETE FROM outbox WHERE event_type = 'OrderCreated'",
    "I2": "DELETE FROM outbox WHERE event_type = 'OrderPaid'",
    "I3": "DELETE FROM gateway_charges",
    "I4": "UPDATE outbox SET published_at = NULL WHERE event_type = 'OrderPaid'; UPDATE outbox SET available_at = created_at"
    " WHERE published_at IS NULL",
    "I5": "DELETE FROM processed_events WHERE event_id IN (SELECT event_id FROM outbox WHERE event_type = 'OrderPaid')",
}


@pytest.mark.parametrize("invariant", BROKEN)
async def test_every_invariant_of_a_terminal_order(connection: asyncpg.Connection, database_url: str, invariant: str) -> None:
    await finished(connection, database_url)
    await backdate(connection, HOUR)
    await connection.execute(BROKEN[invariant])
    auditor = Auditor(database_url, Health())
    async with session(database_url) as own:
        with watching() as facts:
            assert await auditor.run_once(own) == 1
    assert [fact["invariant"] for fact in facts.of("AUDIT_VIOLATION")] == [invariant]


async def test_what_is_young_or_in_flight_is_not_judged(connection: asyncpg.Connection, database_url: str) -> None:
    await finished(connection, database_url)
    ((in_flight, _),) = await place(connection)
    # Nothing of either fits, and the one in flight was placed an hour ago and is on its way again since now.
    await connection.execute("DELETE FROM outbox; DELETE FROM gateway_charges")
    await connection.execute(
        "UPDATE orders SET created_at = now() - interval '1 hour', state = 'PAYMENT_PENDING', version = 2 WHERE id = $1",
        in_flight,
    )
    auditor = Auditor(database_url, Health(), horizon=1800.0)
    async with session(database_url) as own:
        with watching() as facts:
            assert await auditor.run_once(own) == 1
    assert [fact["invariant"] for fact in facts.of("AUDIT_VIOLATION", orderId=in_flight)] == ["I6"]
    assert len(facts.of("AUDIT_VIOLATION")) == 1


async def test_an_order_that_never_ends_is_i6_and_nothing_else(connection: asyncpg.Connection, database_url: str) -> None:
    ((stuck, _),) = await place(connection)
    await backdate(connection, HOUR)
    auditor = Auditor(database_url, Health())
    async with session(database_url) as own:
        with watching() as facts:
            assert await auditor.run_once(own) == 1
            assert [(fact["invariant"], fact["orderId"]) for fact in facts.of("AUDIT_VIOLATION")] == [("I6", stuck)]
            await connection.execute("DELETE FROM orders")
            assert await auditor.run_once(own) == 0


async def test_the_patrol_comes_to_the_oldest_and_begins_again(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor_module, "WINDOW", 2)
    placed = await finished(connection, database_url, 9)
    await backdate(connection, HOUR)
    # All of one moment: the id decides between them.
    auditor = Auditor(database_url, Health())
    async with session(database_url) as own:
        await auditor.run_once(own)
        for order_id, _ in placed:
            await charge_again(connection, order_id)
        turns = 0
        while await auditor.run_once(own) < 9:
            turns += 1
            assert turns < 20


async def test_of_more_than_a_window_the_newest_are_looked_at_first(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor_module, "WINDOW", 2)
    auditor = Auditor(database_url, Health())
    await finished(connection, database_url, 5)
    await backdate(connection, HOUR)
    async with session(database_url) as own:
        await auditor.run_once(own)
        ((newest, _),) = await finished(connection, database_url)
        await charge_again(connection, newest)
        await backdate(connection, HOUR / 2)
        assert await auditor.run_once(own) == 1


async def test_one_process_is_elected_and_another_takes_its_place(connection: asyncpg.Connection, database_url: str) -> None:
    ((wrong, _),) = await finished(connection, database_url)
    await backdate(connection, HOUR)
    await charge_again(connection, wrong)
    first, second = Auditor(database_url, Health()), Auditor(database_url, Health())
    async with session(database_url) as other:
        async with session(database_url) as own:
            assert await first.run_once(own) == 1
            for _ in range(2):
                assert await second.run_once(other) == 0
                assert await connection.fetchval("SELECT orders FROM audit_result") == 1
        assert await eventually(lambda: second.run_once(other)) == 1
        # It has lost its session, and so its office, and shows no more what it knew.
        first._elected = False
        async with session(database_url) as own:
            with watching() as facts:
                assert await first.run_once(own) == 0
            assert facts.of("AUDITED")[0]["violations"]["I3"] == 0
        # What it has to say no more is not what is shown.
        assert await connection.fetchval("SELECT violations->'I3' FROM audit_result") == "1"


async def test_an_error_that_lasts_ends_a_turn_and_not_the_process(connection: asyncpg.Connection, database_url: str) -> None:
    await finished(connection, database_url)
    await backdate(connection, HOUR)
    await connection.execute("REVOKE SELECT ON gateway_charges FROM app_user")
    with watching() as facts:
        async with running(Auditor(database_url, Health())):
            failed = await facts.until("AUDIT_FAILED")
    assert "permission denied for table gateway_charges" in failed["error"]


async def test_what_other_programs_have_left_stops_nothing(connection: asyncpg.Connection, database_url: str) -> None:
    await connection.execute("""
        INSERT INTO orders (id, user_id, amount, state, version, created_at, updated_at, entered_at)
        SELECT gen_random_uuid(), gen_random_uuid(), 1, 'PAID', 3, t, t, ARRAY[t, t, t]
        FROM (VALUES ('-infinity'::timestamptz), ('0044-03-15 BC'), ('20000-01-01'), ('infinity')) AS v(t);
        INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload, published_at)
        SELECT 'OrderPaid', '', id, '[]', '-infinity' FROM orders""")
    auditor = Auditor(database_url, Health())
    async with session(database_url) as own:
        with watching() as facts:
            assert await auditor.run_once(own) > 0
            told = len(facts.of("AUDIT_VIOLATION"))
            for _ in range(3):
                await auditor.run_once(own)
            assert len(facts.of("AUDIT_VIOLATION")) == told


async def test_it_runs_as_a_service_and_readyz_shows_it_and_stays_ready(
    connection: asyncpg.Connection, database_url: str
) -> None:
    ((wrong, _),) = await finished(connection, database_url)
    await backdate(connection, HOUR)
    await charge_again(connection, wrong)
    async with serving(database_url) as api:
        with watching() as facts:
            async with running(Auditor(database_url, api.health)):
                await facts.until("AUDITED")
        ready = await api.ask("GET", "/readyz")
        assert ready.status == 200
        assert ready.body["audit"]["violations"] == 1
        assert ready.body["audit"]["byInvariant"]["I3"] == 1
        assert ready.body["audit"]["at"].endswith("Z")
        api.health.draining = True
        assert (await api.ask("GET", "/readyz")).body["audit"]["violations"] == 1


async def test_an_unknown_order_among_those_known_is_let_go(connection: asyncpg.Connection, database_url: str) -> None:
    ((wrong, _),) = await finished(connection, database_url)
    await backdate(connection, HOUR)
    await charge_again(connection, wrong)
    auditor = Auditor(database_url, Health())
    async with session(database_url) as own:
        assert await auditor.run_once(own) == 1
        await connection.execute("DELETE FROM outbox; DELETE FROM orders")
        assert await auditor.run_once(own) == 0
