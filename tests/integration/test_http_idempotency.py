"""Idempotency keys over HTTP: replays, conflicts, fifty at once, two processes' worth of services, and a day later."""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import uuid4

import asyncpg

from tests.serving import Answer, serving
from tests.waiting import eventually

REUSED = "Idempotency-Key: was used with another body; nothing was placed"
IN_USE = "Idempotency-Key: belongs to a request that is still in work"


async def counts(connection: asyncpg.Connection) -> tuple[int, int, int]:
    """Rows in orders, outbox, idempotency_keys."""
    row = await connection.fetchrow(
        "SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM outbox), (SELECT count(*) FROM idempotency_keys)"
    )
    return tuple(row or ())


def replayed(answer: Answer) -> bool:
    return answer.headers.get("Idempotency-Replayed") == "true"


async def test_the_same_key_and_body_give_the_very_same_answer(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        first = await api.place("10.00", key='"abc-1"')
        assert (first.status, replayed(first)) == (201, False)
        await connection.execute(
            "UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, entered_at = entered_at || now(), updated_at = now()"
        )
        for amount, key in (("10.00", '"abc-1"'), ("10.00", "abc-1"), (10, "abc-1"), ("10", "  abc-1 "), ("10.0", "abc-1")):
            again = await api.place(amount, key=key)
            assert (again.status, replayed(again), again.raw) == (201, True, first.raw)
            assert again.headers["Location"] == first.headers["Location"]
        for other in (await api.place("10.01", key="abc-1"), await api.place("10.00", key="abc-1", user=uuid4())):
            assert (other.status, other.body["detail"]) == (422, REUSED)
            assert other.body["errors"] == [{"field": "Idempotency-Key", "message": REUSED.partition(": ")[2]}]
        assert (await api.place("10.01", key="ABC-1")).status == 201
        assert await counts(connection) == (2, 2, 2)


async def test_a_refused_request_does_not_use_its_key_up(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        assert (await api.place("0", key="k")).status == 422
        assert (await api.place("10", key="k")).status == 201
        assert await counts(connection) == (1, 1, 1)


async def test_fifty_requests_at_once_make_one_order(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        answers = await asyncio.gather(*(api.place(key="fifty") for _ in range(50)))
        assert {answer.status for answer in answers} <= {201, 409}
        placed = [answer for answer in answers if answer.status == 201]
        assert len({answer.raw for answer in placed}) == 1
        assert sum(not replayed(answer) for answer in placed) == 1
        for refused in (answer for answer in answers if answer.status == 409):
            assert refused.body["detail"] == IN_USE
            assert refused.headers["Retry-After"] == "1"
        later = await api.place(key="fifty")
        assert (later.status, later.raw, replayed(later)) == (201, placed[0].raw, True)
        assert await counts(connection) == (1, 1, 1)


async def test_a_key_in_work_is_refused_at_once(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        async with connection.transaction():
            await connection.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            first = asyncio.create_task(api.place(key="k"))
            await eventually(lambda: _waits(connection), what="the order waits for the lock")
            async with asyncio.timeout(2):
                second = await api.place("99.00", key="k")
            assert (second.status, second.body["detail"]) == (409, IN_USE)
            assert not first.done()
        assert (await first).status == 201
        assert (await api.place("99.00", key="k")).body["detail"] == REUSED
        assert await counts(connection) == (1, 1, 1)


async def test_two_services_on_one_database_make_one_order(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as one, serving(database_url) as two:
        for round_ in range(5):
            answers = await asyncio.gather(*(api.place(key=f"both-{round_}") for _ in range(25) for api in (one, two)))
            assert {answer.status for answer in answers} <= {201, 409}
            placed = [answer for answer in answers if answer.status == 201]
            assert len({answer.raw for answer in placed}) == 1
            assert sum(not replayed(answer) for answer in placed) == 1
            later = await two.place(key=f"both-{round_}")
            assert (later.status, later.raw, replayed(later)) == (201, placed[0].raw, True)
        assert await counts(connection) == (5, 5, 5)


async def test_two_services_with_different_bodies_place_one_of_them(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as one, serving(database_url) as two:
        for round_ in range(10):
            pair = await asyncio.gather(one.place("1.00", key=f"race-{round_}"), two.place("2.00", key=f"race-{round_}"))
            assert Counter(answer.status for answer in pair) == {201: 1, 422: 1}
            assert [answer.body["detail"] for answer in pair if answer.status == 422] == [REUSED]
        assert await counts(connection) == (10, 10, 10)


async def test_a_key_that_another_process_has_not_committed_is_waited_for(
    database_url: str, connection: asyncpg.Connection
) -> None:
    """The INSERT waits for the other transaction, then finds its order, or its absence."""
    other = await asyncpg.connect(database_url)
    try:
        async with serving(database_url) as api:
            for key, end in (("committed", "COMMIT"), ("rolled-back", "ROLLBACK")):
                await other.execute("BEGIN")
                await other.execute(
                    "INSERT INTO idempotency_keys (key, request_hash, order_id) VALUES ($1, '\\x00', gen_random_uuid())", key
                )
                waiting = asyncio.create_task(api.place(key=key))
                await eventually(lambda: _waits(connection), what="the INSERT waits for the key")
                await other.execute(end)
                answer = await waiting
                assert answer.status == (422 if end == "COMMIT" else 201)
        assert await counts(connection) == (1, 1, 2)
    finally:
        await other.close()


async def test_many_keys_in_opposite_orders_do_not_deadlock(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as one, serving(database_url) as two:
        keys = [f"key-{number}" for number in range(80)]
        answers = await asyncio.gather(*(one.place(key=key) for key in keys), *(two.place(key=key) for key in reversed(keys)))
        assert {answer.status for answer in answers} == {201}
        assert sum(replayed(answer) for answer in answers) == 80
        assert await counts(connection) == (80, 80, 80)


async def test_a_key_lives_for_a_day(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        first = await api.place("10.00", key="k")
        await connection.execute("UPDATE idempotency_keys SET created_at = now() - interval '23 hours 59 minutes'")
        assert replayed(await api.place("10.00", key="k"))
        assert (await api.place("11.00", key="k")).status == 422
        await connection.execute("UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 second'")
        second = await api.place("11.00", key="k")
        assert (second.status, replayed(second)) == (201, False)
        assert second.body["orderId"] != first.body["orderId"]
        third = await api.place("11.00", key="k")
        assert (third.raw, replayed(third)) == (second.raw, True)
        assert (await api.place("10.00", key="k")).status == 422
        assert await counts(connection) == (2, 2, 1)


async def _waits(connection: asyncpg.Connection) -> bool:
    return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))
