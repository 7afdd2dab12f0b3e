"""`orderflow events replay`: publish chosen outbox rows again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

import click

from orderflow.commands.output import agreed, table
from orderflow.commands.output import as_json as print_json
from orderflow.commands.parameters import (
    as_json_option,
    database_option,
    identifier,
    moment_or_ago,
    yes_option,
)
from orderflow.commands.progress import counting
from orderflow.commands.session import with_database
from orderflow.engine import outbox
from orderflow.engine.postgres import Connection, Database

CHUNK = 1000
LONG = 600.0


@click.group()
def events() -> None:
    """Publish chosen events again."""


@events.command()
@click.option("--order", "order_id", type=identifier, metavar="ID", help="The events of this order.")
@click.option("--since", type=moment_or_ago, metavar="TIME", help="Created since then: ISO 8601, or 2h (ago).")
@click.option("--until", type=moment_or_ago, metavar="TIME", help="Created before then.")
@click.option("--type", "event_type", metavar="TYPE", help="Events of this type, such as OrderCreated.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@yes_option
@as_json_option
@database_option
def replay(
    order_id: UUID | None,
    since: datetime | None,
    until: datetime | None,
    event_type: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    database_url: str | None,
) -> None:
    """Publish the events that match every filter given once more, oldest first.

    A worker that has processed an event before skips it (DUPLICATE_EVENT), so this repeats no charge: it is for
    consumers of yours, and for what Kafka has lost. Dead letters are not among them: redrive those.
    """
    if order_id is None and since is None and until is None and event_type is None:
        raise click.UsageError("give at least one of --order, --since, --until, --type", click.get_current_context())
    if since is not None and until is not None and since >= until:
        raise click.UsageError("--since is not before --until", click.get_current_context())

    async def work(database: Database) -> tuple[Counter[str], int]:
        async with database.acquire() as connection:
            found = await outbox.select_for_replay(
                connection, aggregate_id=order_id, since=since, until=until, event_type=event_type
            )
            types = await _types(connection, found)
            if dry_run or not found:
                return types, 0
            if len(found) > 1:
                agreed(f"{len(found)} events will be published again. Go ahead?", yes=yes)
            with counting("replaying", len(found)) as advance:
                return types, await publish_again(connection, found, advance)

    types, replayed = with_database(database_url, work, statement_seconds=LONG)
    _report(types, replayed, dry_run, as_json)


async def publish_again(
    connection: Connection, event_ids: list[UUID], advance: Callable[[int], None] = lambda events: None
) -> int:
    """Make these rows due, a chunk a transaction, and wake the relays after each; returns how many were moved.

    `advance` hears of each chunk how many events it had.
    """
    replayed = 0
    for start in range(0, len(event_ids), CHUNK):
        chunk = event_ids[start : start + CHUNK]
        replayed += await outbox.replay(connection, chunk)
        await connection.execute("SELECT pg_notify($1, '')", outbox.CHANNEL)
        advance(len(chunk))
    return replayed


async def _types(connection: Connection, event_ids: list[UUID]) -> Counter[str]:
    types: Counter[str] = Counter()
    for start in range(0, len(event_ids), 50_000):
        rows = await connection.fetch(
            "SELECT event_type, count(*) AS n FROM outbox WHERE event_id = ANY($1::uuid[]) GROUP BY event_type",
            event_ids[start : start + 50_000],
        )
        types.update({row["event_type"]: row["n"] for row in rows})
    return types


def _report(types: Counter[str], replayed: int, dry_run: bool, as_json: bool) -> None:
    matched = sum(types.values())
    if as_json:
        summary: dict[str, Any] = {
            "matched": matched,
            "replayed": replayed,
            "dryRun": dry_run,
            "types": dict(types),
        }
        print_json(summary)
        return
    if not matched:
        click.echo("no event matches")
        return
    table(["type", "events"], sorted(types.items()), right=("events",))
    click.echo(f"{matched} events match; nothing was changed" if dry_run else f"{replayed} events will be published again")
