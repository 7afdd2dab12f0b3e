"""A command's way to the database: settings, a bounded connection, the schema check, errors fit for people."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import asyncpg

from orderflow import migrations
from orderflow.engine.patience import database_error, within
from orderflow.engine.postgres import Database
from orderflow.settings import Settings, load

R = TypeVar("R")


@asynccontextmanager
async def opened(settings: Settings, *, statement_seconds: float = 30.0) -> AsyncIterator[Database]:
    """A database of one connection, whose schema has been checked; statements may take `statement_seconds`.

    Raises DependencyUnavailable or Misconfigured, also for what goes wrong inside the block.
    """
    try:
        # The pool's own limit is the statement's; connecting must not be allowed as long as an audit.
        database = await within(
            Database.open(
                settings.database_url,
                size=1,
                timeout=statement_seconds,
                application="orderflow command",
                statement_cache=settings.database_statement_cache,
            ),
            settings.database_timeout_seconds,
        )
    except TimeoutError as error:
        raise database_error(settings.database_url, error) from error
    try:
        async with database.acquire() as connection:
            await migrations.check(connection)
        yield database
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise database_error(settings.database_url, error) from error
    finally:
        await database.close()


def with_database(database_url: str | None, work: Callable[[Database], Awaitable[R]], *, statement_seconds: float = 30.0) -> R:
    """Run `work` against the database that flag, environment or `.env` names, and return what it returns.

    Raises SettingsError, DependencyUnavailable or Misconfigured.
    """
    settings = load(database_url=database_url)

    async def session() -> R:
        async with opened(settings, statement_seconds=statement_seconds) as database:
            return await work(database)

    return asyncio.run(session())
