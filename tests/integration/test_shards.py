"""Shards: spread evenly over the relays that live, never owned twice, taken over when a relay's session ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from orderflow.engine.outbox import SHARDS
from orderflow.engine.shards import SHARD_LOCK, Shards
from tests.rows import one_database
from tests.waiting import eventually

database_url = one_database


@pytest.fixture
async def relays(database_url: str) -> AsyncIterator[list[Shards]]:
    """Room for relays; closed afterwards."""
    made: list[Shards] = []
    yield made
    for shards in made:
        await shards.close()


async def balance(relays: list[Shards], rounds: int = 3) -> list[int]:
    """Let each take its turn until nothing moves; how many shards each owns."""
    for _ in range(rounds):
        for shards in relays:
            await shards.balance()
    owned = [shard for shards in relays for shard in shards.owned]
    assert len(owned) == len(set(owned)), "a shard has two owners"
    return [len(shards.owned) for shards in relays]


async def test_spread_over_one_two_and_three_and_back(relays: list[Shards], database_url: str) -> None:
    for expected in ([32], [16, 16], [11, 10, 11]):
        relays.append(Shards(database_url))
        assert sorted(await balance(relays)) == sorted(expected)
    while len(relays) > 1:
        await relays.pop(0).close()
        assert sum(await balance(relays)) == SHARDS
        counts = [len(shards.owned) for shards in relays]
        assert max(counts) - min(counts) <= 1


async def test_never_owned_twice_while_many_balance_at_once(relays: list[Shards], database_url: str) -> None:
    relays += [Shards(database_url) for _ in range(5)]
    for _ in range(6):
        await asyncio.gather(*(shards.balance() for shards in relays))
        owned = [shard for shards in relays for shard in shards.owned]
        assert len(owned) == len(set(owned))
    assert len(owned) == SHARDS
    assert max(len(shards.owned) for shards in relays) == 7


async def test_ownership_is_what_the_database_says(
    relays: list[Shards], database_url: str, connection: asyncpg.Connection
) -> None:
    relays += [Shards(database_url), Shards(database_url)]
    await balance(relays)
    held = await connection.fetch(
        "SELECT objid::int AS shard FROM pg_locks WHERE locktype = 'advisory' AND classid = $1 AND granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        SHARD_LOCK,
    )  # fmt: skip
    assert sorted(row["shard"] for row in held) == sorted(shard for shards in relays for shard in shards.owned)


async def test_a_killed_session_owns_nothing_from_that_moment_and_is_taken_over(
    relays: list[Shards], database_url: str, connection: asyncpg.Connection
) -> None:
    relays += [Shards(database_url), Shards(database_url)]
    await balance(relays)
    victim, heir = relays
    assert victim._connection is not None
    await connection.execute("SELECT pg_terminate_backend($1)", victim._connection.get_server_pid())
    await eventually(lambda: not victim.owned, what="the victim knows that it owns nothing")

    async def heir_has_all() -> bool:
        await heir.balance()
        return len(heir.owned) == SHARDS

    await eventually(heir_has_all)
    # The victim comes back as a newcomer: nothing of what it once had is its own without asking.
    await victim.balance()
    assert not set(victim.owned) & set(heir.owned)
    assert await balance(relays) == [16, 16]


async def test_another_database_s_relays_do_not_count(
    relays: list[Shards], database_url: str, postgres: object, connection: asyncpg.Connection
) -> None:
    elsewhere = Shards(database_url.rpartition("/")[0] + "/app_db")
    try:
        await elsewhere.balance()
        relays.append(Shards(database_url))
        assert await balance(relays) == [SHARDS]
        assert len(elsewhere.owned) == SHARDS
    finally:
        await elsewhere.close()


async def test_a_change_is_told(relays: list[Shards], database_url: str) -> None:
    relays.append(Shards(database_url))
    assert await relays[0].balance()
    assert not await relays[0].balance()
    relays.append(Shards(database_url))
    assert not await relays[1].balance()
    assert await relays[0].balance()
    assert await relays[1].balance()
