"""The relay against real PostgreSQL and Kafka: everything due is published in order, and marked when Kafka has it."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.client import AIOKafkaClient

from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine.handoff import Handoff
from orderflow.engine.outbox import SHARDS
from orderflow.engine.patience import DependencyUnavailable
from orderflow.engine.relay import Relay
from orderflow.engine.shards import SHARD_LOCK
from orderflow.payments.handlers import FailOrder
from orderflow.supervisor import Service
from tests.pipeline import Facts, kafka_for, opening, running, watching
from tests.rows import dead_letter, events_of, insert_event, order_row, place
from tests.servers import Broker
from tests.topics import records_in
from tests.waiting import eventually

NEVER = 3600.0
OUR_SESSIONS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
)


def relay_on(
    url: str, broker: Broker, topic: str, *, timeout: float = 10.0, handoff: Handoff | None = None, **options: Any
) -> Relay:
    options = {"burials": {"OrderCreated": FailOrder()}, "poll": 0.2, **options}
    return Relay(opening(url), url, kafka_for(broker, topic, timeout=timeout), handoff or Handoff(), **options)


class Restarted:
    """A role that is started again when Kafka lets it down, as the supervisor does."""

    def __init__(self, role: Service) -> None:
        self.name = role.name
        self._role = role
        self.failures = 0

    async def run(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                await self._role.run(stopping)
            except DependencyUnavailable:
                self.failures += 1


@asynccontextmanager
async def relaying(url: str, broker: Broker, topic: str, count: int = 1, **options: Any) -> AsyncIterator[Facts]:
    """Relays that have come up; what they tell."""
    with watching() as facts:
        async with running(*(relay_on(url, broker, topic, **options) for _ in range(count))):
            await facts.until("STARTUP", count=count)
            yield facts


async def unpublished(connection: asyncpg.Connection) -> int:
    return await connection.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NULL")


async def all_published(connection: asyncpg.Connection) -> None:
    await eventually(lambda: is_zero(connection), 30, what="every row is published")


async def is_zero(connection: asyncpg.Connection) -> bool:
    return await unpublished(connection) == 0


async def test_a_row_of_plain_sql_becomes_the_contract_s_record(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    aggregate, created = uuid4(), datetime.fromisoformat("2026-05-01T12:00:00.123456+00:00")
    async with relaying(database_url, kafka, topic) as facts:
        event_id = await connection.fetchval(
            "INSERT INTO outbox (event_id, event_type, aggregate_type, aggregate_id, payload, created_at, headers)"
            " VALUES (gen_random_uuid(), 'Shipped', 'parcel', $1, $2, $3, $4) RETURNING event_id",
            aggregate, '{"amount": 10.50, "who": "Zoë"}', created, '{"traceparent": "00-ab", "attempt": "9", "odd": 1}',
        )  # fmt: skip
        assert await facts.until("EVENT_PUBLISHED") == {"eventId": event_id, "eventType": "Shipped", "aggregateId": aggregate}
        await all_published(connection)
    (record,) = await records_in(kafka, topic)
    assert record.key == str(aggregate).encode()
    assert json.loads(record.value) == {
        "eventId": str(event_id), "eventType": "Shipped", "aggregateId": str(aggregate), "aggregateType": "parcel",
        "payload": {"amount": 10.5, "who": "Zoë"}, "createdAt": "2026-05-01T12:00:00.123456+00:00",
    }  # fmt: skip
    # Decimals as they were written, and not by way of a float.
    assert b'"amount": 10.50' in record.value
    assert list(record.headers) == [
        ("event-id", str(event_id).encode()), ("event-type", b"Shipped"), ("attempt", b"1"), ("traceparent", b"00-ab"),
    ]  # fmt: skip


async def test_a_notification_is_enough_and_no_poll_is_needed(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    handoff = Handoff()
    async with relaying(database_url, kafka, topic, handoff=handoff, poll=NEVER) as facts:
        for number in range(1, 6):
            await asleep(handoff)
            await insert_event(connection)
            await facts.until("EVENT_PUBLISHED", count=number)


async def asleep(handoff: Handoff) -> None:
    """Until the relay waits: what is written before that is found by the look that precedes it."""
    await eventually(lambda: handoff.is_wanted and not handoff.woken.is_set(), 30, what="the relay waits")


async def test_a_lost_notification_is_found_by_the_poll(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    handoff = Handoff()
    async with relaying(database_url, kafka, topic, handoff=handoff) as facts:
        await connection.execute("ALTER TABLE outbox DISABLE TRIGGER outbox_wake")
        for number in range(1, 4):
            await asleep(handoff)
            await insert_event(connection)
            await facts.until("EVENT_PUBLISHED", count=number)


async def test_the_listen_connection_is_ended_and_the_relay_hears_again(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    async with relaying(database_url, kafka, topic, poll=NEVER, heartbeat=0.5) as facts:
        for number in range(1, 4):
            await connection.execute(OUR_SESSIONS, "orderflow wake")
            # Heard by the new connection, or found by the look that follows the reconnect.
            await insert_event(connection)
            await facts.until("EVENT_PUBLISHED", count=number)


async def test_scheduled_rows_are_published_when_due_and_buried_ones_never(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    soon, later, buried = [await insert_event(connection) for _ in range(3)]
    await connection.execute("UPDATE outbox SET available_at = now() + interval '300 ms' WHERE event_id = $1", soon)
    await connection.execute("UPDATE outbox SET available_at = now() + interval '1 hour' WHERE event_id = $1", later)
    await connection.execute("UPDATE outbox SET available_at = 'infinity' WHERE event_id = $1", buried)
    due_at = await connection.fetchval("SELECT available_at FROM outbox WHERE event_id = $1", soon)
    async with relaying(database_url, kafka, topic, poll=NEVER) as facts:
        # The relay sleeps until then, not until its next poll.
        await facts.until("EVENT_PUBLISHED", eventId=soon)
        await eventually(lambda: connection.fetchval("SELECT published_at FROM outbox WHERE event_id = $1", soon))
        assert await connection.fetchval("SELECT published_at FROM outbox WHERE event_id = $1", soon) >= due_at
        last = await insert_event(connection)
        await facts.until("EVENT_PUBLISHED", eventId=last)
        assert {fact["eventId"] for fact in facts.of("EVENT_PUBLISHED")} == {soon, last}


async def test_a_transaction_that_commits_late_is_not_lost(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    late = await asyncpg.connect(database_url, timeout=10)
    try:
        async with relaying(database_url, kafka, topic, poll=NEVER) as facts:
            transaction = late.transaction()
            await transaction.start()
            early_id = await insert_event(late)
            for number in range(1, 4):
                await insert_event(connection)
                await facts.until("EVENT_PUBLISHED", count=number)
            assert facts.of("EVENT_PUBLISHED", eventId=early_id) == []
            await transaction.commit()
            await facts.until("EVENT_PUBLISHED", eventId=early_id)
    finally:
        await late.close()


async def test_order_within_each_aggregate_over_rounds_restarts_and_relays(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    aggregates = [uuid4() for _ in range(40)]
    written: dict[UUID, list[UUID]] = defaultdict(list)

    async def write(rounds: int) -> None:
        for _ in range(rounds):
            rows = await connection.fetch(
                "INSERT INTO outbox (event_type, aggregate_id) SELECT 'Moved', a FROM unnest($1::uuid[]) AS t(a)"
                " RETURNING event_id, aggregate_id",
                aggregates,
            )
            for row in rows:
                written[row["aggregate_id"]].append(row["event_id"])

    # Small rounds, so that an aggregate's events are spread over many of them.
    await write(10)
    async with relaying(database_url, kafka, topic, batch=64) as facts:
        await write(10)
        await facts.until("EVENT_PUBLISHED", count=100)
    await write(5)
    async with relaying(database_url, kafka, topic, count=2, batch=64):
        await write(10)
        await all_published(connection)
    published: dict[UUID, list[UUID]] = defaultdict(list)
    for record in await records_in(kafka, topic):
        published[UUID(record.key.decode())].append(UUID(json.loads(record.value)["eventId"]))
    assert published == written


async def test_nothing_is_marked_before_kafka_has_it_and_nothing_is_lost_when_it_dies(
    connection: asyncpg.Connection, database_url: str, restartable_kafka: ApacheKafka
) -> None:
    broker, aggregate = restartable_kafka, uuid4()
    written = [await insert_event(connection, aggregate)]
    relay = Restarted(relay_on(database_url, broker, "events", timeout=3.0))
    with watching() as facts:
        async with running(relay):
            await facts.until("EVENT_PUBLISHED", eventId=written[0])
            await all_published(connection)
            await broker.pause()
            written += [await insert_event(connection, aggregate) for _ in range(3)]
            await eventually(lambda: sending(connection), what="the relay has fetched the rows")
            assert (await unpublished(connection), len(facts.of("EVENT_PUBLISHED"))) == (3, 1)
            await broker.resume()
            await facts.until("EVENT_PUBLISHED", eventId=written[-1])
            await all_published(connection)
            await broker.kill()
            written += [await insert_event(connection, aggregate) for _ in range(3)]
            await facts.until("PUBLISH_INTERRUPTED")
            await eventually(lambda: relay.failures, 30, what="the round is over, marks and all")
            assert await unpublished(connection) == 3
            await broker.start()
            await all_published(connection)
    found = [UUID(json.loads(record.value)["eventId"]) for record in await records_in(broker, "events")]
    # At least once: what was sent before the kill may be there again, but its first time is in its place.
    assert [event_id for index, event_id in enumerate(found) if event_id not in found[:index]] == written


async def sending(connection: asyncpg.Connection) -> bool:
    """Whether the relay's last statement was a fetch, which is followed by a mark only when Kafka has answered."""
    return await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'orderflow'"
        " AND state = 'idle' AND query LIKE '%CROSS JOIN LATERAL%')"
    )


async def topic_with(broker: Broker, name: str, **configs: str) -> None:
    """A topic of one partition with settings of its own."""
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        configured = {key.replace("_", "."): value for key, value in configs.items()}
        await admin.create_topics([NewTopic(name, 1, 1, topic_configs=configured)])
    finally:
        await admin.close()


async def test_every_replica_in_sync_has_to_acknowledge(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What one broker does cannot show it; what is asked of it can.
    asked: list[int] = []
    send = AIOKafkaClient.send

    async def noted(client: AIOKafkaClient, node_id: int, request: Any, **options: Any) -> Any:
        if hasattr(request, "required_acks"):
            asked.append(request.required_acks)
        return await send(client, node_id, request, **options)

    monkeypatch.setattr(AIOKafkaClient, "send", noted)
    async with relaying(database_url, kafka, topic) as facts:
        await insert_event(connection)
        await facts.until("EVENT_PUBLISHED")
    assert set(asked) == {-1}


async def test_every_batch_carries_its_producer_s_id(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    # By which the broker tells a batch that is sent again, as after a lost acknowledgement, from a new one.
    if not isinstance(kafka, ApacheKafka):
        pytest.skip("the mock broker keeps its records to itself")
    async with relaying(database_url, kafka, topic) as facts:
        await insert_event(connection)
        await facts.until("EVENT_PUBLISHED")
    (written,) = filter(None, (segment.read_bytes() for segment in kafka.data_dir.glob(f"data/{topic}-*/*.log")))
    (producer_id,) = struct.unpack_from(">q", written, PRODUCER_ID_AT)
    assert producer_id >= 0


# Bytes into a record batch, of which a segment begins with the first: docs of Kafka, "Record Batch".
PRODUCER_ID_AT = 43

BIG = json.dumps({"note": "x" * 1_500_000})


async def test_an_unpublishable_row_is_buried_and_the_rest_goes_on(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    ((order_id, _), (terminal_id, _)) = await place(connection, 2)
    await connection.execute(
        "UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, entered_at = entered_at || now() WHERE id = $1", terminal_id
    )
    await connection.execute(
        "UPDATE orders SET state = 'PAID', version = 3, entered_at = entered_at || now() WHERE id = $1", terminal_id
    )
    before = await insert_event(connection, order_id)
    big = await insert_event(connection, order_id, "OrderCreated", BIG)
    bigger = await insert_event(connection, order_id, "Shipped", BIG)
    # Its order has ended already: the event is as unpublishable as before.
    of_the_ended = await insert_event(connection, terminal_id, "OrderCreated", BIG)
    after = await insert_event(connection, order_id)
    async with relaying(database_url, kafka, topic) as facts:
        await facts.until("EVENT_PUBLISHED", eventId=after)
        await facts.until("DLQ_EVENT", count=3)
        later = await insert_event(connection)
        await facts.until("EVENT_PUBLISHED", eventId=later)
    assert facts.of("EVENT_PUBLISHED", eventId=before)
    for event_id in (big, bigger, of_the_ended):
        letter = await dead_letter(connection, event_id)
        assert letter is not None
        assert letter["reason"].startswith("Cannot be published: ")
        assert letter["error_class"] == "MessageSizeTooLargeError"
        assert len(json.loads(letter["attempts"])) == 1
        row = await connection.fetchrow(
            "SELECT published_at, available_at = 'infinity' AS out FROM outbox WHERE event_id = $1", event_id
        )
        assert tuple(row) == (None, True)
    assert await order_row(connection, order_id) == ("FAILED", 2, "error")
    assert await order_row(connection, terminal_id) == ("PAID", 3, None)
    assert (await events_of(connection, order_id)).count("OrderFailed") == 1
    assert facts.of("STATE_CHANGE") == [{"orderId": order_id, "oldState": "CREATED", "newState": "FAILED"}]


async def test_a_replay_that_can_no_longer_be_published_does_not_spin(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    # Processed long ago, when the broker still took records of that size.
    event_id = await insert_event(connection, payload=BIG)
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", event_id)
    async with relaying(database_url, kafka, topic) as facts:
        await eventually(
            lambda: connection.fetchval("SELECT available_at = 'infinity' FROM outbox WHERE event_id = $1", event_id), 20
        )
        last = await insert_event(connection)
        await facts.until("EVENT_PUBLISHED", eventId=last)
    assert await dead_letter(connection, event_id) is None


async def test_a_limit_of_the_broker_s_own_finds_the_guilty_row_only(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    if not isinstance(kafka, ApacheKafka):
        pytest.skip("the mock broker has no limit of its own")
    small = f"small-{topic}"
    await topic_with(kafka, small, max_message_bytes="20000")
    innocent = [await insert_event(connection) for _ in range(5)]
    guilty = await insert_event(connection, payload=json.dumps({"note": "x" * 50_000}))
    innocent += [await insert_event(connection) for _ in range(5)]
    with watching() as facts:
        # The refusal leaves the producer stuck: the role ends its run at once, and the supervisor starts it again.
        async with running(Restarted(relay_on(database_url, kafka, small))):
            await facts.until("DLQ_EVENT", eventId=guilty)
            await facts.until("EVENT_PUBLISHED", count=10, timeout=9.0)
            # Alone in its batch, and with others behind it.
            alone = await insert_event(connection, payload=json.dumps({"note": "y" * 50_000}))
            await facts.until("DLQ_EVENT", eventId=alone, timeout=9.0)
            innocent.append(await insert_event(connection))
            await facts.until("EVENT_PUBLISHED", eventId=innocent[-1], timeout=9.0)
    assert {fact["eventId"] for fact in facts.of("EVENT_PUBLISHED")} == set(innocent)
    assert len(facts.of("DLQ_EVENT")) == 2
    found = {UUID(json.loads(record.value)["eventId"]) for record in await records_in(kafka, small)}
    assert found == set(innocent)


MADE_UP = ["[]", "null", '"text"', '{"a": 1, "b": null, "c": {"d": 1}}', '{"\\u00e9": "\\ud83d\\ude00"}']


async def test_headers_that_another_program_has_made_up(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    for headers in MADE_UP:
        event_id = await insert_event(connection)
        await connection.execute("UPDATE outbox SET headers = $2 WHERE event_id = $1", event_id, headers)
    async with relaying(database_url, kafka, topic) as facts:
        await facts.until("EVENT_PUBLISHED", count=len(MADE_UP))


async def test_times_beyond_the_calendar_do_not_stop_the_relay(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    for when in ("infinity", "-infinity", "0044-03-15 12:00 BC"):
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute("INSERT INTO outbox (event_type, aggregate_id, created_at)"
                                     f" VALUES ('X', gen_random_uuid(), '{when}')")  # fmt: skip
    for when in ("0002-01-01 UTC", "9998-12-31 UTC"):
        await connection.execute("INSERT INTO outbox (event_type, aggregate_id, created_at)"
                                 f" VALUES ('X', gen_random_uuid(), '{when}')")  # fmt: skip
    async with relaying(database_url, kafka, topic) as facts:
        await facts.until("EVENT_PUBLISHED", count=2)


async def owners(connection: asyncpg.Connection) -> list[int]:
    rows = await connection.fetch(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) GROUP BY pid ORDER BY 1",
        SHARD_LOCK,
    )
    return [row["count"] for row in rows]


async def test_three_relays_share_the_work_and_two_take_over_from_a_lost_one(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    async with relaying(database_url, kafka, topic, count=2) as facts:
        stopping = asyncio.Event()
        third = asyncio.create_task(relay_on(database_url, kafka, topic).run(stopping))

        async def spread(wanted: list[int]) -> None:
            async def is_spread() -> bool:
                found = await owners(connection)
                assert found == wanted
                return True

            await eventually(is_spread, 20)

        await spread([10, 11, 11])
        for _ in range(60):
            await insert_event(connection)
        await facts.until("EVENT_PUBLISHED", count=60)
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        await spread([16, 16])
        for _ in range(60):
            await insert_event(connection)
        await facts.until("EVENT_PUBLISHED", count=120)
    assert await owners(connection) == []
    assert len(await records_in(kafka, topic)) == 120


async def test_a_relay_whose_lock_session_is_gone_publishes_nothing_until_it_has_a_new_one(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    async with relaying(database_url, kafka, topic) as facts:
        first = await insert_event(connection)
        await facts.until("EVENT_PUBLISHED", eventId=first)
        # Somebody else has taken all shards in the moment in which the session ended.
        async with connection.transaction():
            await connection.execute("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
            await connection.execute(OUR_SESSIONS, "orderflow shards")
            await eventually(lambda: no_owner(connection), 20)
            for shard in range(SHARDS):
                assert await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", SHARD_LOCK, shard)
        second = await insert_event(connection)
        await eventually(lambda: came_back(connection), 20, what="the relay has a session again")
        await asyncio.wait_for(asyncio.shield(quiet(facts, second)), 20)
        for shard in range(SHARDS):
            await connection.fetchval("SELECT pg_advisory_unlock($1, $2)", SHARD_LOCK, shard)
        await facts.until("EVENT_PUBLISHED", eventId=second)


async def no_owner(connection: asyncpg.Connection) -> bool:
    return await owners(connection) == []


async def came_back(connection: asyncpg.Connection) -> bool:
    return await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'orderflow shards'"
        " AND query LIKE '%pg_try_advisory_lock%' AND state = 'idle')"
    )


async def quiet(facts: Facts, event_id: UUID) -> None:
    assert facts.of("EVENT_PUBLISHED", eventId=event_id) == []


async def test_stopping_finishes_the_round(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str
) -> None:
    for _ in range(200):
        await insert_event(connection)
    async with relaying(database_url, kafka, topic, batch=64) as facts:
        await facts.until("EVENT_PUBLISHED")
    told = {fact["eventId"] for fact in facts.of("EVENT_PUBLISHED")}
    rows = await connection.fetch("SELECT event_id FROM outbox WHERE published_at IS NOT NULL")
    # What Kafka has acknowledged is marked before the relay ends.
    assert {row["event_id"] for row in rows} == told
    assert {UUID(json.loads(record.value)["eventId"]) for record in await records_in(kafka, topic)} == told
