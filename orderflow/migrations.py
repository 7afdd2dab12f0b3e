"""Create or upgrade the schema. `schema.sql` is the whole current schema; `upgrades/NNNN.sql` leads from the version before.

`roles.sql` gives the roles of least privilege their rights, where somebody wants them. Runs under an advisory lock, each step
in a transaction: safe to run twice, and from many processes at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import asyncpg

from orderflow.engine.patience import Misconfigured
from orderflow.engine.postgres import Connection, close_connection, connect

VERSION = 5
MIGRATE_LOCK = 0x6F72_6465_7266_6C77
OLDEST_SERVER = 150000
# Whether somebody has run roles.sql in this database: its roles belong to the whole server.
_HAS_ROLES = "SELECT coalesce(has_table_privilege(to_regrole('orderflow_app')::oid, 'schema_version', 'SELECT'), false)"


@dataclass(frozen=True, slots=True)
class Migrated:
    """What `migrate` did: the version found (0: an empty database) and the version now."""

    before: int
    after: int


def schema_sql() -> str:
    """The text of schema.sql: inside the package when installed, at the top of the tree in a checkout."""
    inside = Path(__file__).with_name("schema.sql")
    return (inside if inside.exists() else Path(__file__).parent.parent / "schema.sql").read_text("utf-8")


def upgrade_steps(directory: Path | None = None) -> dict[int, str]:
    """The upgrade scripts by the version that each leads to."""
    where = directory or Path(__file__).with_name("upgrades")
    return {int(file.stem): file.read_text("utf-8") for file in sorted(where.glob("[0-9]*.sql"))}


async def current_version(connection: Connection) -> int:
    """The schema's version, 0 for a database without one."""
    if await connection.fetchval("SELECT to_regclass('schema_version')") is None:
        return 0
    return int(await connection.fetchval("SELECT coalesce(max(version), 0) FROM schema_version"))


async def migrate(
    url: str, *, timeout: float = 600.0, target: int = VERSION, steps: dict[int, str] | None = None, roles: bool = False
) -> Migrated:
    """Bring the database at `url` to version `target`. `roles`: with the roles of `roles.sql`; an upgrade renews their rights.

    Raises Misconfigured when the server is older than PostgreSQL 15, the schema is newer than this program, or the user
    may not create tables; DependencyUnavailable when the server cannot be reached.
    """
    connection = await connect(url, timeout=timeout, application="orderflow migrate")
    try:
        server = int(await connection.fetchval("SHOW server_version_num"))
        if server < OLDEST_SERVER:
            raise Misconfigured(f"PostgreSQL {server // 10000} is too old: orderflow needs 15 or later")
        await connection.execute("SELECT pg_advisory_lock($1)", MIGRATE_LOCK)
        before = await current_version(connection)
        refuse_newer(before, target)
        try:
            await _apply(connection, before, target, upgrade_steps() if steps is None else steps)
        except asyncpg.InsufficientPrivilegeError as error:
            raise Misconfigured(f"the database user may not create the schema: {error}") from error
        if roles or (before < target and await connection.fetchval(_HAS_ROLES)):
            await _grant(connection)
        return Migrated(before, target)
    finally:
        await close_connection(connection)


async def _apply(connection: asyncpg.Connection, before: int, target: int, steps: dict[int, str]) -> None:
    if before == 0:
        async with connection.transaction():
            await connection.execute(schema_sql())
            await connection.execute("INSERT INTO schema_version (version) VALUES ($1)", target)
        return
    for version in range(before + 1, target + 1):
        if version not in steps:
            raise Misconfigured(f"no upgrade leads to schema version {version}: the installation is incomplete")
        async with connection.transaction():
            await connection.execute(steps[version])
            await connection.execute("INSERT INTO schema_version (version) VALUES ($1)", version)


async def _grant(connection: asyncpg.Connection) -> None:
    try:
        async with connection.transaction():
            await connection.execute(Path(__file__).with_name("roles.sql").read_text("utf-8"))
    except asyncpg.InsufficientPrivilegeError as error:
        raise Misconfigured(
            f"the roles have not been given their rights ({error}): run this as the owner of the tables; where that one may "
            "not create roles, somebody else runs `CREATE ROLE orderflow_app; CREATE ROLE orderflow_read;` once before"
        ) from error


def refuse_newer(found: int, expected: int = VERSION) -> None:
    """Raise Misconfigured for a schema that a newer orderflow has made."""
    if found > expected:
        raise Misconfigured(
            f"the database has schema version {found}, this program knows {expected}: install the orderflow that ran "
            "`orderflow migrate` here, or restore a backup from before"
        )


async def check(connection: Connection) -> None:
    """Raise Misconfigured unless the schema is the one this program was written for."""
    found = await current_version(connection)
    refuse_newer(found)
    if found < VERSION:
        state = "has no orderflow schema" if found == 0 else f"has schema version {found}, needed is {VERSION}"
        raise Misconfigured(f"the database {state}: run `orderflow migrate`")
