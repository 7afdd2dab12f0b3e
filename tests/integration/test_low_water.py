"""Where the relay reads on: nothing that commits late is lost, and the low-water mark passes nothing that may still come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest

from orderflow.engine import low_water, outbox
from orderflow.engine.low_water import NEVER_PUBLISHED, Positions
from orderflow.engine.outbox import SHARDS
from tests.rows import insert_event

EVERYTHING = list(range(SHARDS))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round looks at the writers and saves the mark; nobody is set apart unless a test wants it."""
    for name, seconds in {"LOOK_EVERY": 0.0, "LOOK_EVERY_IDLE": 0.0, "SAVE_EVERY": 0.0, "LONG": 3600.0}.items():
        monkeypatch.setattr(low_water, name, seconds)


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The session of another program."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def round_of(positions: Positions, connection: asyncpg.Connection, limit: int = 1000) -> list[UUID]:
    """One round of a relay that owns every shard and publishes whatever it finds."""
    due = await positions.fetch(connection, EVERYTHING, limit)
    await outbox.mark_published_if_attempt(connection, due.messages)
    await positions.handled(connection, due)
    return [message.id for message in due.messages]


async def marks(connection: asyncpg.Connection) -> dict[int, int]:
    return dict(await connection.fetch("SELECT shard, seq FROM outbox_low_water"))


async def last_number(connection: asyncpg.Connection) -> int:
    return await connection.fetchval("SELECT max(seq) FROM outbox")


async def test_the_mark_follows_what_is_published_and_a_new_relay_begins_there(connection: asyncpg.Connection) -> None:
    positions = Positions()
    events = [await insert_event(connection) for _ in range(20)]
    assert sorted(await round_of(positions, connection)) == sorted(events)
    assert await round_of(positions, connection) == []
    assert await marks(connection) == dict.fromkeys(EVERYTHING, await last_number(connection))
    assert await connection.fetch(NEVER_PUBLISHED) == []
    late = await insert_event(connection)
    assert [row["event_id"] for row in await connection.fetch(NEVER_PUBLISHED)] == [late]
    assert await round_of(Positions(), connection) == [late]


@pytest.mark.parametrize("long", [3600.0, 0.0], ids=["waited for", "set apart"])
async def test_a_row_that_commits_after_its_successors_is_found_and_holds_the_saved_mark(
    connection: asyncpg.Connection, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, long: float
) -> None:
    monkeypatch.setattr(low_water, "LONG", long)
    positions = Positions()
    aggregate = uuid4()
    transaction = other.transaction()
    await transaction.start()
    late = await insert_event(other, aggregate)
    others = [await insert_event(connection, aggregate) for _ in range(3)]
    assert await round_of(positions, connection) == others
    for _ in range(3):
        assert await round_of(positions, connection) == []
        assert await marks(connection) == {}
    shard = await connection.fetchval("SELECT shard FROM outbox LIMIT 1")
    assert (positions._mark[shard] > 0) is (long == 0.0)
    await transaction.commit()
    # What is written after its end is not published before it.
    last = await insert_event(connection, aggregate)
    assert await round_of(positions, connection) == [late, last]
    for _ in range(3):
        assert await round_of(positions, connection) == []
    assert set((await marks(connection)).values()) == {await last_number(connection)}


async def test_a_session_that_wrote_before_writes_behind_no_mark(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    positions = Positions()
    events = [await insert_event(connection), await insert_event(other)]
    for _ in range(2):
        await round_of(positions, connection)
    assert len(await marks(connection)) == SHARDS
    # Not a number that this session has put aside when it wrote the first one.
    events.append(await insert_event(connection))
    assert await round_of(positions, connection) == events[2:]


async def test_one_of_two_that_are_set_apart_ends(
    connection: asyncpg.Connection, other: asyncpg.Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_water, "LONG", 0.0)
    third = await asyncpg.connect(database_url)
    positions = Positions()
    first_transaction, second_transaction = other.transaction(), third.transaction()
    await first_transaction.start()
    await second_transaction.start()
    rows = [await insert_event(other), await insert_event(third)]
    between = await insert_event(connection)
    assert await round_of(positions, connection) == [between]
    await round_of(positions, connection)
    await first_transaction.commit()
    assert await round_of(positions, connection) == rows[:1]
    for _ in range(3):
        assert await round_of(positions, connection) == []
    await second_transaction.commit()
    assert await round_of(positions, connection) == rows[1:]
    for _ in range(3):
        await round_of(positions, connection)
    assert set((await marks(connection)).values()) == {await last_number(connection)}
    await third.close()


async def test_a_transaction_that_never_touched_the_outbox_holds_nothing_up(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    positions = Positions()
    async with other.transaction(isolation="repeatable_read"):
        await other.execute("INSERT INTO gateway_control (mode) VALUES ('random') ON CONFLICT DO NOTHING")
        await other.fetchval("SELECT pg_current_xact_id()")
        await insert_event(connection)
        assert len(await round_of(positions, connection)) == 1
        await round_of(positions, connection)
        assert len(await marks(connection)) == SHARDS


async def test_a_shard_of_which_only_a_part_was_fetched_keeps_its_mark_behind_the_rest(connection: asyncpg.Connection) -> None:
    aggregate = uuid4()
    events = [await insert_event(connection, aggregate) for _ in range(100)]
    positions = Positions()
    # The fence is known before the fetch.
    await positions.fetch(connection, EVERYTHING, 32)
    await positions._look(connection, 0.0)
    found = await round_of(positions, connection, limit=32)
    assert found == events[:32]
    shard = await connection.fetchval("SELECT shard FROM outbox LIMIT 1")
    assert (await marks(connection))[shard] == await connection.fetchval(
        "SELECT seq FROM outbox WHERE event_id = $1", found[-1]
    )
    while more := await round_of(positions, connection, limit=32):
        found += more
    assert found == events


async def test_numbers_that_begin_anew(connection: asyncpg.Connection) -> None:
    positions = Positions()
    for _ in range(5):
        await insert_event(connection)
    for _ in range(2):
        await round_of(positions, connection)
    assert len(await marks(connection)) == SHARDS
    await connection.execute("TRUNCATE outbox RESTART IDENTITY")
    event_id = await insert_event(connection)
    # Its number is behind the mark, until the fence is looked at.
    assert await round_of(positions, connection) == []
    assert await round_of(positions, connection) == [event_id]


AGAIN = {
    "published before": "UPDATE outbox SET published_at = NULL",
    "scheduled, and then not": "UPDATE outbox SET published_at = NULL, available_at = now() + interval '1 h';"
    "UPDATE outbox SET available_at = NULL",
    "buried, and then not": "UPDATE outbox SET published_at = NULL, available_at = 'infinity';"
    "UPDATE outbox SET available_at = NULL",
}


@pytest.mark.parametrize("case", AGAIN)
async def test_whatever_plain_sql_makes_due_again_is_found_behind_the_mark(connection: asyncpg.Connection, case: str) -> None:
    positions = Positions()
    event_id = await insert_event(connection)
    for _ in range(2):
        await round_of(positions, connection)
    assert len(await marks(connection)) == SHARDS
    await connection.execute(AGAIN[case])
    assert await round_of(positions, connection) == [event_id]
    assert await round_of(positions, connection) == []


async def test_no_row_is_lost_whatever_the_order_of_commits(connection: asyncpg.Connection, database_url: str) -> None:
    positions = Positions()
    pool = await asyncpg.create_pool(database_url, min_size=8, max_size=8)
    assert pool is not None
    written: list[UUID] = []

    async def write(number: int) -> None:
        for turn in range(30):
            async with pool.acquire() as writer, writer.transaction():
                written.append(await insert_event(writer))
                # Transactions of many lengths, so that they overlap in many ways.
                await writer.execute("SELECT pg_sleep($1)", (number * turn % 7) / 200)

    async with pool:
        writers = asyncio.gather(*(write(number) for number in range(8)))
        found: list[UUID] = []
        while not writers.done():
            found += await round_of(positions, connection, limit=64)
        await writers
        for _ in range(3):
            found += await round_of(positions, connection)
    assert sorted(found) == sorted(written)
