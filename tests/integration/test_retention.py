"""Retention: what is old and finished goes, whole and in small batches; what a redelivery could still need stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from click.testing import CliRunner

from orderflow import retention as retention_module
from orderflow.audit import INVARIANTS, statement_for_orders
from orderflow.cli import cli
from orderflow.commands.checks import kafka as kafka_checks
from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine import dead_letters, outbox
from orderflow.engine.kafka import Kafka
from orderflow.engine.low_water import Positions
from orderflow.engine.message import Message
from orderflow.engine.outbox import SHARDS
from orderflow.engine.patience import is_transient
from orderflow.engine.postgres import Database
from orderflow.explain import story
from orderflow.orders import store as orders
from orderflow.retention import RETENTION_LOCK, Retention
from tests.old import backdate, finished
from tests.pipeline import FakeGateway, executing, kafka_for, opened, opening, running, watching
from tests.rows import Fetched, as_record, events_of, insert_event, message_of, order_row, place, violations
from tests.servers import Broker
from tests.serving import serving
from tests.waiting import eventually

DAY = timedelta(days=1)
TABLES = ("outbox", "processed_events", "dead_letter_events", "gateway_charges")


class ForgetsEarlier(Kafka):
    """A cluster that keeps its records for two weeks, as Apache Kafka's defaults come to."""

    async def kept_for(self) -> timedelta | None:
        return 14 * DAY


def retention_of(url: str, days: int = 30, kafka: Kafka | None = None) -> Retention:
    return Retention(opening(url, by_index=True), kafka or ForgetsEarlier("127.0.0.1:1"), days=days)


async def one_round(url: str, retention: Retention | None = None) -> int:
    """All batches of one round; returns how many events have gone."""
    retention = retention or retention_of(url)
    async with opened(url, by_index=True) as database:
        gone = await retention.run_once(database)
        while retention.is_under_way:
            gone += await retention.run_once(database)
    return gone


async def counts(connection: asyncpg.Connection) -> dict[str, int]:
    return {table: await connection.fetchval(f"SELECT count(*) FROM {table}") for table in TABLES}


async def retired(connection: asyncpg.Connection) -> set[UUID]:
    return {row["id"] for row in await connection.fetch("SELECT id FROM orders WHERE retired_at IS NOT NULL")}


async def discard_all(connection: asyncpg.Connection) -> None:
    for row in await connection.fetch("SELECT event_id FROM dead_letter_events"):
        assert await dead_letters.discard_if_open(connection, row["event_id"], "seen")


async def test_an_order_leaves_nothing_but_itself(connection: asyncpg.Connection, database_url: str) -> None:
    old = await finished(connection, database_url, 2)
    old += await finished(connection, database_url, 2, "decline")
    old += await finished(connection, database_url, 2, "error")
    await discard_all(connection)
    await backdate(connection)
    ((young, _),) = await finished(connection, database_url)
    rows = [await order_row(connection, order_id) for order_id, _ in old]
    with watching() as facts:
        assert await one_round(database_url) == 12
    assert facts.of("RETIRED") == [{"orders": 6, "events": 12, "retentionDays": 30}]
    assert await retired(connection) == {order_id for order_id, _ in old}
    assert [await order_row(connection, order_id) for order_id, _ in old] == rows
    assert await events_of(connection, young) == ["OrderCreated", "OrderPaid"]
    assert await counts(connection) == {"outbox": 2, "processed_events": 2, "dead_letter_events": 0, "gateway_charges": 1}
    assert await violations(connection) == {}
    assert await one_round(database_url) == 0


async def test_what_is_shown_of_a_retired_order(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, _),) = await finished(connection, database_url)
    await backdate(connection)
    assert await one_round(database_url) == 2
    entries = [(entry.kind, entry.what) for entry in (await story(connection, order_id)).entries]
    assert entries == [
        ("transition", "CREATED"), ("transition", "CREATED -> PAYMENT_PENDING"), ("transition", "PAYMENT_PENDING -> PAID"),
        ("retention", "deleted: events, deliveries and charges"),
    ]  # fmt: skip
    async with opened(database_url) as database:
        order = await orders.get(database, order_id)
        assert order is not None
        assert order.retired_at is not None
        assert await orders.timeline(database, order_id) == []
    async with serving(database_url) as api:
        timeline = await api.ask("GET", f"/orders/{order_id}/events")
        assert (timeline.status, timeline.body["events"]) == (200, [])
        assert [transition["state"] for transition in timeline.body["transitions"]] == ["CREATED", "PAYMENT_PENDING", "PAID"]
        assert timeline.body["retiredAt"].endswith("Z")
        assert (await api.ask("GET", f"/orders/{order_id}")).body["state"] == "PAID"
    shown = await asyncio.to_thread(CliRunner().invoke, cli, ["orders", "show", str(order_id), "--database-url", database_url])
    assert "its events were deleted for their age" in shown.output


KEPT = {
    "it is young": "UPDATE orders SET updated_at = now()",
    "an event of it is young": "UPDATE outbox SET created_at = now() WHERE event_type = 'OrderPaid'",
    "an event was published again lately": "UPDATE outbox SET published_at = now() WHERE event_type = 'OrderCreated'",
    "an event was delivered lately": "UPDATE processed_events SET processed_at = now()",
    "an event is to be published again": "UPDATE outbox SET published_at = NULL, available_at = now() + interval '1 h'",
    "an event was never published": "UPDATE outbox SET published_at = NULL WHERE event_type = 'OrderPaid'",
    "an event was never delivered": "DELETE FROM processed_events",
    "it was discarded lately": "DELETE FROM processed_events; INSERT INTO dead_letter_events"
    " (event_id, reason, discarded_at, discard_reason) SELECT event_id, 'r', now(), 'd' FROM outbox",
    "its dead letter is open": "DELETE FROM processed_events;"
    " INSERT INTO dead_letter_events (event_id, reason) SELECT event_id, 'r' FROM outbox",
    "processed and buried": "INSERT INTO dead_letter_events (event_id, reason) SELECT event_id, 'r' FROM outbox",
    "a second charge": "INSERT INTO gateway_charges (id, idempotency_key, reference, amount, status)"
    " SELECT gen_random_uuid(), 'again', reference, amount, status FROM gateway_charges",
    "an event too few": "DELETE FROM outbox WHERE event_type = 'OrderPaid'",
    "an event of the future": "UPDATE outbox SET created_at = '9999-01-01' WHERE event_type = 'OrderPaid'",
    "never ends": "UPDATE orders SET updated_at = 'infinity'",
}  # fmt: skip


@pytest.mark.parametrize("why", KEPT)
async def test_an_order_is_kept_whole(connection: asyncpg.Connection, database_url: str, why: str) -> None:
    ((order_id, _),) = await finished(connection, database_url)
    await backdate(connection)
    await connection.execute(KEPT[why])
    before = await counts(connection)
    assert await one_round(database_url) == 0
    assert await counts(connection) == before
    assert await retired(connection) == set()
    assert (await order_row(connection, order_id))[0] == "PAID"


async def test_an_order_in_flight_is_kept_however_old(connection: asyncpg.Connection, database_url: str) -> None:
    ((_, event_id),) = await place(connection)
    await connection.execute("UPDATE outbox SET published_at = now()")
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", event_id)
    await backdate(connection)
    assert await one_round(database_url) == 0


async def test_a_redelivery_of_what_was_retired_charges_nothing(connection: asyncpg.Connection, database_url: str) -> None:
    placed = await finished(connection, database_url) + await finished(connection, database_url, mode="decline")
    rows = await connection.fetch("SELECT event_id FROM outbox ORDER BY seq")
    records = [as_record(await message_of(connection, row["event_id"])) for row in rows]
    await backdate(connection)
    assert await one_round(database_url) == 4
    before = [await connection.fetchrow("SELECT * FROM orders WHERE id = $1", order_id) for order_id, _ in placed]
    gateway = FakeGateway()
    with watching() as facts:
        async with executing(database_url, gateway) as executor:
            for record in records:
                await executor.execute(record)
            # As a later attempt, which takes another way.
            await executor.execute(as_record(retried(records[0])))
    assert (gateway.requests, gateway.asked) == ([], [])
    assert len(facts.of("DUPLICATE_EVENT")) == 5
    assert facts.of("DLQ_EVENT") + facts.of("STATE_CHANGE") + facts.of("PROCESSING_ERROR") == []
    assert await counts(connection) == dict.fromkeys(TABLES, 0)
    assert [await connection.fetchrow("SELECT * FROM orders WHERE id = $1", order_id) for order_id, _ in placed] == before
    assert await violations(connection) == {}


def retried(record: Fetched) -> Message:
    message = Message.decode(record.value, record.headers)
    message.attempt = 2
    return message


async def test_a_stranger_s_event_of_an_order_that_is_not_retired_is_still_buried(
    connection: asyncpg.Connection, database_url: str
) -> None:
    ((_, event_id),) = await finished(connection, database_url)
    message = await message_of(connection, event_id)
    message.id = uuid4()
    async with executing(database_url) as executor:
        await executor.execute(as_record(message))
    assert await connection.fetchval("SELECT reason FROM dead_letter_events") == "Unknown event: no outbox row in this database"


PLANTED = {
    "I1": "INSERT INTO outbox (event_type, aggregate_id, published_at, payload)"
    " SELECT 'OrderCreated', id, now(), jsonb_build_object('orderId', id, 'userId', user_id, 'amount', amount) FROM orders",
    "I2": "INSERT INTO outbox (event_type, aggregate_id, published_at) SELECT 'OrderPaid', id, now() FROM orders",
    "I3": "INSERT INTO gateway_charges (id, idempotency_key, reference, amount, status)"
    " SELECT gen_random_uuid(), 'again', id, amount, 'settled' FROM orders",
}


@pytest.mark.parametrize("invariant", PLANTED)
async def test_the_audit_is_not_blind_to_what_becomes_of_a_retired_order(
    connection: asyncpg.Connection, database_url: str, invariant: str
) -> None:
    await finished(connection, database_url)
    await backdate(connection)
    assert await one_round(database_url) == 2
    assert await violations(connection) == {}
    await connection.execute(PLANTED[invariant])
    await connection.execute("INSERT INTO processed_events SELECT event_id, 'w' FROM outbox")
    found = await violations(connection)
    assert set(found) == {invariant}
    assert "since it was retired" in found[invariant][0] or invariant == "I2"


async def test_events_of_no_order_go_each_for_itself(connection: asyncpg.Connection, database_url: str) -> None:
    parcel = uuid4()
    old, unsettled, young = [await insert_event(connection, parcel) for _ in range(3)]
    await connection.execute("UPDATE outbox SET published_at = now()")
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", old)
    await backdate(connection)
    await connection.execute("UPDATE outbox SET created_at = now() WHERE event_id = $1", young)
    assert await one_round(database_url) == 1
    assert {row["event_id"] for row in await connection.fetch("SELECT event_id FROM outbox")} == {unsettled, young}


async def test_page_by_page_past_what_is_kept_and_no_further_than_what_is_young(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "PAGE", 1)
    parcel = uuid4()
    events = [await insert_event(connection, parcel) for _ in range(6)]
    await connection.execute("UPDATE outbox SET published_at = now()")
    await connection.execute("INSERT INTO processed_events SELECT unnest($1::uuid[]), 'w'", events[1:])
    await backdate(connection)
    # Backdated, and behind a young one: its turn comes when that has become old.
    await connection.execute("UPDATE outbox SET created_at = now() WHERE event_id = $1", events[4])
    monkeypatch.setattr(retention_module, "MOST_EVENTS", 2)
    retention = retention_of(database_url)
    async with opened(database_url, by_index=True) as database:
        gone = []
        while not gone or retention.is_under_way:
            gone.append(await retention.run_once(database))
    # Two events of an aggregate at a time, the first of which is never settled.
    assert [count for count in gone if count] == [1, 1, 1]
    assert [row["event_id"] for row in await connection.fetch("SELECT event_id FROM outbox ORDER BY seq")] == [
        events[0], *events[4:],
    ]  # fmt: skip


async def test_an_order_with_more_events_than_a_batch_may_touch_is_kept(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "MOST_EVENTS", 2)
    await finished(connection, database_url)
    await backdate(connection)
    assert await one_round(database_url) == 0


STRANGE = """
INSERT INTO orders (id, user_id, amount, state, version, created_at, updated_at, entered_at)
VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'PAID', 3, '20000-01-01', '-infinity',
        ARRAY['-infinity', now(), 'infinity']::timestamptz[]),
       ('00000000-0000-0000-0000-000000000001', gen_random_uuid(), 1, 'PAID', 3, now(), '0044-03-15 BC',
        ARRAY[now(), now(), now()]);
INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload, created_at, published_at)
VALUES ('', '', '00000000-0000-0000-0000-000000000001', 'null', '0001-02-01', '-infinity'),
       ('OrderCreated', 'order', '00000000-0000-0000-0000-000000000001', '[1]', '0001-02-01', '0044-03-15 BC');
INSERT INTO processed_events (event_id, worker_id, processed_at) SELECT event_id, '', '-infinity' FROM outbox
ON CONFLICT DO NOTHING
"""


async def test_what_other_programs_have_left_stops_nothing(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, _),) = await finished(connection, database_url)
    await backdate(connection)
    await connection.execute(STRANGE)
    assert await one_round(database_url) == 2
    assert await retired(connection) == {order_id}


async def test_a_row_that_somebody_has_locked_is_passed_by(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "LOCK_TIMEOUT_MS", 20)
    await finished(connection, database_url)
    await backdate(connection)
    retention = retention_of(database_url)
    async with opened(database_url, by_index=True) as database:
        async with connection.transaction():
            await connection.execute("SELECT FROM orders FOR UPDATE")
            with pytest.raises(asyncpg.LockNotAvailableError):
                await retention.run_once(database)
            assert await retention.run_once(database) == 0
            assert await one_round_of(retention, database) == 0
        assert await one_round_of(retention, database) == 2


async def one_round_of(retention: Retention, database: Database) -> int:
    while retention.is_under_way:
        with_locks = await retention.run_once(database)
        assert with_locks == 0
    try:
        gone = await retention.run_once(database)
    except asyncpg.LockNotAvailableError:
        gone = 0
    return gone


@pytest.mark.parametrize("change", [
    "UPDATE outbox SET published_at = NULL, available_at = now() WHERE event_type = 'OrderCreated'",
    "UPDATE orders SET updated_at = now()",
])  # fmt: skip
async def test_what_changes_between_judging_and_deleting_ends_the_batch(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    await finished(connection, database_url)
    await backdate(connection)
    before = await counts(connection)
    check = retention_module.violations_of

    async def meanwhile(*arguments: Any, **named: Any) -> Any:
        await connection.execute(change)
        return await check(*arguments, **named)

    monkeypatch.setattr(retention_module, "violations_of", meanwhile)
    async with opened(database_url, by_index=True) as database:
        with pytest.raises(asyncpg.SerializationError) as raised:
            await retention_of(database_url).run_once(database)
    assert is_transient(raised.value)
    assert await counts(connection) == before
    assert await retired(connection) == set()


async def test_one_process_at_a_time(connection: asyncpg.Connection, database_url: str) -> None:
    await finished(connection, database_url)
    await backdate(connection)
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", RETENTION_LOCK)
        assert await one_round(database_url) == 0
    assert await one_round(database_url) == 2


@pytest.mark.parametrize("days", [0, 30])
async def test_keys_live_for_a_day_and_a_stranger_s_letters_for_the_retention(
    connection: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    monkeypatch.setattr(retention_module, "PAGES", 1)
    await finished(connection, database_url)
    await connection.execute(
        "INSERT INTO idempotency_keys (key, request_hash, order_id) SELECT 'old' || n, '', gen_random_uuid()"
        " FROM generate_series(1, 500) AS n"
    )
    await connection.execute(
        "INSERT INTO dead_letter_events (event_id, reason, discarded_at, discard_reason)"
        " VALUES (gen_random_uuid(), 'discarded', now(), 'd'), (gen_random_uuid(), 'open', NULL, NULL)"
    )
    await backdate(connection)
    await connection.execute(
        "INSERT INTO idempotency_keys VALUES ('new', '', gen_random_uuid(), now() - interval '23 hours 59 min')"
    )
    assert await one_round(database_url, retention_of(database_url, days)) == (2 if days else 0)
    assert await connection.fetchval("SELECT array_agg(key) FROM idempotency_keys") == ["new"]
    left = {row["reason"] for row in await connection.fetch("SELECT reason FROM dead_letter_events")}
    assert left == ({"open"} if days else {"open", "discarded"})


async def configure(kafka: Broker, topic: str, **changes: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        configs = {name.replace("_", "."): value for name, value in changes.items()}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])
    finally:
        await admin.close()


async def test_nothing_goes_while_kafka_keeps_its_records_for_longer(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    if not isinstance(kafka, ApacheKafka):
        pytest.skip("the mock broker has no configuration")
    await finished(connection, database_url)
    await backdate(connection)
    cluster = kafka_for(kafka, topic)
    retention = retention_of(database_url, kafka=cluster)
    assert await cluster.kept_for() == 14 * DAY
    for changes, said in [
        ({"retention_ms": "-1"}, "without an end"),
        ({"cleanup_policy": "compact"}, "without an end"),
        ({"retention_ms": str(29 * 86_400_000)}, "up to 36.0 days"),
    ]:
        await configure(kafka, topic, **changes)
        with watching() as facts:
            await eventually(lambda said=said: is_refused(database_url, retention, facts, said))  # type: ignore[misc]
        levels = {check.seen: check.level for check in await kafka_checks.check(cluster, 30)}
        assert [level for seen, level in levels.items() if seen.startswith("nothing is deleted by retention")] == ["warning"]
    await configure(kafka, topic, retention_ms=str(22 * 86_400_000))
    await eventually(lambda: goes(database_url, retention))
    assert await counts(connection) == dict.fromkeys(TABLES, 0)


async def is_refused(url: str, retention: Retention, facts: Any, said: str) -> bool:
    assert await one_round(url, retention) == 0
    return any(said in fact["reason"] for fact in facts.of("RETENTION_REFUSED"))


async def goes(url: str, retention: Retention) -> bool:
    return await one_round(url, retention) == 2


async def test_a_topic_that_is_not_there_keeps_nothing(kafka: Broker) -> None:
    if not isinstance(kafka, ApacheKafka):
        pytest.skip("the mock broker has no configuration")
    assert await kafka_for(kafka, f"missing-{uuid4()}").kept_for() == timedelta(0)


async def test_while_kafka_cannot_be_asked_everything_is_kept(
    connection: asyncpg.Connection, database_url: str, unused_tcp_port: int
) -> None:
    await finished(connection, database_url)
    await backdate(connection)
    away = Kafka(f"127.0.0.1:{unused_tcp_port}", timeout=1.0)
    with watching() as facts:
        assert await one_round(database_url, retention_of(database_url, kafka=away)) == 0
    assert "is not known" in facts.of("RETENTION_REFUSED")[0]["reason"]


async def test_without_the_right_to_delete_the_process_lives_on(connection: asyncpg.Connection, database_url: str) -> None:
    await finished(connection, database_url)
    await backdate(connection)
    await connection.execute("REVOKE DELETE ON outbox FROM app_user")
    with watching() as facts:
        async with running(retention_of(database_url)):
            refused = await facts.until("RETENTION_REFUSED")
    assert "permission denied for table outbox" in refused["reason"]


async def test_the_relay_reads_on_beside_it(connection: asyncpg.Connection, database_url: str) -> None:
    shards = list(range(SHARDS))
    await finished(connection, database_url, 3)
    await backdate(connection)
    positions = Positions()

    async def read(reader: asyncpg.Connection) -> list[UUID]:
        due = await positions.fetch(reader, shards, 1000)
        if due.messages:
            await outbox.mark_published_if_attempt(reader, due.messages)
        await positions.handled(reader, due)
        return [message.id for message in due.messages]

    reader = await asyncpg.connect(database_url)
    try:
        assert await read(reader) == []
        async with connection.transaction():
            # As a batch that has not committed yet: to the relay, a writer at work.
            await connection.execute("DELETE FROM outbox")
            writer = await asyncpg.connect(database_url)
            try:
                first = await insert_event(writer)
                assert await read(reader) == [first]
                second = await insert_event(writer)
                assert await read(reader) == [second]
            finally:
                await writer.close()
        third = await insert_event(connection)
        assert await read(reader) == [third]
        assert await read(reader) == []
    finally:
        await reader.close()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


async def test_no_statement_reads_a_whole_table(connection: asyncpg.Connection, database_url: str) -> None:
    ids, age = [uuid4()], timedelta(days=30)
    letters = "DELETE FROM dead_letter_events WHERE ctid >= $1::tid AND ctid < $2::tid AND "
    statements: dict[str, tuple[Any, ...]] = {
        retention_module._PAGE: (list(range(SHARDS)), [0] * SHARDS, 16, age),
        retention_module._FINISHED: (ids, age, 100),
        retention_module._RETIRE: (ids, ids),
        letters + retention_module._EXPIRED["dead_letter_events"]: ((0, 0), (8, 0), age),
        **{statement_for_orders(invariant): (60.0, 120.0, ids) for invariant in INVARIANTS[:-1]},
    }
    async with opened(database_url, by_index=True) as database, database.transaction() as session:
        for statement, arguments in statements.items():
            # As it is where some orders are audited.
            await session.execute(f"SET LOCAL enable_hashjoin = {'on' if 'MATERIALIZED' in statement else 'off'}")
            told = await session.fetchval(f"EXPLAIN (FORMAT JSON) {statement}", *arguments)
            for node in nodes(json.loads(told)[0]["Plan"]):
                assert node["Node Type"] not in ("Seq Scan", "Bitmap Heap Scan"), (statement, node)
                if node["Node Type"].startswith("Index"):
                    assert "Index Cond" in node, (statement, node["Index Name"])
