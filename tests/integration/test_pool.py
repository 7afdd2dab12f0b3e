"""The pool of a role: what it does with connections that have become useless."""

from __future__ import annotations

import asyncpg
import pytest

from tests.pipeline import opened


async def test_connections_that_were_made_to_a_standby_are_left(connection: asyncpg.Connection, database_url: str) -> None:
    name = await connection.fetchval("SELECT current_database()")
    insert = "INSERT INTO processed_events VALUES (gen_random_uuid(), 'w')"
    # What a session begins with stays with it, as a session with a server that was a standby stays with that server.
    await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with opened(database_url, size=2) as database:
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await database.fetch(insert)
        # It is the primary now, or another server is.
        await connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        refused = 0
        for _ in range(3):
            try:
                await database.fetch(insert)
            except asyncpg.ReadOnlySQLTransactionError:
                refused += 1
    assert refused == 0
    assert await connection.fetchval("SELECT count(*) FROM processed_events") == 3
