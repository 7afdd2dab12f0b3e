"""Is PostgreSQL reachable, fit, and set up so that what was accepted stays?"""

from __future__ import annotations

import asyncio
import time

import asyncpg

from orderflow import migrations
from orderflow.commands.checks import LIMIT, Check, ok, problem, warning
from orderflow.engine.patience import DependencyUnavailable, Misconfigured, within
from orderflow.engine.postgres import close_connection, connect
from orderflow.settings import Settings, masked

ABOUT = "postgresql"
CHANNEL = "orderflow_doctor"
# Beside the pool a process holds a session for LISTEN, one for its shards and one for the auditor, and /readyz opens one
# now and then for what that has found.
SESSIONS_BESIDE_POOL = 4
CLOCK_TOLERANCE = 1.0
OLD_TRANSACTION = 600.0
NEEDED_RIGHTS = {
    "schema_version": "SELECT",
    "orders": "SELECT, INSERT, UPDATE",
    "outbox": "SELECT, INSERT, UPDATE, DELETE",
    "outbox_low_water": "SELECT, INSERT, UPDATE, DELETE",
    "processed_events": "SELECT, INSERT, DELETE",
    "dead_letter_events": "SELECT, INSERT, UPDATE, DELETE",
    "idempotency_keys": "SELECT, INSERT, UPDATE, DELETE",
    "gateway_charges": "SELECT, INSERT, DELETE",
    "gateway_control": "SELECT, INSERT, UPDATE",
    "circuits": "SELECT, INSERT, UPDATE",
    "held_aggregates": "SELECT, INSERT, DELETE",
    "audit_result": "SELECT, INSERT, UPDATE",
}
SEQUENCE = "outbox_seq_seq"

_SERVER = """
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::int AS number,
       pg_is_in_recovery() AS standby, current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('fsync') AS fsync, current_setting('full_page_writes') AS full_page_writes,
       current_setting('autovacuum') AS autovacuum, current_setting('max_connections')::int AS max_connections,
       current_setting('superuser_reserved_connections')::int AS reserved,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')::int AS connected,
       pg_notification_queue_usage() AS notifications,
       (SELECT extract(epoch FROM max(clock_timestamp() - xact_start))
        FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend')::float8 AS oldest
"""


async def check(settings: Settings, connection: asyncpg.Connection) -> list[Check]:
    """Everything about a server that answers: version, schema, rights, durability, room for connections, clock, LISTEN."""
    server = await connection.fetchrow(_SERVER)
    assert server is not None
    checks = [_version(settings, server), *_durability(server), *_room(settings, server), *_upkeep(server)]
    checks.append(await _clock(connection))
    schema = await _schema(connection)
    checks.append(schema)
    if schema.level == "ok":
        checks.extend(await _rights(connection))
    checks.append(await _listening(settings, connection))
    return checks


def _version(settings: Settings, server: asyncpg.Record) -> Check:
    seen = f"{server['version']} at {masked(settings.database_url)}"
    if server["number"] < migrations.OLDEST_SERVER:
        return problem(ABOUT, seen, "upgrade the server: orderflow needs PostgreSQL 15 or later")
    if server["standby"]:
        return problem(ABOUT, f"{seen} is a read-only standby", "point DATABASE_URL at the primary")
    return ok(ABOUT, seen)


def _durability(server: asyncpg.Record) -> list[Check]:
    checks = []
    if server["synchronous_commit"] == "off":
        checks.append(
            problem(
                ABOUT,
                "synchronous_commit is off: a crash of the server loses orders that were answered with 201",
                "ALTER ROLE or ALTER SYSTEM SET synchronous_commit = on",
            )
        )
    checks.extend(
        warning(ABOUT, f"{name} is off: a loss of power can destroy it", f"ALTER SYSTEM SET {name} = on")
        for name in ("fsync", "full_page_writes")
        if server[name] == "off"
    )
    return checks or [ok(ABOUT, f"durable: synchronous_commit {server['synchronous_commit']}, fsync on")]


def _room(settings: Settings, server: asyncpg.Record) -> list[Check]:
    needed = settings.database_pool_size + SESSIONS_BESIDE_POOL
    free = server["max_connections"] - server["reserved"] - server["connected"]
    seen = f"{server['connected']} of {server['max_connections']} connections used, a process needs up to {needed}"
    if free < needed:
        return [warning(ABOUT, seen, "raise max_connections, or lower ORDERFLOW_DATABASE_POOL_SIZE")]
    return [ok(ABOUT, f"{seen}: room for {free // needed} more processes")]


def _upkeep(server: asyncpg.Record) -> list[Check]:
    checks = []
    if server["autovacuum"] != "on":
        checks.append(problem(ABOUT, "autovacuum is off: dead rows will slow the relay", "ALTER SYSTEM SET autovacuum = on"))
    if (server["oldest"] or 0) > OLD_TRANSACTION:
        checks.append(
            warning(
                ABOUT,
                f"a transaction has been open for {server['oldest'] / 60:.0f} min: nothing newer can be vacuumed",
                "find it in pg_stat_activity by xact_start, and end it",
            )
        )
    if server["notifications"] > 0.5:
        checks.append(
            problem(
                ABOUT,
                f"the notification queue is {server['notifications']:.0%} full: when it is, commits fail",
                "end the listening session that sits in a transaction (pg_stat_activity)",
            )
        )
    return checks


async def _clock(connection: asyncpg.Connection) -> Check:
    before = time.time()
    theirs = float(await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8"))
    after = time.time()
    # Their time was read somewhere between our two readings: only what lies outside of them is a difference.
    difference = theirs - after if theirs > after else min(0.0, theirs - before)
    seen = f"clocks differ by {abs(difference):.1f} s"
    if abs(difference) > CLOCK_TOLERANCE:
        return warning(ABOUT, seen, "let NTP set both: times in logs and tables do not match")
    return ok(ABOUT, seen)


async def _schema(connection: asyncpg.Connection) -> Check:
    found = await migrations.current_version(connection)
    if found == 0:
        return problem(ABOUT, "no orderflow schema", "run `orderflow migrate`")
    if found < migrations.VERSION:
        return problem(ABOUT, f"schema version {found} of {migrations.VERSION}", "run `orderflow migrate`")
    if found > migrations.VERSION:
        return problem(ABOUT, f"schema version {found}, known is {migrations.VERSION}", "run the newer orderflow")
    return ok(ABOUT, f"schema version {found}")


async def _rights(connection: asyncpg.Connection) -> list[Check]:
    missing = [
        f"GRANT {right} ON {table}"
        for table, rights in NEEDED_RIGHTS.items()
        for right in rights.split(", ")
        if not await connection.fetchval("SELECT has_table_privilege($1, $2)", table, right)
    ]
    if not await connection.fetchval("SELECT has_sequence_privilege($1, 'SELECT')", SEQUENCE):
        missing.append(f"GRANT SELECT ON SEQUENCE {SEQUENCE}")
    user = await connection.fetchval("SELECT current_user")
    if missing:
        return [problem(ABOUT, f"{user} lacks {len(missing)} rights", "; ".join(missing))]
    if not await connection.fetchval("SELECT has_schema_privilege(current_schema(), 'CREATE')"):
        return [ok(ABOUT, f"{user} may do what the program does, and not create tables: the owner runs `orderflow migrate`")]
    return [ok(ABOUT, f"{user} may read and write every table, and change them")]


async def _listening(settings: Settings, connection: asyncpg.Connection) -> Check:
    advice = (
        "LISTEN and advisory locks need a session of their own: when DATABASE_URL is a PgBouncer in transaction "
        "mode, set ORDERFLOW_DATABASE_DIRECT_URL to the server behind it"
    )
    heard = asyncio.Event()
    try:
        direct = await connect(settings.direct_url, timeout=LIMIT, application="orderflow doctor")
    except (DependencyUnavailable, Misconfigured) as error:
        return problem(ABOUT, f"for LISTEN: {error}", "correct ORDERFLOW_DATABASE_DIRECT_URL")
    try:
        await direct.add_listener(CHANNEL, lambda *_: heard.set())
        await connection.execute("SELECT pg_notify($1, '')", CHANNEL)
        await within(heard.wait(), LIMIT)
    except TimeoutError:
        return problem(ABOUT, f"a notification did not arrive at {masked(settings.direct_url)}", advice)
    except asyncpg.PostgresError as error:
        return problem(ABOUT, f"no LISTEN at {masked(settings.direct_url)}: {error}", advice)
    finally:
        await close_connection(direct)
    return ok(ABOUT, f"notifications arrive at {masked(settings.direct_url)}")
