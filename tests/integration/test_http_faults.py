"""The API when things fail: a full queue, no database, lost answers, callers that leave or dawdle. An error means no order."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from uuid import UUID

import asyncpg
import pytest

from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.orders import store
from tests.serving import USER, Answer, Served, Wire, serving
from tests.waiting import eventually

BODY = json.dumps({"userId": str(USER), "amount": "10.00"}).encode()


async def orders(connection: asyncpg.Connection) -> int:
    """The number of orders, after checking that each has its event."""
    placed, events = await connection.fetchrow("SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM outbox)") or (0, 1)
    assert placed == events
    return int(placed)


async def waits(connection: asyncpg.Connection, statements: int = 1) -> bool:
    return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") >= statements)


async def prepared(api: Served, connection: asyncpg.Connection) -> None:
    """Have the statements prepared, so that the next order is one message to PostgreSQL and one answer."""
    assert (await api.place()).status == 201
    assert (await api.place(key="prepared")).status == 201
    await connection.execute("TRUNCATE orders, outbox, idempotency_keys")


def head(length: int, *lines: str) -> bytes:
    return "\r\n".join(
        ("POST /orders HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", *lines, "", "")
    ).encode()


def unavailable(answer: Answer) -> bool:
    assert answer.status == 503, answer
    assert answer.headers["Retry-After"] == "1"
    assert answer.body["type"] == "urn:orderflow:problem:database-unavailable"
    return True


async def test_a_full_queue_is_429_and_places_nothing(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url, batch_size=1, batches_in_flight=1, http_queue=3) as api:
        async with connection.transaction():
            await connection.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            running = asyncio.create_task(api.place(key="running"))
            await eventually(lambda: waits(connection), what="one statement runs")
            crowd = [asyncio.create_task(api.place(key=f"crowd-{number}")) for number in range(10)]
            await eventually(lambda: sum(task.done() for task in crowd) == 7, what="seven are turned away")
            turned_away = [task.result() for task in crowd if task.done()]
            for answer in turned_away:
                assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
                assert answer.headers["Content-Type"] == "application/problem+json"
            assert api.health.ready
        answers = [await running, *await asyncio.gather(*crowd)]
        assert Counter(answer.status for answer in answers) == {201: 4, 429: 7}
        assert await orders(connection) == 4
        # What was turned away did not use its key up.
        again = [await api.place(key=f"crowd-{number}") for number in range(10)]
        assert Counter((answer.status, answer.headers.get("Idempotency-Replayed")) for answer in again) == {
            (201, "true"): 3, (201, None): 7
        }  # fmt: skip
        assert await orders(connection) == 11


async def test_without_a_database_it_is_503_and_no_order_appears_later(
    restartable_postgres: EmbeddedPostgres,
) -> None:
    url = restartable_postgres.url
    async with serving(url) as api:
        assert (await api.place()).status == 201
        await restartable_postgres.stop()
        answers = await asyncio.gather(
            *(api.place(key=f"key-{number}") for number in range(5)), *(api.place() for _ in range(5))
        )
        assert all(unavailable(answer) for answer in answers)
        assert all("nothing was placed" in answer.body["detail"] for answer in answers)
        assert unavailable(await api.ask("GET", "/orders"))
        assert unavailable(await api.ask("GET", f"/orders/{USER}"))
        ready = await api.ask("GET", "/readyz")
        assert (ready.status, ready.body["state"]) == (503, "unavailable")
        assert ready.body["dependencies"]["postgres"]["state"] == "down"
        assert (await api.ask("GET", "/livez")).status == 200
        await restartable_postgres.start()
        await eventually(lambda: api.health.ready, what="readiness returns by itself")
        connection = await asyncpg.connect(restartable_postgres.url)
        assert await orders(connection) == 1
        assert (await api.place(key="key-0")).status == 201
        assert await orders(connection) == 2
        await connection.close()


async def test_a_database_that_hangs_is_503_within_the_time_of_a_request(restartable_postgres: EmbeddedPostgres) -> None:
    async with serving(restartable_postgres.url, http_request_timeout_seconds=1.0, database_timeout_seconds=2.0) as api:
        await restartable_postgres.pause()
        try:
            async with asyncio.timeout(8):
                answers = await asyncio.gather(api.place(key="k"), api.place(), api.ask("GET", "/orders"))
            assert all(unavailable(answer) for answer in answers)
            await eventually(lambda: not api.health.ready, what="readiness goes")
        finally:
            await restartable_postgres.resume()
        await eventually(lambda: api.health.ready, what="readiness returns by itself")
        assert (await api.place(key="later")).status == 201


@pytest.mark.parametrize("key", [None, "k"])
async def test_no_answer_comes_before_the_commit(database_url: str, connection: asyncpg.Connection, key: str | None) -> None:
    async with serving(database_url) as api:
        async with connection.transaction():
            await connection.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
            waiting = asyncio.create_task(api.place(key=key))
            await eventually(lambda: waits(connection), what="the order waits for its commit")
            # Whatever was sent before this one was read by the server before it, and answered if it could be.
            assert (await api.ask("GET", "/livez")).status == 200
            assert not waiting.done()
        assert (await waiting).status == 201
        assert await orders(connection) == 1


async def test_a_short_outage_is_waited_out(database_url: str, connection: asyncpg.Connection) -> None:
    async with Wire(database_url) as wire, serving(wire.url) as api:
        wire.cut = True
        wire.hang_up()
        waiting = [asyncio.create_task(api.place()) for _ in range(20)]
        done, _ = await asyncio.wait(waiting, timeout=0.5)
        assert not done
        wire.cut = False
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {201}
        assert await orders(connection) == 20


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_commit_whose_answer_was_lost_is_not_repeated(
    database_url: str, connection: asyncpg.Connection, key: str | None
) -> None:
    async with Wire(database_url) as wire, serving(wire.url, database_pool_size=1) as api:
        await prepared(api, connection)
        wire.mute = True
        waiting = asyncio.create_task(api.place(key=key))
        await eventually(lambda: _committed(connection, 1), what="the order is committed")
        wire.mute = False
        wire.hang_up()
        answer = await waiting
        assert (answer.status, "Idempotency-Replayed" in answer.headers) == (201, False)
        assert await orders(connection) == 1
        if key:
            assert (await api.place(key=key)).raw == answer.raw


@pytest.mark.parametrize(("key", "advice"), [(None, "look for orderId"), ("k", "with the same Idempotency-Key")])
async def test_a_commit_of_unknown_outcome_says_so_and_names_the_order(
    database_url: str, connection: asyncpg.Connection, key: str | None, advice: str
) -> None:
    """The answer is lost and the database does not come back in time: then, and only then, an error may mean an order."""
    async with Wire(database_url) as wire, serving(wire.url, database_pool_size=1, http_request_timeout_seconds=1.0) as api:
        await prepared(api, connection)
        wire.mute = True
        answer = await api.place(key=key)
        assert unavailable(answer)
        assert advice in answer.body["detail"]
        wire.mute = False
        wire.hang_up()
        placed = await connection.fetch("SELECT id FROM orders")
        assert [row["id"] for row in placed] == [UUID(answer.body["orderId"])]
        if key:
            again = await api.place(key=key)
            assert (again.status, again.body["orderId"]) == (201, answer.body["orderId"])
        assert await orders(connection) == 1


async def test_an_order_that_only_queued_when_its_time_was_over_is_not_placed(
    database_url: str, connection: asyncpg.Connection
) -> None:
    limits = {"batch_size": 1, "batches_in_flight": 1, "http_request_timeout_seconds": 1.0}
    async with serving(database_url, **limits) as api:
        async with connection.transaction():
            await connection.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            running = asyncio.create_task(api.place())
            await eventually(lambda: waits(connection), what="one statement runs")
            queued = await api.place()
            assert unavailable(queued)
            assert "nothing was placed" in queued.body["detail"]
            assert "orderId" not in queued.body
            assert "orderId" in (await running).body
        await eventually(lambda: _committed(connection, 1), what="what ran is committed")
        assert (await api.place()).status == 201
        assert await orders(connection) == 2


async def test_a_caller_that_leaves_loses_and_doubles_nothing(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        async with connection.transaction():
            await connection.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            for number in range(5):
                await api.send(head(len(BODY), f"Idempotency-Key: left-{number}") + BODY, close=True)
            await eventually(lambda: waits(connection), what="the orders are on their way")
        await eventually(lambda: _committed(connection, 5), what="the orders are placed all the same")
        again = await asyncio.gather(*(api.place(key=f"left-{number}") for number in range(5)))
        assert {(answer.status, answer.headers["Idempotency-Replayed"]) for answer in again} == {(201, "true")}
        assert await orders(connection) == 5


async def test_half_a_body_places_nothing(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        await api.send(head(len(BODY)) + BODY[:-5], close=True)
        await api.send(head(len(BODY))[:-20], close=True)
        await eventually(lambda: _idle(api), what="the connections are gone")
        assert await orders(connection) == 0
        assert [fact[1] for fact in api.facts] == ["STARTUP"]


async def test_a_slow_body_is_408(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url, http_request_timeout_seconds=0.3) as api:
        answer = await api.send(head(len(BODY)) + BODY[:-5])
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"Connection: close" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == 408
        assert await orders(connection) == 0


async def test_what_nobody_expected_is_500_and_shows_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret one\nsecret two")

    async with serving(database_url) as api:
        monkeypatch.setattr(store, "get", broken)
        answer = await api.ask("GET", f"/orders/{USER}?password=x")
        assert answer.status == 500
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert b"secret" not in answer.raw
        assert api.facts[-1] == (
            "order-api", "REQUEST_ERROR", {"method": "GET", "path": f"/orders/{USER}", "error": "RuntimeError: secret one"}
        )  # fmt: skip


async def _committed(connection: asyncpg.Connection, number: int) -> bool:
    return bool(await connection.fetchval("SELECT count(*) FROM orders") == number)


async def _idle(api: Served) -> bool:
    # Asked on a connection of its own: when it is answered, the server's loop has seen what came before.
    return (await api.send(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
