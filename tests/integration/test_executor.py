"""One delivery through its steps: what is recorded, what is a duplicate, what is buried, and what survives an outage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import asyncpg
import orjson
import pytest

from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine import dead_letters
from orderflow.engine.handling import Delivery
from orderflow.engine.message import Message
from orderflow.engine.outcome import Done, Outcome
from orderflow.engine.postgres import Connection
from orderflow.engine.retry import Permanent
from tests.pipeline import Facts, FakeGateway, executing, watching
from tests.rows import (
    Fetched,
    as_record,
    charges_of,
    dead_letter,
    events_of,
    insert_event,
    is_processed,
    message_of,
    one_database,
    order_row,
    place,
    record_of,
)

database_url = one_database


def raw(value: bytes | None, headers: list[tuple[str, bytes | None]] | None = None, offset: int = 7) -> Fetched:
    return Fetched("order-events", 3, offset, b"key", value, headers or [])  # type: ignore[arg-type]


def document(**changes: Any) -> dict[str, Any]:
    return {
        "eventId": str(uuid4()), "eventType": "OrderCreated", "aggregateId": str(uuid4()), "aggregateType": "order",
        "payload": {"orderId": "x"}, "createdAt": "2026-05-01T12:00:00.000Z", **changes,
    }  # fmt: skip


async def buried_at(connection: asyncpg.Connection, offset: int) -> list[asyncpg.Record]:
    return await connection.fetch('SELECT * FROM dead_letter_events WHERE "offset" = $1', offset)


def nested(depth: int) -> bytes:
    return (
        orjson.dumps(document(payload={}))[:-1].replace(b'"payload":{}', b'"payload":' + b'{"a":' * depth + b"1" + b"}" * depth)
        + b"}"
    )


POISON = {
    "no value": None,
    "empty": b"",
    "not JSON": b"hello",
    "half a record": orjson.dumps(document())[:50],
    "an array": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "foreign bytes": bytes(range(256)),
    "invalid UTF-8": b'{"eventId": "\xff\xfe"}',
    "900 kB of nothing": b"x" * 900_000,
    "no id": orjson.dumps({name: value for name, value in document().items() if name != "eventId"}),
    "an id that is none": orjson.dumps(document(eventId="1234")),
    "an id that is a number": orjson.dumps(document(eventId=17)),
    "NUL in the type": orjson.dumps(document(eventType="Order\0Created")),
    "a type that is an object": orjson.dumps(document(eventType={"a": 1})),
    "a payload that is text": orjson.dumps(document(payload="{}")),
    "brackets without an end": b"[" * 200_000,
    "deeper than anybody reads": nested(2000),
    "a number beyond all": orjson.dumps(document())[:-1] + b',"payload":{"n":1e400}}',
    "before the first year": orjson.dumps(document(createdAt="0001-01-01T00:00:00+14:00")),
    "after the last year": orjson.dumps(document(createdAt="9999-12-31T23:59:59-14:00")),
}


@pytest.mark.parametrize("poison", POISON)
async def test_what_cannot_be_decoded_is_buried_once_with_its_place_and_its_bytes(
    connection: asyncpg.Connection, database_url: str, poison: str
) -> None:
    offset = 1000 + list(POISON).index(poison)
    record = raw(POISON[poison], offset=offset)
    with watching() as facts:
        async with executing(database_url) as executor:
            await executor.execute(record)
            # Delivered again, as after a crash before the commit: the same letter, not a second one.
            await executor.execute(record)
    (letter,) = await buried_at(connection, offset)
    assert (letter["topic"], letter["partition"], letter["raw"]) == ("order-events", 3, POISON[poison])
    assert letter["reason"].startswith("Undecodable: ")
    assert letter["error_class"] == "Undecodable"
    assert len(facts.of("DLQ_EVENT", eventId=letter["event_id"])) == 1
    assert facts.of("EVENT_RECEIVED") == []


ODD = {
    "of no order of ours": (orjson.dumps(document()), []),
    "NUL in the payload": (orjson.dumps(document(payload={"note": "a\0b"})), []),
    "NUL in a name of the payload": (orjson.dumps(document(payload={"a\0b": 1})), []),
    "a deep payload": (nested(600), []),
    "900 kB of payload": (orjson.dumps(document(payload={"note": "x" * 900_000})), []),
    "an escaped NUL in a header": (orjson.dumps(document()), [("note", rb"\u0000")]),
    "a NUL in a header": (orjson.dumps(document()), [("note", b"a\0b"), ("n\0", b"x"), ("none", None), ("bytes", b"\xff\x00")]),
    "a number of many digits": (orjson.dumps(document())[:-1] + b',"payload":{"n":123456789012345678901234567890}}', []),
    "a type of 900 kB": (orjson.dumps(document(eventType="x" * 900_000)), []),
    "surrogates": (orjson.dumps(document())[:-1] + rb',"payload":{"x":"\ud83d\ude00"}}', []),
}


@pytest.mark.parametrize("odd", ODD)
async def test_an_event_without_an_outbox_row_is_buried_with_that_reason(
    connection: asyncpg.Connection, database_url: str, odd: str
) -> None:
    value, headers = ODD[odd]
    offset = 2000 + list(ODD).index(odd)
    with watching() as facts:
        async with executing(database_url) as executor:
            await executor.execute(raw(value, headers, offset))
            await executor.execute(raw(value, headers, offset + 500))
    (letter,) = await buried_at(connection, offset)
    assert await buried_at(connection, offset + 500) == []
    assert letter["raw"] == value
    assert str(letter["event_id"]) == orjson.loads(value)["eventId"]
    assert letter["reason"] == "Unknown event: no outbox row in this database"
    assert len(facts.of("DLQ_EVENT")) == 1
    assert len(facts.of("DUPLICATE_EVENT")) == 1


UNREADABLE = {
    "a payload that is no object": ("Shipped", "[1]"),
    "a payload of null": ("Shipped", "null"),
    "a number that no double holds": ("Shipped", '{"n": 1e400}'),
    "too deep": ("Shipped", "[" * 2000 + "]" * 2000),
    "a type without a name": ("", "{}"),
    "an order's event": ("OrderCreated", '{"n": 1e400}'),
}


@pytest.mark.parametrize("unreadable", UNREADABLE)
async def test_an_outbox_row_that_no_worker_can_read_is_buried_as_that_event(
    connection: asyncpg.Connection, database_url: str, unreadable: str
) -> None:
    # Buried under another id, it would be published and buried again by every turn of the janitor.
    ((order_id, _),) = await place(connection)
    kind, payload = UNREADABLE[unreadable]
    event_id = await insert_event(connection, order_id, kind, payload)
    with watching() as facts:
        async with executing(database_url) as executor:
            await executor.execute(await record_of(connection, event_id))
            await executor.execute(await record_of(connection, event_id, offset=1))
    letter = await dead_letter(connection, event_id)
    assert letter is not None
    assert letter["reason"].startswith("Undecodable: ")
    assert (letter["event_type"], letter["aggregate_id"]) == (kind, order_id)
    same = "SELECT d.payload = o.payload FROM dead_letter_events d JOIN outbox o USING (event_id) WHERE event_id = $1"
    assert await connection.fetchval(same, event_id)
    assert await connection.fetchval("SELECT available_at = 'infinity' FROM outbox WHERE event_id = $1", event_id)
    assert len(facts.of("DLQ_EVENT")) == 1
    assert await order_row(connection, order_id) == (("FAILED", 2, "error") if kind == "OrderCreated" else ("CREATED", 1, None))


async def test_a_broken_copy_of_a_good_event_does_not_bury_the_event(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    record = await record_of(connection, event_id)
    async with executing(database_url) as executor:
        await executor.execute(replace(record, value=(record.value or b"")[:-1]))
        assert await dead_letter(connection, event_id) is None
        await executor.execute(record)
    assert await order_row(connection, order_id) == ("PAID", 3, None)


async def test_undecodable_headers_are_buried_too(connection: asyncpg.Connection, database_url: str) -> None:
    async with executing(database_url) as executor:
        await executor.execute(raw(orjson.dumps(document()), [("attempt", b"many"), ("x", rb"\u0000")], 3000))
    (letter,) = await buried_at(connection, 3000)
    assert letter["reason"] == "Undecodable: header attempt: not a number from 1"
    assert json.loads(letter["headers"])["attempt"] == "many"


async def test_a_type_that_nobody_handles_is_recorded_as_processed(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection, kind="Shipped")
    with watching() as facts:
        async with executing(database_url, worker_id="payment-worker-9") as executor:
            await executor.execute(await record_of(connection, event_id))
            await executor.execute(await record_of(connection, event_id))
    assert (
        await connection.fetchval("SELECT worker_id FROM processed_events WHERE event_id = $1", event_id) == "payment-worker-9"
    )
    assert [fact.event for fact in facts.seen] == ["EVENT_RECEIVED", "EVENT_PROCESSED", "EVENT_RECEIVED", "DUPLICATE_EVENT"]
    assert facts.of("EVENT_RECEIVED")[0] == {"eventId": event_id, "eventType": "Shipped"}
    assert facts.of("DUPLICATE_EVENT") == [{"eventId": event_id, "message": "Event already processed, skipping"}]


async def test_our_own_results_are_recorded_as_processed(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    async with executing(database_url) as executor:
        await executor.execute(await record_of(connection, event_id))
        (paid,) = await connection.fetch(
            "SELECT event_id FROM outbox WHERE aggregate_id = $1 AND event_type = 'OrderPaid'", order_id
        )
        await executor.execute(await record_of(connection, paid["event_id"]))
    assert await is_processed(connection, paid["event_id"])
    assert await order_row(connection, order_id) == ("PAID", 3, None)


@pytest.mark.parametrize("kind", ["OrderPaid", "OrderFailed"])
async def test_news_of_an_order_that_does_not_exist(connection: asyncpg.Connection, database_url: str, kind: str) -> None:
    event_id = await insert_event(connection, kind=kind)
    async with executing(database_url) as executor:
        await executor.execute(await record_of(connection, event_id))
        await executor.execute(await record_of(connection, event_id))
    letter = await dead_letter(connection, event_id)
    assert letter is not None
    assert letter["reason"] == "Unknown parcel: not in this database"
    assert not await is_processed(connection, event_id)


async def test_an_order_that_does_not_exist(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection, kind="OrderCreated", payload='{"orderId": "x", "note": "quite a story"}')
    with watching() as facts:
        async with executing(database_url) as executor:
            await executor.execute(await record_of(connection, event_id, offset=41))
            await executor.execute(await record_of(connection, event_id, offset=42))
    letter = await dead_letter(connection, event_id)
    assert letter is not None
    assert letter["reason"] == "Unknown order: not in this database"
    assert (letter["event_type"], letter["offset"], letter["error_class"]) == ("OrderCreated", 41, "Permanent")
    assert json.loads(letter["payload"])["note"] == "quite a story"
    assert await connection.fetchval("SELECT available_at = 'infinity' FROM outbox WHERE event_id = $1", event_id)
    assert not await is_processed(connection, event_id)
    assert [fact.event for fact in facts.seen].count("DLQ_EVENT") == 1
    assert facts.of("RETRY_SCHEDULED") == []


async def test_an_order_that_does_not_exist_and_a_payload_that_is_too_deep_to_write_again(
    connection: asyncpg.Connection, database_url: str
) -> None:
    deep = '{"a":' * 600 + "1" + "}" * 600
    event_id = await insert_event(connection, kind="OrderCreated", payload=deep)
    async with executing(database_url) as executor:
        await executor.execute(await record_of(connection, event_id))
    letter = await dead_letter(connection, event_id)
    assert letter is not None
    assert letter["payload"] == deep.replace(":", ": ")


async def test_an_event_that_names_another_order_charges_neither(connection: asyncpg.Connection, database_url: str) -> None:
    (order_id, event_id), (other, _) = await place(connection, 2)
    record = await record_of(connection, event_id)
    forged = (record.value or b"").replace(str(order_id).encode(), str(other).encode())
    gateway = FakeGateway()
    async with executing(database_url, gateway) as executor:
        await executor.execute(replace(record, value=forged, topic="forged", offset=2))
        assert gateway.requests == []
        (letter,) = await connection.fetch("SELECT event_id, reason FROM dead_letter_events WHERE aggregate_id = $1", other)
        assert letter["event_id"] != event_id
        assert letter["reason"] == "Foreign event: its outbox row tells of another aggregate"
        await executor.execute(record)
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert await order_row(connection, other) == ("CREATED", 1, None)


async def test_a_record_that_borrows_the_id_of_an_order_s_event_does_not_have_it_skipped(
    connection: asyncpg.Connection, database_url: str
) -> None:
    ((order_id, event_id),) = await place(connection)
    record = await record_of(connection, event_id)
    forged = (record.value or b"").replace(b"OrderCreated", b"SomethingElse")
    async with executing(database_url) as executor:
        await executor.execute(replace(record, value=forged, topic="forged", offset=1))
        reason = await connection.fetchval("SELECT reason FROM dead_letter_events WHERE topic = 'forged' AND \"offset\" = 1")
        assert reason == "Foreign event: its outbox row tells of another type"
        await executor.execute(record)
    assert await order_row(connection, order_id) == ("PAID", 3, None)


async def test_delivered_again_changes_nothing(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    record = await record_of(connection, event_id)
    gateway = FakeGateway()
    with watching() as facts:
        async with executing(database_url, gateway) as executor:
            await executor.execute(record)
            before = await connection.fetchrow("SELECT * FROM orders WHERE id = $1", order_id)
            for _ in range(3):
                await executor.execute(record)
    assert await connection.fetchrow("SELECT * FROM orders WHERE id = $1", order_id) == before
    assert len(facts.of("DUPLICATE_EVENT", eventId=event_id)) == 3
    assert len(gateway.requests) == 1
    assert await events_of(connection, order_id) == ["OrderCreated", "OrderPaid"]


@pytest.mark.parametrize("executors", [1, 2])
async def test_the_same_event_at_the_same_moment_settles_once(
    connection: asyncpg.Connection, database_url: str, executors: int
) -> None:
    # In one executor this takes a record without its key, as another program may send it: it is not held behind the first.
    placed = await place(connection, 8)
    records = [await record_of(connection, event_id) for _, event_id in placed]
    together = asyncio.Barrier(2 * len(placed))
    gateway = FakeGateway()

    async def book(request: Any) -> Any:
        await together.wait()
        return gateway.book(request)

    gateway.on_charge = book
    with watching() as facts:
        async with (
            executing(database_url, gateway, worker_id="a") as one,
            executing(database_url, gateway, worker_id="b") as other,
        ):
            second = one if executors == 1 else other
            both = [execute(record) for record in records for execute in (one.execute, second.execute)]
            await asyncio.wait_for(asyncio.gather(*both), 30)
    for order_id, event_id in placed:
        assert await order_row(connection, order_id) == ("PAID", 3, None)
        assert await events_of(connection, order_id) == ["OrderCreated", "OrderPaid"]
        assert len(facts.of("PAYMENT_RESULT", orderId=order_id)) == 1
        assert len(facts.of("STATE_CHANGE", orderId=order_id, newState="PAID")) == 1
        assert len(facts.of("DUPLICATE_EVENT", eventId=event_id)) == 1
    assert len(gateway.charges) == len(placed)
    assert len({request.idempotency_key for request in gateway.requests}) == len(placed)


async def test_a_delivery_of_an_older_attempt_is_a_duplicate(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    old = await record_of(connection, event_id)
    await connection.execute("UPDATE outbox SET attempt = 2 WHERE event_id = $1", event_id)
    with watching() as facts:
        async with executing(database_url) as executor:
            await executor.execute(old)
            assert await order_row(connection, order_id) == ("CREATED", 1, None)
            await executor.execute(await record_of(connection, event_id))
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert [fact.event for fact in facts.seen][:2] == ["EVENT_RECEIVED", "DUPLICATE_EVENT"]


async def test_a_buried_event_that_is_delivered_again_stays_buried(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection, kind="OrderCreated")
    record = await record_of(connection, event_id)
    async with executing(database_url) as executor:
        await executor.execute(record)
    # Somebody has written the order meanwhile: only a redrive may bring the event back.
    await connection.execute("INSERT INTO orders (id, user_id, amount) SELECT aggregate_id, gen_random_uuid(), 1 FROM outbox"
                             " WHERE event_id = $1", event_id)  # fmt: skip
    with watching() as facts:
        async with executing(database_url) as executor:
            await executor.execute(record)
    assert [fact.event for fact in facts.seen] == ["EVENT_RECEIVED", "DUPLICATE_EVENT"]
    assert not await is_processed(connection, event_id)


async def test_a_buried_event_that_nobody_handles_stays_buried_too(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection)
    message = await message_of(connection, event_id)
    async with connection.transaction():
        assert await dead_letters.bury_if_attempt(
            connection, message, reason="dead", failure=None, error=None, place=None, worker_id=None
        )
    with watching() as facts:
        async with executing(database_url) as executor:
            await executor.execute(as_record(message))
    assert not await is_processed(connection, event_id)
    assert [fact.event for fact in facts.seen] == ["EVENT_RECEIVED", "DUPLICATE_EVENT"]


class Handling:
    """A handler of the test's own."""

    def __init__(self, handle: Callable[[Delivery], Any]) -> None:
        self.handled: list[Delivery] = []
        self._handle = handle

    async def handle(self, delivery: Delivery) -> Outcome:
        self.handled.append(delivery)
        result = self._handle(delivery)
        if isinstance(result, Exception):
            raise result
        return result

    async def before_giving_up(self, delivery: Delivery) -> Outcome | None:
        return None

    async def on_buried(self, connection: Connection, message: Message, reason: str) -> Callable[[], None]:
        return lambda: None


async def test_a_handler_gets_the_event_its_place_and_how_often_it_failed(
    connection: asyncpg.Connection, database_url: str
) -> None:
    event_id = await insert_event(connection)
    await connection.execute("UPDATE outbox SET attempt = 5, first_attempt = 4 WHERE event_id = $1", event_id)
    handler = Handling(lambda delivery: Done())
    async with executing(database_url, handlers={"Shipped": handler}, worker_id="w7") as executor:
        await executor.execute(await record_of(connection, event_id, offset=99))
    (delivery,) = handler.handled
    assert (delivery.failures, delivery.record.offset) == (1, 99)
    assert delivery.message.payload == {"n": 1}


async def test_a_handled_event_that_is_delivered_again_is_not_handled_again(
    connection: asyncpg.Connection, database_url: str
) -> None:
    event_id = await insert_event(connection)
    handler = Handling(lambda delivery: Done())
    with watching() as facts:
        async with executing(database_url, handlers={"Shipped": handler}) as executor:
            for offset in range(3):
                await executor.execute(await record_of(connection, event_id, offset=offset))
    assert [delivery.record.offset for delivery in handler.handled] == [0]
    assert len(facts.of("DUPLICATE_EVENT", eventId=event_id)) == 2


async def test_an_error_text_that_postgres_cannot_keep(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection)
    handler = Handling(lambda delivery: ValueError("a\0b \ud800"))
    async with executing(database_url, handlers={"Shipped": handler}) as executor:
        for _ in range(3):
            await executor.execute(await record_of(connection, event_id))
    letter = await dead_letter(connection, event_id)
    assert letter is not None
    assert [entry["attempt"] for entry in json.loads(letter["attempts"])] == [1, 2, 3]


async def test_a_reason_that_postgres_cannot_keep(connection: asyncpg.Connection, database_url: str) -> None:
    event_id = await insert_event(connection)
    handler = Handling(lambda delivery: Permanent("never: a\0b"))
    async with executing(database_url, handlers={"Shipped": handler}) as executor:
        await executor.execute(await record_of(connection, event_id))
    letter = await dead_letter(connection, event_id)
    assert letter is not None
    assert letter["reason"].startswith("never: a")


async def test_connections_ended_in_the_middle_of_everything(connection: asyncpg.Connection, database_url: str) -> None:
    placed = await place(connection, 20)
    records = [await record_of(connection, event_id) for _, event_id in placed]
    charging = asyncio.Event()
    go_on = asyncio.Event()
    gateway = FakeGateway()

    async def book(request: Any) -> Any:
        charging.set()
        await go_on.wait()
        return gateway.book(request)

    gateway.on_charge = book
    async with executing(database_url, gateway) as executor:
        work = asyncio.gather(*(executor.execute(record) for record in records))
        await asyncio.wait_for(charging.wait(), 30)
        await end_connections(connection)
        go_on.set()
        await end_connections(connection)
        await asyncio.wait_for(work, 30)
    for order_id, event_id in placed:
        assert await order_row(connection, order_id) == ("PAID", 3, None)
        assert await events_of(connection, order_id) == ["OrderCreated", "OrderPaid"]
        assert await is_processed(connection, event_id)
    assert len(gateway.charges) == 20


async def end_connections(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'orderflow' AND datname = current_database()"
    )


async def test_the_server_is_killed_while_a_charge_is_under_way(restartable_postgres: EmbeddedPostgres) -> None:
    connection = await asyncpg.connect(restartable_postgres.url, timeout=10)
    ((order_id, event_id), (_, other_id)) = await place(connection, 2)
    records = [await record_of(connection, event_id), await record_of(connection, other_id)]
    await connection.close()
    gateway = FakeGateway()
    charging, go_on = asyncio.Event(), asyncio.Event()

    async def book(request: Any) -> Any:
        charging.set()
        await go_on.wait()
        return gateway.book(request)

    gateway.on_charge = book
    facts = Facts()
    async with executing(restartable_postgres.url, gateway) as executor:
        with watching() as facts:
            first = asyncio.create_task(executor.execute(records[0]))
            await asyncio.wait_for(charging.wait(), 30)
            await restartable_postgres.kill()
            # One delivery is about to settle, the other has not even been looked up: both wait.
            second = asyncio.create_task(executor.execute(records[1]))
            go_on.set()
            await facts.until("EVENT_RECEIVED", count=2)
            assert not first.done()
            await restartable_postgres.start()
            await asyncio.wait_for(asyncio.gather(first, second), 60)
    connection = await asyncpg.connect(restartable_postgres.url, timeout=10)
    try:
        assert await order_row(connection, order_id) == ("PAID", 3, None)
        assert await events_of(connection, order_id) == ["OrderCreated", "OrderPaid"]
        assert await charges_of(connection, order_id) == []
    finally:
        await connection.close()
    assert len(gateway.charges) == 2
    assert facts.of("PROCESSING_ERROR") == []


async def test_a_redelivery_under_another_attempt_header_than_the_row_s_is_not_trusted_to_count(
    connection: asyncpg.Connection, database_url: str
) -> None:
    event_id = await insert_event(connection)
    message = replace(await message_of(connection, event_id), attempt=2**31 - 1)
    async with executing(database_url) as executor:
        await executor.execute(as_record(message))
    assert await is_processed(connection, event_id)
