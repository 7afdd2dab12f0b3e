"""`orderflow doctor`: what is reachable, what is misconfigured, and what to do about it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict, replace

import asyncpg
import click

from orderflow import __version__
from orderflow.commands.checks import LIMIT, Check, backlog, configuration, problem
from orderflow.commands.checks import postgres as postgres_checks
from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import table
from orderflow.commands.parameters import as_json_option, database_option, kafka_option
from orderflow.engine.patience import DependencyUnavailable, Misconfigured, within
from orderflow.engine.postgres import close_connection, connect
from orderflow.settings import Settings, load, without_secrets

# For all questions to one server together: each has its own limit of a few seconds.
LIMIT_A_SERVER = 4 * LIMIT


@click.command()
@as_json_option
@database_option
@kafka_option
def doctor(as_json: bool, database_url: str | None, kafka_bootstrap_servers: str | None) -> int:
    """What is reachable, what is misconfigured, and what to do about it; exit 1 when something does not work."""
    settings = load(database_url=database_url, kafka_bootstrap_servers=kafka_bootstrap_servers)
    checks = [
        replace(check, seen=without_secrets(check.seen, settings), advice=without_secrets(check.advice, settings))
        for check in asyncio.run(examine(settings))
    ]
    if as_json:
        print_json({"version": __version__, "checks": [asdict(check) for check in checks]})
    else:
        table(
            ["about", "", "seen", "what to do"],
            [[check.about, check.level, check.seen, check.advice] for check in checks],
            wrap=("seen", "what to do"),
        )
    return 1 if any(check.level == "problem" for check in checks) else 0


async def examine(settings: Settings) -> list[Check]:
    """Ask everything, both servers at the same time; never raises for what they answer, or do not."""
    database, kafka = await asyncio.gather(_bounded("postgresql", _database(settings)), _bounded("kafka", _kafka(settings)))
    return [*configuration.check(settings), *database, *kafka]


async def _bounded(about: str, asking: Awaitable[list[Check]]) -> list[Check]:
    try:
        return await within(asking, LIMIT_A_SERVER)
    except TimeoutError:
        return [problem(about, f"no answer within {LIMIT_A_SERVER:.0f} s", "it hangs: look at its log")]
    except (DependencyUnavailable, Misconfigured) as error:
        seen, _, advice = str(error).partition(": ")
        return [problem(about, seen, advice)]


async def _database(settings: Settings) -> list[Check]:
    connection = await connect(settings.database_url, timeout=LIMIT, application="orderflow doctor")
    try:
        checks = await postgres_checks.check(settings, connection)
        # Without the schema there is no table to ask about work.
        if not any("schema" in check.seen and check.level == "problem" for check in checks):
            checks += await backlog.check(connection)
    except (asyncpg.PostgresError, OSError, TimeoutError) as error:
        return [problem("postgresql", f"{type(error).__name__}: {error}", "look at the server's log")]
    else:
        return checks
    finally:
        await close_connection(connection)


async def _kafka(settings: Settings) -> list[Check]:
    from orderflow.app import kafka_of
    from orderflow.commands.checks import kafka as kafka_checks

    return await kafka_checks.check(kafka_of(settings), settings.retention_days)
