"""The API behind keys: /orders asks for one before it reads anything else, the rest stays open; and what `run` refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from openapi_spec_validator import validate

from orderflow.orders.api_keys import new_key
from tests.fleet import Fleet, Process, api_of
from tests.serving import USER, serving

ALICE, ALICE_ENTRY = new_key("alice")
BOB, BOB_ENTRY = new_key("bob")
KEYS = f"{ALICE_ENTRY},{BOB_ENTRY}"
ORDER = {"userId": str(USER), "amount": "10.00"}
CLOSED = [
    ("POST", "/orders"),
    ("GET", "/orders"),
    ("GET", f"/orders/{USER}"),
    ("GET", f"/orders/{USER}/events"),
    ("HEAD", "/orders"),
]
OPEN = ["/livez", "/readyz", "/metrics", "/openapi.json"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("authorization", [{}, bearer("ofk_" + "A" * 43), {"Authorization": f"Basic {ALICE}"}])
async def test_without_a_known_key_there_is_no_order_and_no_look(
    authorization: dict[str, str], database_url: str, connection: asyncpg.Connection
) -> None:
    async with serving(database_url, api_keys=KEYS) as api:
        for method, path in CLOSED:
            body = {"json": ORDER} if method == "POST" else {}
            answer = await api.ask(method, path, headers=authorization, **body)
            assert (answer.status, answer.headers["Content-Type"]) == (401, "application/problem+json")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
            if method != "HEAD":
                assert answer.body["status"] == 401
                assert "ofk_A" not in json.dumps(answer.body)
        assert await connection.fetchval("SELECT count(*) FROM orders") == 0


async def test_every_key_places_and_sees_orders(database_url: str) -> None:
    async with serving(database_url, api_keys=KEYS) as api:
        for key in (ALICE, BOB):
            placed = await api.ask("POST", "/orders", json=ORDER, headers=bearer(key))
            assert placed.status == 201
            assert (await api.ask("GET", placed.headers["Location"], headers=bearer(key))).body["state"] == "CREATED"
        assert len((await api.ask("GET", "/orders", headers=bearer(ALICE))).body["orders"]) == 2


async def test_the_key_is_asked_for_before_the_body_is_read(database_url: str) -> None:
    async with serving(database_url, api_keys=KEYS) as api:
        # A body that never comes: the answer is there all the same.
        answer = await api.send(b"POST /orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 60000\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 401 ")


async def test_what_machines_and_readers_of_the_document_ask_for_stays_open(database_url: str) -> None:
    async with serving(database_url, api_keys=KEYS) as api:
        assert [(await api.ask("GET", path)).status for path in OPEN] == [200] * len(OPEN)
        assert (await api.ask("GET", "/nothing")).status == 404
        assert (await api.ask("DELETE", "/orders")).status == 405


@pytest.mark.parametrize("keys", [KEYS, ""])
async def test_the_document_tells_of_the_keys_that_are_asked_for(keys: str, database_url: str) -> None:
    async with serving(database_url, api_keys=keys) as api:
        document = (await api.ask("GET", "/openapi.json")).body
    validate(document)
    operations: list[tuple[str, Any]] = [(path, item) for path, items in document["paths"].items() for item in items.values()]
    secured = {path for path, item in operations if item.get("security") == [{"apiKey": []}] and "401" in item["responses"]}
    # Whatever is not meant to be open to everybody stands behind the keys.
    assert secured == ({path for path, _ in operations} - set(OPEN) if keys else set())
    assert ("securitySchemes" in document["components"]) is bool(keys)


async def test_a_key_that_is_used_too_often_waits_alone(database_url: str) -> None:
    async with serving(database_url, api_keys=KEYS, api_key_rate=0.01) as api:
        assert (await api.ask("POST", "/orders", json=ORDER, headers=bearer(ALICE))).status == 201
        refused = await api.ask("POST", "/orders", json=ORDER, headers=bearer(ALICE))
        assert (refused.status, refused.headers["Content-Type"]) == (429, "application/problem+json")
        assert refused.body["type"] == "urn:orderflow:problem:rate-limited"
        assert 1 <= int(refused.headers["Retry-After"]) <= 100
        assert (await api.ask("POST", "/orders", json=ORDER, headers=bearer(BOB))).status == 201


# As processes.


@pytest.mark.parametrize(
    "arguments", [("--role", "api"), (), ("--api", "2"), ("--role", "worker", "--role", "api")], ids=" ".join
)
async def test_an_open_door_is_refused_in_one_line(arguments: tuple[str, ...], database_url: str) -> None:
    async with Fleet(database_url, None, "unused", ORDERFLOW_HTTP_HOST="0.0.0.0") as fleet:
        process = await fleet.run(*arguments)
        assert await process.end() == 2
        (line,) = process.errors
        assert line.startswith("orderflow: ORDERFLOW_HTTP_HOST: '0.0.0.0' can be reached from other machines")
        assert not process.facts.seen


async def test_dev_refuses_it_before_it_starts_its_servers(tmp_path: Path) -> None:
    settings = {"ORDERFLOW_HTTP_HOST": "0.0.0.0", "ORDERFLOW_DATA_DIR": str(tmp_path / "data")}
    process = await Process.start("dev", environment=settings)
    assert await process.end() == 2
    assert "ORDERFLOW_HTTP_HOST" in process.errors[0]
    assert not (tmp_path / "data").exists()


async def test_a_role_without_orders_needs_no_keys(database_url: str, unused_tcp_port: int) -> None:
    changes = {"ORDERFLOW_HTTP_HOST": "0.0.0.0", "ORDERFLOW_METRICS_PORT": str(unused_tcp_port)}
    async with Fleet(database_url, None, "unused", **changes) as fleet:
        process = await fleet.run("--role", "publisher")
        await process.facts.until("STARTUP", service="orderflow")
        process.stop()
        assert await process.end() == 0


async def test_processes_of_a_parent_ask_for_the_same_keys(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(ALICE_ENTRY)
    async with Fleet(database_url, None, "unused", ORDERFLOW_API_KEYS=f"@{tmp_path / 'keys'}") as fleet:
        process = await fleet.run("--api", "2")
        address = await api_of(process)
        async with aiohttp.ClientSession() as session:
            for headers, status in (({}, 401), (bearer(ALICE), 201), (bearer(BOB), 401)):
                async with session.post(f"{address}/orders", json=ORDER, headers=headers) as answer:
                    assert answer.status == status


async def test_a_key_in_the_place_of_its_entry_is_refused_and_not_shown(database_url: str) -> None:
    async with Fleet(database_url, None, "unused", ORDERFLOW_API_KEYS=f"alice:{ALICE}") as fleet:
        process = await fleet.run("--role", "api")
        assert await process.end() == 2
        assert process.errors[0].startswith("orderflow: ORDERFLOW_API_KEYS: entry 1 is not name:sha256")
        assert ALICE not in "\n".join([*process.errors, *process.said])
