"""Migrating: from nothing, again, from many processes at once, step by step, and refusing what does not fit."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from orderflow import migrations
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine.patience import DependencyUnavailable, Misconfigured
from orderflow.migrations import VERSION, Migrated, check, current_version, migrate, upgrade_steps
from tests.fleet import Fleet
from tests.servers import cloned_database

NEXT = VERSION + 1
# schema.sql as it was in each earlier version.
SCHEMAS = Path(__file__).parent.parent / "schemas"


@pytest.fixture
async def empty_url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A fresh database without the schema."""
    async with cloned_database(postgres, "template1") as url:
        yield url


async def versions(url: str) -> list[int]:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return [row["version"] for row in await connection.fetch("SELECT version FROM schema_version ORDER BY version")]
    finally:
        await connection.close()


async def test_from_nothing_and_again(empty_url: str) -> None:
    assert await migrate(empty_url) == Migrated(0, VERSION)
    assert await migrate(empty_url) == Migrated(VERSION, VERSION)
    assert await versions(empty_url) == [VERSION]


async def test_many_at_once_and_exactly_one_does_it(empty_url: str) -> None:
    results = await asyncio.gather(*(migrate(empty_url) for _ in range(12)))
    assert sorted(result.before for result in results) == [0] + [VERSION] * 11
    assert await versions(empty_url) == [VERSION]


async def test_many_processes_at_once(empty_url: str) -> None:
    async with Fleet(empty_url, None, "unused") as fleet:
        processes = [await fleet.start("migrate") for _ in range(4)]
        assert [await process.end() for process in processes] == [0] * 4, [process.errors for process in processes]
    assert await versions(empty_url) == [VERSION]


# Everything that a schema consists of, by name, as PostgreSQL writes it.
CATALOG = """
SELECT 'column ' || table_name || '.' || column_name AS name, data_type || coalesce(column_default, '') || is_nullable AS text
FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL SELECT 'constraint ' || conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT 'trigger ' || tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
UNION ALL SELECT 'function ' || proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT 'index ' || indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT 'options ' || relname, ARRAY(SELECT unnest(reloptions) ORDER BY 1)::text FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
"""


async def catalog(url: str) -> dict[str, str]:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return {row["name"]: row["text"] for row in await connection.fetch(CATALOG)}
    finally:
        await connection.close()


@pytest.mark.parametrize("released", sorted(SCHEMAS.glob("*.sql")), ids=lambda file: file.stem)
async def test_an_upgrade_from_every_version_gives_the_schema_of_today(
    empty_url: str, database_url: str, released: Path
) -> None:
    connection = await asyncpg.connect(empty_url, timeout=10)
    try:
        await connection.execute(released.read_text("utf-8"))
        await connection.execute("INSERT INTO schema_version (version) VALUES ($1)", int(released.stem))
    finally:
        await connection.close()
    assert await migrate(empty_url) == Migrated(int(released.stem), VERSION)
    assert await catalog(empty_url) == await catalog(database_url)


async def test_a_database_without_the_schema_is_refused_with_the_command_that_helps(empty_url: str) -> None:
    connection = await asyncpg.connect(empty_url, timeout=10)
    try:
        assert await current_version(connection) == 0
        with pytest.raises(Misconfigured, match=r"no orderflow schema: run `orderflow migrate`"):
            await check(connection)
    finally:
        await connection.close()


async def test_a_schema_that_is_too_old_is_refused_with_the_command_that_helps(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "VERSION", NEXT)
    with pytest.raises(Misconfigured, match=rf"schema version {VERSION}, needed is {NEXT}: run `orderflow migrate`"):
        await check(connection)


async def test_a_schema_that_is_too_new_is_refused_by_start_and_by_migrate(
    connection: asyncpg.Connection, database_url: str
) -> None:
    await connection.execute("INSERT INTO schema_version (version) VALUES ($1)", NEXT)
    with pytest.raises(Misconfigured, match=rf"schema version {NEXT}, this program knows {VERSION}: install the orderflow"):
        await check(connection)
    with pytest.raises(Misconfigured, match="install the orderflow"):
        await migrate(database_url)


async def test_an_upgrade_runs_each_step_once_and_in_order(connection: asyncpg.Connection, database_url: str) -> None:
    steps = {
        VERSION + 2: "INSERT INTO stepped VALUES ('second')",
        VERSION + 1: "CREATE TABLE stepped (what text); INSERT INTO stepped VALUES ('first')",
    }
    results = await asyncio.gather(*(migrate(database_url, target=VERSION + 2, steps=steps) for _ in range(5)))
    assert sorted(result.before for result in results) == [VERSION] + [VERSION + 2] * 4
    assert [row["what"] for row in await connection.fetch("SELECT what FROM stepped")] == ["first", "second"]
    assert await versions(database_url) == [VERSION, VERSION + 1, VERSION + 2]


async def test_a_step_that_fails_half_way_leaves_the_version_before_it(
    connection: asyncpg.Connection, database_url: str
) -> None:
    steps = {
        VERSION + 1: "CREATE TABLE first_step ()",
        VERSION + 2: "CREATE TABLE half_done (); INSERT INTO half_done SELECT 1 / 0",
        VERSION + 3: "CREATE TABLE never_reached ()",
    }
    with pytest.raises(asyncpg.PostgresError):
        await migrate(database_url, target=VERSION + 3, steps=steps)
    assert await current_version(connection) == VERSION + 1
    for table, there in [("first_step", True), ("half_done", False), ("never_reached", False)]:
        assert (await connection.fetchval("SELECT to_regclass($1)", table) is not None) is there
    steps[VERSION + 2] = "CREATE TABLE half_done ()"
    assert await migrate(database_url, target=VERSION + 3, steps=steps) == Migrated(VERSION + 1, VERSION + 3)


async def test_a_missing_step_is_told_before_anything_is_done(connection: asyncpg.Connection, database_url: str) -> None:
    with pytest.raises(Misconfigured, match=rf"no upgrade leads to schema version {NEXT}"):
        await migrate(database_url, target=NEXT, steps={})
    assert await current_version(connection) == VERSION


async def test_a_migration_that_is_killed_leaves_the_lock_to_the_next(empty_url: str) -> None:
    # The lock is the session's: whoever waits for it goes on when its owner dies.
    owner = await asyncpg.connect(empty_url, timeout=10)
    await owner.execute("SELECT pg_advisory_lock($1)", migrations.MIGRATE_LOCK)
    waiting = asyncio.create_task(migrate(empty_url))
    observer = await asyncpg.connect(empty_url, timeout=10)
    try:
        blocked = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        async with asyncio.timeout(30):
            while await observer.fetchval(blocked) is None:
                await asyncio.sleep(0)
        await observer.execute("SELECT pg_terminate_backend($1)", owner.get_server_pid())
        assert await asyncio.wait_for(waiting, 30) == Migrated(0, VERSION)
    finally:
        owner.terminate()
        await observer.close()


async def test_a_user_who_may_not_create_tables(postgres: EmbeddedPostgres, empty_url: str) -> None:
    admin = await asyncpg.connect(postgres.admin_url, timeout=10)
    name = empty_url.rpartition("/")[2]
    try:
        await admin.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
        await admin.execute(f"GRANT CONNECT ON DATABASE {name} TO guest")
        guest_url = f"postgresql://guest:guest@127.0.0.1:{postgres.port}/{name}"
        with pytest.raises(Misconfigured, match="may not create the schema"):
            await migrate(guest_url)
    finally:
        await admin.execute(f"REVOKE ALL ON DATABASE {name} FROM guest")
        await admin.execute("DROP ROLE guest")
        await admin.close()
    assert await migrate(empty_url) == Migrated(0, VERSION)


async def test_a_server_that_is_not_there(unused_tcp_port: int) -> None:
    with pytest.raises(DependencyUnavailable, match="cannot be reached"):
        await migrate(f"postgresql://app_user:x@127.0.0.1:{unused_tcp_port}/app_db")


def test_steps_are_read_from_their_directory(tmp_path: Path) -> None:
    (tmp_path / "0002.sql").write_text("SELECT 2")
    (tmp_path / "0010.sql").write_text("SELECT 10")
    (tmp_path / "notes.txt").write_text("no step")
    assert upgrade_steps(tmp_path) == {2: "SELECT 2", 10: "SELECT 10"}
    assert set(upgrade_steps()) <= set(range(2, VERSION + 1)), sys.path
