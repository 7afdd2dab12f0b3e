"""The API when all is well: placing, reading, paging, what operators ask, and how it starts and stops."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from orderflow.engine.patience import Misconfigured
from orderflow.health import Health
from orderflow.operations import Operations
from orderflow.orders import serving as serving_module
from tests.serving import USER, Answer, serving
from tests.waiting import eventually

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def checked(document: dict[str, Any], name: str, answer: Answer) -> Any:
    """The answer's body, after checking it against that schema of the OpenAPI document."""
    Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]}).validate(answer.body)
    return answer.body


async def test_an_order_is_placed_and_shown(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        document = (await api.ask("GET", "/openapi.json")).body
        placed = await api.ask(
            "POST", "/orders", json={"userId": str(USER).upper(), "amount": 299.99}, headers={"traceparent": TRACE}
        )
        assert placed.status == 201
        order = checked(document, "OrderPlaced", placed)
        assert order == {
            "orderId": order["orderId"], "state": "CREATED", "version": 1, "userId": str(USER), "amount": "299.99",
            "createdAt": order["createdAt"],
        }  # fmt: skip
        assert order["createdAt"].endswith("Z")
        assert placed.headers["Location"] == f"/orders/{order['orderId']}"
        assert "Idempotency-Replayed" not in placed.headers
        assert api.handoff.woken.is_set()
        row = await connection.fetchrow("SELECT * FROM orders")
        assert row is not None
        assert (row["id"], row["user_id"], row["amount"]) == (UUID(order["orderId"]), USER, Decimal("299.99"))
        assert json.loads(await connection.fetchval("SELECT headers FROM outbox")) == {"traceparent": TRACE}

        shown = await api.ask("GET", placed.headers["Location"])
        assert checked(document, "OrderView", shown) == {
            "id": order["orderId"], "userId": str(USER), "state": "CREATED", "version": 1, "amount": "299.99",
            "failure": None, "createdAt": order["createdAt"], "updatedAt": order["createdAt"],
        }  # fmt: skip
        head = await api.ask("HEAD", placed.headers["Location"])
        assert (head.status, head.raw, head.headers["Content-Length"]) == (200, b"", shown.headers["Content-Length"])
        options = await api.ask("OPTIONS", "/orders")
        assert (options.status, options.headers["Allow"]) == (204, "GET, HEAD, OPTIONS, POST")


@pytest.mark.parametrize(
    "trace", ["", "x", TRACE[:-1], "ff" + TRACE[2:], TRACE.upper(), TRACE.replace("00f067aa0ba902b7", "0" * 16)]
)
async def test_a_wrong_traceparent_is_not_carried_on(database_url: str, connection: asyncpg.Connection, trace: str) -> None:
    async with serving(database_url) as api:
        await api.ask("POST", "/orders", json={"userId": str(USER), "amount": 1}, headers={"traceparent": trace})
        assert [row["headers"] for row in await connection.fetch("SELECT headers FROM outbox")] == [None]


async def test_amounts_are_exact_from_the_wire_to_the_table(database_url: str, connection: asyncpg.Connection) -> None:
    written = [
        "0.01",
        "0.1",
        "0.29",
        "1e1",
        "10.000",
        "4503599627.37",
        "9999999999.99",
        '"10.00"',
        '"0000000001"',
        '"9999999999.99"',
    ]
    async with serving(database_url) as api:
        for text in written:
            body = f'{{"amount": {text}, "userId": "{USER}"}}'
            answer = await api.ask("POST", "/orders", data=body, headers={"Content-Type": "application/json"})
            assert answer.status == 201, text
            exact = f"{Decimal(text.strip(chr(34))):.2f}"
            stored = await connection.fetchval("SELECT amount::text FROM orders WHERE id = $1", UUID(answer.body["orderId"]))
            told = await connection.fetchval(
                "SELECT payload->>'amount' FROM outbox WHERE aggregate_id = $1", UUID(answer.body["orderId"])
            )
            assert (answer.body["amount"], stored, told) == (exact, exact, exact)


async def test_the_timeline_has_every_transition_and_event(database_url: str, connection: asyncpg.Connection) -> None:
    async with serving(database_url) as api:
        order_id = (await api.place()).body["orderId"]
        for state, failure in (("PAYMENT_PENDING", None), ("FAILED", "error"), ("PAYMENT_PENDING", None), ("PAID", None)):
            await connection.execute(
                "UPDATE orders SET state = $1, failure = $2, version = version + 1, entered_at = entered_at || now()",
                state,
                failure,
            )
        await connection.execute(
            "UPDATE outbox SET published_at = now(), failures = $1",
            '[{"attempt": 1, "at": "2026-11-23T07:00:00+00:00", "error": "E", "message": "m"}]',
        )
        await connection.execute("INSERT INTO processed_events (event_id, worker_id) SELECT event_id, 'w-1' FROM outbox")
        await connection.execute(
            "INSERT INTO outbox (event_type, aggregate_id, payload) SELECT 'OrderPaid', id, '[1]' FROM orders"
        )
        document = (await api.ask("GET", "/openapi.json")).body
        timeline = checked(document, "Timeline", await api.ask("GET", f"/orders/{order_id}/events"))
        assert timeline["orderId"] == order_id
        assert [(t["version"], t["state"]) for t in timeline["transitions"]] == [
            (1, "CREATED"), (2, "PAYMENT_PENDING"), (3, "FAILED"), (4, "PAYMENT_PENDING"), (5, "PAID")
        ]  # fmt: skip
        assert [t["at"] for t in timeline["transitions"]] == sorted(t["at"] for t in timeline["transitions"])
        created, paid = timeline["events"]
        assert (created["eventType"], created["workerId"], created["attempt"]) == ("OrderCreated", "w-1", 1)
        assert created["payload"] == {"orderId": order_id, "userId": str(USER), "amount": "10.00"}
        assert created["createdAt"] < created["publishedAt"] < created["processedAt"]
        assert created["failures"][0]["error"] == "E"
        assert (paid["eventType"], paid["payload"], paid["publishedAt"], paid["buriedAt"]) == ("OrderPaid", [1], None, None)


async def test_pages_lose_and_repeat_nothing_while_orders_come_in(database_url: str) -> None:
    async with serving(database_url) as api:
        # Placed in few statements, so that many share one creation time: the id has to decide.
        first = await asyncio.gather(*(api.place(number + 1) for number in range(60)))
        expected = {answer.body["orderId"] for answer in first}
        document = (await api.ask("GET", "/openapi.json")).body
        seen: list[str] = []
        path = "/orders?state=CREATED&limit=7"
        while True:
            answer = await api.ask("GET", path)
            page = checked(document, "OrderPage", answer)
            seen += [order["id"] for order in page["orders"]]
            await asyncio.gather(*(api.place() for _ in range(3)))
            if page["next"] is None:
                assert "Link" not in answer.headers
                break
            assert len(page["orders"]) == 7
            path = f"/orders?state=CREATED&limit=7&after={page['next']}"
            assert answer.headers["Link"] == f'<{path}>; rel="next"'
        assert len(seen) == len(set(seen))
        assert set(seen) == expected
        newest = (await api.ask("GET", "/orders?state=&limit=&after=")).body
        assert len(newest["orders"]) == 50
        times = [(order["createdAt"], order["id"]) for order in newest["orders"]]
        assert times == sorted(times, reverse=True)
        assert (await api.ask("GET", "/orders?state=PAID")).body == {"orders": [], "next": None}
        assert len((await api.ask("GET", "/orders?limit=500")).body["orders"]) > 60


async def test_the_document_is_openapi(database_url: str) -> None:
    async with serving(database_url) as api:
        document = (await api.ask("GET", "/openapi.json")).body
        validate(document)
        assert document["openapi"].startswith("3.1")
        answers = {f"{method} {path}": sorted(operation["responses"])
                   for path, item in document["paths"].items() for method, operation in item.items()}  # fmt: skip
        assert answers == {
            "post /orders": ["201", "400", "405", "408", "409", "413", "415", "422", "429", "500", "503"],
            "get /orders": ["200", "405", "422", "500", "503"],
            "get /orders/{order_id}": ["200", "404", "405", "500", "503"],
            "get /orders/{order_id}/events": ["200", "404", "405", "500", "503"],
            "get /livez": ["200", "405", "500"],
            "get /readyz": ["200", "405", "500", "503"],
            "get /metrics": ["200", "405", "500"],
            "get /openapi.json": ["200", "405", "500"],
        }


async def test_what_operators_ask(database_url: str) -> None:
    async with serving(database_url) as api:
        api.health.set("kafka", False, "no broker answers")
        assert (await api.ask("GET", "/livez")).body == {"status": "live"}
        ready = await api.ask("GET", "/readyz")
        assert (ready.status, ready.body) == (200, {
            "status": "ready",
            "dependencies": {
                "kafka": {"state": "down", "detail": "no broker answers"}, "postgres": {"state": "up", "detail": ""},
            },
        })  # fmt: skip
        api.health.draining = True
        drained = await api.ask("GET", "/readyz")
        assert (drained.status, drained.body["state"], drained.body["status"]) == (503, "draining", 503)
        assert drained.headers["Content-Type"] == "application/problem+json"
        assert drained.body["dependencies"]["postgres"] == {"state": "up", "detail": ""}
        metrics = await api.ask("GET", "/metrics")
        assert (metrics.status, metrics.raw) == (200, b"up 1\n")
        assert metrics.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert [fact[:2] for fact in api.facts] == [("order-api", "STARTUP")]
        assert api.facts[0][2] == {"message": f"listening on {api.url}"}


def test_health_is_ready_when_every_role_has_come_up_and_postgres_is_there() -> None:
    health = Health(["api", "worker"])
    said = [health.status]
    health.started("api")
    health.set("postgres", True)
    said.append(health.status)
    health.started("worker")
    said.append(health.status)
    health.set("postgres", False, "gone")
    said.append(health.status)
    health.set("postgres", True)
    health.draining = True
    assert [*said, health.status] == ["starting", "starting", "ready", "unavailable", "draining"]


async def test_a_process_without_the_api_answers_operators_too() -> None:
    health = Health(["worker"])
    operations = Operations("127.0.0.1", 0, health, lambda: (b"x 1\n", "text/plain"))
    stopping = asyncio.Event()
    running = asyncio.create_task(operations.run(stopping))
    await eventually(lambda: operations.port, what="it listens")

    async def ask(path: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", operations.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await writer.wait_closed()
        return answer

    assert b"200 OK" in await ask("/livez")
    assert b"503 " in await ask("/readyz")
    health.started("worker")
    health.set("postgres", True)
    assert b'"status":"ready"' in await ask("/readyz")
    assert (await ask("/metrics")).endswith(b"x 1\n")
    assert b"application/problem+json" in await ask("/orders")
    with pytest.raises(Misconfigured, match=r"ORDERFLOW_METRICS_PORT: port \d+ on 127.0.0.1 is in use"):
        await Operations("127.0.0.1", operations.port, health, lambda: (b"", "")).run(stopping)
    stopping.set()
    await asyncio.wait_for(running, 10)


@pytest.mark.parametrize("reuse_port", [False, True])
async def test_a_taken_port_is_named(database_url: str, reuse_port: bool) -> None:
    async with serving(database_url, http_reuse_port=reuse_port) as api:
        assert reuse_port == await _can_share(database_url, api.api.port, reuse_port)


async def _can_share(url: str, port: int, reuse_port: bool) -> bool:
    try:
        async with serving(url, http_port=port, http_reuse_port=reuse_port) as second:
            return (await second.ask("GET", "/livez")).status == 200
    except Misconfigured as error:
        assert str(error) == f"HTTP_PORT: port {port} on 127.0.0.1 is in use: end what listens there, or choose another port"  # noqa: PT017
        return False


async def test_an_address_of_another_machine_is_named(database_url: str) -> None:
    with pytest.raises(Misconfigured, match=r"ORDERFLOW_HTTP_HOST: '192\.0\.2\.1' is not an address of this machine"):
        async with serving(database_url, http_host="192.0.2.1", allow_anonymous=True):
            pass


async def test_a_stop_finishes_what_is_in_work_and_takes_no_more(
    database_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It takes longer than those are waited for who have nothing under way.
    monkeypatch.setattr(serving_module, "LEAVE_SECONDS", 0.1)
    async with serving(database_url) as api:
        async with connection.transaction():
            await connection.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            late = asyncio.create_task(api.place())
            await eventually(lambda: _waits(connection), what="the order waits for the lock")
            api.stopping.set()
            await eventually(lambda: api.health.draining, what="readiness goes")
            ended, _ = await asyncio.wait((late, api.running), timeout=0.5)
            assert ended == set(), "cut off while its order waits for the lock"
        assert (await late).status == 201
        await asyncio.wait_for(api.running, 10)
        with pytest.raises(OSError, match="Connect"):
            await api.ask("GET", "/livez")
        assert await connection.fetchval("SELECT count(*) FROM orders") == 1


async def _waits(connection: asyncpg.Connection) -> bool:
    return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def test_a_restart_on_any_port_keeps_the_port(database_url: str) -> None:
    async with serving(database_url) as api:
        port = api.api.port
        await api.stop()
        api.stopping = asyncio.Event()
        api.running = asyncio.create_task(api.api.run(api.stopping))
        await eventually(lambda: len([fact for fact in api.facts if fact[1] == "STARTUP"]) == 2, what="it starts again")
        assert api.api.port == port
        assert (await api.place()).status == 201
