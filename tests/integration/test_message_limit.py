"""The topic's own message limit is below what a round makes of a batch: what fits alone is published, in order, and the rest
is buried."""

from __future__ import annotations

import json
from collections import defaultdict
from uuid import UUID, uuid4

import asyncpg
import pytest

from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine.kafka import MAX_BATCH_BYTES
from tests.integration.test_relay import Restarted, relay_on, topic_with
from tests.pipeline import kafka_for, running, watching
from tests.rows import dead_letter, insert_event
from tests.servers import Broker
from tests.topics import limited_to, records_in

AGGREGATES = 10
COUNT = 130


@pytest.fixture
async def single(kafka: Broker, topic: str) -> str:
    """A topic of one partition."""
    if not isinstance(kafka, ApacheKafka):
        pytest.skip("the mock broker has no limit of its own")
    name = f"single-{topic}"
    await topic_with(kafka, name)
    return name


async def written(connection: asyncpg.Connection, size: int, *too_large: int) -> tuple[dict[UUID, list[UUID]], list[UUID]]:
    """Events by turns of ten aggregates, and among them, at these places, some of 50,000 bytes; all committed at once."""
    aggregates, fitting, guilty = [uuid4() for _ in range(AGGREGATES)], defaultdict(list), []
    async with connection.transaction():
        for number in range(COUNT):
            aggregate = aggregates[number % AGGREGATES]
            if number in too_large:
                guilty.append(await insert_event(connection, aggregate, payload=json.dumps({"note": "y" * 50_000})))
            fitting[aggregate].append(await insert_event(connection, aggregate, payload=json.dumps({"note": "x" * size})))
    return fitting, guilty


async def published(kafka: Broker, topic: str) -> dict[UUID, list[UUID]]:
    """The events of each aggregate, in the order in which they stand in Kafka."""
    found = defaultdict(list)
    for record in await records_in(kafka, topic):
        found[UUID(record.key.decode())].append(UUID(json.loads(record.value)["eventId"]))
    return found


# With the larger one, the first batch of the round is refused and the second is not.
@pytest.mark.parametrize("limit", [5_000, 200_000])
async def test_a_batch_above_a_limit_that_was_lowered_is_divided_and_keeps_its_order(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, single: str, limit: int
) -> None:
    with watching() as facts:
        relay = Restarted(relay_on(database_url, kafka, single))
        async with running(relay):
            await facts.until("STARTUP")
            await limited_to(kafka, single, limit)
            fitting, _ = await written(connection, 2_000)
            await facts.until("EVENT_PUBLISHED", count=COUNT)
            assert relay.failures == 1
            await facts.until("STARTUP", count=2)
            # The limit is known to the producer that has come: nothing is refused any more.
            more, _ = await written(connection, 2_000)
            await facts.until("EVENT_PUBLISHED", count=COUNT * 2)
    assert relay.failures == 1
    assert await published(kafka, single) == fitting | more
    assert await connection.fetchval("SELECT count(*) FROM dead_letter_events") == 0


async def test_what_never_fits_is_buried_and_the_rest_goes_on(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, single: str
) -> None:
    with watching() as facts:
        relay = Restarted(relay_on(database_url, kafka, single))
        async with running(relay):
            await facts.until("STARTUP")
            await limited_to(kafka, single, 5_000)
            fitting, guilty = await written(connection, 200, 0, 3, 4, 50, COUNT - 1)
            await facts.until("EVENT_PUBLISHED", count=COUNT)
            await facts.until("DLQ_EVENT", count=len(guilty))
    assert await published(kafka, single) == fitting
    for event_id in guilty:
        letter = await dead_letter(connection, event_id)
        assert letter is not None
        assert "the broker refuses it: raise the topic's max.message.bytes" in letter["reason"]
        assert len(json.loads(letter["attempts"])) == 1
    # Not one for each of them.
    assert relay.failures <= 2


async def test_batches_are_as_large_as_the_topic_takes_them(kafka: Broker, single: str) -> None:
    cluster = kafka_for(kafka, single)
    assert await cluster.largest_batch() == MAX_BATCH_BYTES
    await limited_to(kafka, single, 5_000)
    assert await cluster.largest_batch() == 5_000
    assert await kafka_for(kafka, f"missing-{single}").largest_batch() == MAX_BATCH_BYTES
