"""The roles of least privilege: the whole program works as one of them, which can destroy nothing; the other one only reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

import aiohttp
import asyncpg
import pytest
import pytest_asyncio

from orderflow import migrations
from orderflow.commands.checks.postgres import NEEDED_RIGHTS
from orderflow.embedded.postgres import EmbeddedPostgres
from orderflow.engine.janitor import Janitor
from orderflow.engine.patience import Misconfigured
from orderflow.migrations import VERSION, migrate
from tests import servers
from tests.fleet import Client, Fleet, Process, api_of
from tests.pipeline import opened, opening
from tests.rows import insert_event, order_row, set_mode, settled, violations

RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")
TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"


class Roles(NamedTuple):
    """A server whose app_db has the schema and the roles; the addresses of a member of each."""

    server: EmbeddedPostgres
    app: str
    read: str


def url_of(server: EmbeddedPostgres, user: str) -> str:
    return f"postgresql://{user}:{user}@127.0.0.1:{server.port}/app_db"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def roles() -> AsyncIterator[Roles]:
    """A server of its own: roles belong to all databases of one."""
    async with servers.running_postgres() as server:
        await migrate(server.url)
        admin = await server.connect()
        try:
            await admin.execute("CREATE ROLE orderflow_app; CREATE ROLE orderflow_read")
            await migrate(server.url, roles=True)
            await admin.execute("CREATE ROLE shop LOGIN PASSWORD 'shop' IN ROLE orderflow_app")
            await admin.execute("CREATE ROLE person LOGIN PASSWORD 'person' IN ROLE orderflow_read")
        finally:
            await admin.close()
        yield Roles(server, url_of(server, "shop"), url_of(server, "person"))


@pytest_asyncio.fixture
async def owner(roles: Roles) -> AsyncIterator[asyncpg.Connection]:
    """The owner's connection."""
    connection = await asyncpg.connect(roles.server.url, timeout=10, command_timeout=30)
    try:
        yield connection
    finally:
        await connection.close()


async def succeeds(fleet: Fleet, *arguments: str) -> str:
    process: Process = await fleet.start(*arguments)
    assert await process.end() == 0, (arguments, process.said, process.errors)
    return "\n".join(process.said)


async def test_the_whole_program_works_as_the_app(
    roles: Roles, owner: asyncpg.Connection, kafka: servers.Broker, topic: str
) -> None:
    async with Fleet(roles.app, kafka, topic, ORDERFLOW_GATEWAY_SUCCESS_RATE="1") as fleet:
        parent = await fleet.run("--api", "1", "--publisher", "2", "--worker", "1")
        address = await api_of(parent)
        client = Client()
        await client.place_many(address, 3)
        await settled(owner)
        assert {await order_row(owner, order_id) for order_id in client.accepted} == {("PAID", 3, None)}

        await succeeds(fleet, "gateway", "mode", "error")
        await client.place_many(address, 2)
        await settled(owner)
        first, second = client.accepted[3:]
        assert (await order_row(owner, first))[0] == "FAILED"
        await succeeds(fleet, "gateway", "mode", "succeed")
        letters = {row["aggregate_id"]: str(row["event_id"]) for row in await owner.fetch("SELECT * FROM dead_letter_events")}
        await succeeds(fleet, "dead-letters", "list")
        await succeeds(fleet, "dead-letters", "show", letters[first])
        await succeeds(fleet, "dead-letters", "redrive", letters[first])
        await succeeds(fleet, "dead-letters", "discard", letters[second], "--reason", "test")
        await settled(owner)
        assert (await order_row(owner, first))[0] == "PAID"
        assert (await order_row(owner, second))[0] == "FAILED"

        await succeeds(fleet, "events", "replay", "--order", str(first))
        await settled(owner)
        await succeeds(fleet, "orders", "list")
        await succeeds(fleet, "explain", str(first))
        await succeeds(fleet, "audit")
        doctor = await succeeds(fleet, "doctor")
        assert "shop may do what the program does, and not create tables" in doctor
        assert not parent.facts.of("ROLE_CRASHED")
        parent.stop()
        assert await parent.end() == 0
    assert await violations(owner) == {}
    await set_mode(owner, "random")


async def test_the_janitor_and_an_idempotency_key_work_as_the_app(roles: Roles, owner: asyncpg.Connection) -> None:
    lost = await insert_event(owner)
    # All of them: a shard is read up to its first young row, which another test may have left in this one's.
    await owner.execute("UPDATE outbox SET created_at = created_at - interval '11 min'")
    await owner.execute("UPDATE outbox SET published_at = now() - interval '10 min' WHERE event_id = $1", lost)
    async with opened(roles.app) as database:
        assert await Janitor(opening(roles.app), now, patrol_from=0).run_once(database) >= 1
    assert await owner.fetchval("SELECT published_at IS NULL FROM outbox WHERE event_id = $1", lost)
    await owner.execute("DELETE FROM outbox WHERE event_id = $1", lost)
    async with Fleet(roles.app, None, "unused") as fleet:
        address = await api_of(await fleet.run("--role", "api"))
        async with aiohttp.ClientSession() as session:
            body = {"userId": str(UUID(int=1)), "amount": "1.00"}
            for replayed in (None, "true"):
                async with session.post(f"{address}/orders", json=body, headers={"Idempotency-Key": "k"}) as answer:
                    assert answer.status == 201
                    assert answer.headers.get("Idempotency-Replayed") == replayed


async def now() -> datetime:
    """Kafka has nothing left."""
    return datetime.now(UTC)


DESTRUCTIVE = [
    "DROP TABLE orders", "DROP SCHEMA public CASCADE", "TRUNCATE outbox", "TRUNCATE orders CASCADE",
    "ALTER TABLE orders DROP CONSTRAINT orders_version_fits", "ALTER TABLE orders DISABLE TRIGGER orders_legal_transition",
    "ALTER TABLE orders OWNER TO CURRENT_USER", "DROP INDEX orders_newest", "DROP TRIGGER outbox_wake ON outbox",
    "CREATE OR REPLACE FUNCTION outbox_wake() RETURNS trigger LANGUAGE sql AS 'SELECT 1'",
    "CREATE TABLE mine ()", "CREATE INDEX ON orders (amount)", "CREATE ROLE another",
    "SET session_replication_role = replica", "SELECT setval('outbox_seq_seq', 1)", "SELECT nextval('outbox_seq_seq')",
    "DELETE FROM orders", "UPDATE gateway_charges SET amount = 1", "UPDATE processed_events SET worker_id = 'x'",
    "INSERT INTO schema_version (version) VALUES (99)", "DELETE FROM schema_version",
    "COPY orders TO PROGRAM 'cat'", "SELECT pg_read_file('/etc/passwd')",
]  # fmt: skip
WRITING = [
    "INSERT INTO orders (id, user_id, amount) VALUES (gen_random_uuid(), gen_random_uuid(), 1)",
    "UPDATE orders SET amount = 1", "UPDATE outbox SET published_at = NULL", "UPDATE gateway_control SET mode = 'decline'",
    "DELETE FROM outbox", "DELETE FROM processed_events", "DELETE FROM gateway_charges",
    "DELETE FROM dead_letter_events", "DELETE FROM idempotency_keys", "SELECT * FROM orders FOR UPDATE",
    "INSERT INTO processed_events (event_id, worker_id) VALUES (gen_random_uuid(), 'x')",
]  # fmt: skip


@pytest.mark.parametrize("statement", DESTRUCTIVE)
@pytest.mark.parametrize("member", ["app", "read"])
async def test_neither_can_destroy(roles: Roles, member: str, statement: str) -> None:
    await refused(getattr(roles, member), statement)


@pytest.mark.parametrize("statement", WRITING)
async def test_people_cannot_write(roles: Roles, statement: str) -> None:
    await refused(roles.read, statement)


async def refused(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    finally:
        await connection.close()


async def test_people_read_with_psql_and_with_our_commands(roles: Roles) -> None:
    connection = await asyncpg.connect(roles.read, timeout=10)
    try:
        for row in await connection.fetch(TABLES):
            await connection.fetch(f"SELECT * FROM {row['tablename']} LIMIT 1")
    finally:
        await connection.close()
    async with Fleet(roles.read, None, "unused") as fleet:
        for command in (("orders", "list"), ("dead-letters", "list"), ("gateway", "mode"), ("audit", "--json")):
            await succeeds(fleet, *command)
        refused = await fleet.start("gateway", "mode", "error")
        assert await refused.end() == 1
        assert "permission denied" in refused.errors[0]


async def test_each_table_has_the_rights_that_the_program_needs_and_no_others(roles: Roles, owner: asyncpg.Connection) -> None:
    held: dict[str, dict[str, str]] = {"orderflow_app": {}, "orderflow_read": {}}
    for role, tables in held.items():
        for row in await owner.fetch(TABLES):
            name = row["tablename"]
            granted = [r for r in RIGHTS if await owner.fetchval("SELECT has_table_privilege($1, $2, $3)", role, name, r)]
            tables[name] = ", ".join(granted)
    assert held["orderflow_app"] == NEEDED_RIGHTS, "orderflow/roles.sql and NEEDED_RIGHTS differ"
    assert set(held["orderflow_read"].values()) == {"SELECT"}, "orderflow/roles.sql leaves a table out"


async def test_the_program_refuses_nothing_and_the_doctor_names_what_is_missing(
    roles: Roles, owner: asyncpg.Connection
) -> None:
    await owner.execute("REVOKE SELECT ON SEQUENCE outbox_seq_seq FROM orderflow_app")
    await owner.execute("REVOKE DELETE ON dead_letter_events FROM orderflow_app")
    async with Fleet(roles.app, None, "unused") as fleet:
        doctor = await fleet.start("doctor")
        assert await doctor.end() == 1
        assert "shop lacks 2 rights" in "\n".join(doctor.said)
        # An earlier version may have given more than this one does.
        await owner.execute("GRANT TRUNCATE ON orders TO orderflow_app")
        renewed = await fleet.start("migrate", "--roles", DATABASE_URL=roles.server.url)
        assert await renewed.end() == 0, renewed.errors
        assert "orderflow_app and orderflow_read have their rights" in "\n".join(renewed.said)
        await refused(roles.app, "TRUNCATE orders CASCADE")
        again = await fleet.start("doctor", "--json")
        await again.end()
        assert "lacks" not in "\n".join(again.said)


async def test_an_upgrade_renews_the_rights_where_somebody_wanted_them(roles: Roles, owner: asyncpg.Connection) -> None:
    has = "SELECT has_table_privilege('orderflow_app', 'orders', 'INSERT')"
    await owner.execute("REVOKE INSERT ON orders FROM orderflow_app")
    try:
        await migrate(roles.server.url, target=VERSION + 1, steps={VERSION + 1: "SELECT 1"})
        assert await owner.fetchval(has)
    finally:
        await owner.execute("DELETE FROM schema_version WHERE version > $1", VERSION)


async def test_a_migration_without_roles_makes_none(postgres: EmbeddedPostgres) -> None:
    async with servers.cloned_database(postgres, "template1") as url:
        await migrate(url)
        connection = await asyncpg.connect(url, timeout=10)
        try:
            assert await connection.fetchval("SELECT to_regrole('orderflow_app') IS NULL")
            assert await connection.fetchval(migrations._HAS_ROLES) is False
            # The owner may not create roles: the schema stays, and the line says who has to do what.
            with pytest.raises(Misconfigured, match="CREATE ROLE orderflow_app"):
                await migrate(url, roles=True)
            assert await migrate(url) == migrations.Migrated(VERSION, VERSION)
        finally:
            await connection.close()


async def test_who_may_create_roles_needs_nobody_else(restartable_postgres: EmbeddedPostgres) -> None:
    admin = await restartable_postgres.connect()
    try:
        await admin.execute("ALTER ROLE app_user CREATEROLE")
        for _ in range(2):
            await migrate(restartable_postgres.url, roles=True)
        assert await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'orderflow_%' AND NOT rolcanlogin") == 2
    finally:
        await admin.close()


async def test_the_app_may_not_migrate_and_does_not_have_to(roles: Roles) -> None:
    assert await migrate(roles.app) == migrations.Migrated(VERSION, VERSION)
    with pytest.raises(Misconfigured, match="may not create the schema"):
        await migrate(roles.app, target=VERSION + 1, steps={VERSION + 1: "CREATE TABLE more ()"})
