"""`orderflow dead-letters list|show|redrive|discard`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

import click
import orjson

from orderflow.commands.output import agreed, camel, escaped, fields, shown, table
from orderflow.commands.output import as_json as print_json
from orderflow.commands.parameters import (
    as_json_option,
    database_option,
    identifier,
    limit_option,
    yes_option,
)
from orderflow.commands.progress import counting
from orderflow.commands.session import with_database
from orderflow.engine import dead_letters as letters
from orderflow.engine.dead_letters import DeadLetter
from orderflow.engine.postgres import Database

RAW_PREVIEW = 400
LONG = 600.0
# What a script that gives none leaves behind: the row says that nobody was asked.
NO_REASON = "no reason given"


@click.group()
def dead_letters() -> None:
    """Dead letters: events that nobody will try again by themselves."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one id: `done`, or `problem` says why not."""

    event_id: UUID
    done: bool
    problem: str = ""
    event_type: str | None = None
    aggregate_id: UUID | None = None
    order_reopened: bool = False


@dead_letters.command("list")
@click.option("--discarded", is_flag=True, help="The discarded ones as well.")
@limit_option
@as_json_option
@database_option
def list_letters(discarded: bool, limit: int, as_json: bool, database_url: str | None) -> None:
    """Dead letters, newest first."""

    async def work(database: Database) -> list[DeadLetter]:
        async with database.acquire() as connection:
            return await letters.fetch(connection, discarded=discarded, limit=limit)

    found = with_database(database_url, work)
    if as_json:
        print_json([_public(letter) for letter in found])
        return
    table(
        ["event", "type", "order", "failed", "attempts", *(["discarded"] if discarded else []), "reason"],
        [
            [
                *(d.event_id, d.event_type, d.aggregate_id, d.failed_at, len(d.attempts)),
                *([d.discarded_at] if discarded else []),
                d.reason,
            ]
            for d in found
        ],
        right=("attempts",),
        wrap=("reason",),
        empty="no dead letters",
    )


@dead_letters.command()
@click.argument("event_id", type=identifier, metavar="ID")
@as_json_option
@database_option
def show(event_id: UUID, as_json: bool, database_url: str | None) -> None:
    """One dead letter: payload, every attempt, and where it stood in Kafka."""

    async def work(database: Database) -> list[DeadLetter]:
        async with database.acquire() as connection:
            return await letters.fetch(connection, event_ids=[event_id], discarded=True)

    found = with_database(database_url, work)
    if not found:
        raise click.ClickException(f"there is no dead letter {event_id}: `orderflow dead-letters list` shows them")
    letter = found[0]
    if as_json:
        print_json(_public(letter))
        return
    place = f"{letter.topic}, partition {letter.partition}, offset {letter.offset}" if letter.topic else None
    fields([
        ("event", letter.event_id),
        ("type", letter.event_type),
        ("order", letter.aggregate_id),
        ("failed", letter.failed_at),
        ("reason", letter.reason),
        ("error", ": ".join(part for part in (letter.error_class, letter.error_message) if part) or None),
        ("kafka", place),
        ("worker", letter.worker_id),
        ("headers", orjson.dumps(letter.headers).decode() if letter.headers else None),
        ("payload", orjson.dumps(letter.payload).decode() if letter.payload is not None else None),
        ("raw", _preview(letter.raw)),
        ("discarded", letter.discarded_at),
        ("because", letter.discard_reason),
    ])  # fmt: skip
    if letter.attempts:
        click.echo()
        table(
            ["attempt", "at", "error", "message"],
            [[a.get("attempt"), a.get("at"), a.get("error"), a.get("message")] for a in letter.attempts],
            right=("attempt",),
            wrap=("message",),
        )


@dead_letters.command()
@click.argument("event_ids", type=identifier, metavar="ID...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that are open and can be published again.")
@yes_option
@as_json_option
@database_option
def redrive(event_ids: tuple[UUID, ...], everything: bool, yes: bool, as_json: bool, database_url: str | None) -> int:
    """Give dead letters fresh attempts.

    A technically failed order goes back to PAYMENT_PENDING; a declined one stays FAILED.
    """
    if bool(event_ids) == everything:
        raise click.UsageError("give the ids of dead letters, or --all", click.get_current_context())

    async def work(database: Database) -> list[Result]:
        chosen = await _redrivable(database) if everything else unique(event_ids)
        _agree(chosen, "redriven", yes)
        return await _each(chosen, "redriving", lambda event_id: redrive_one(database, event_id))

    return _report(with_database(database_url, work, statement_seconds=LONG), "redriven", as_json)


@dead_letters.command()
@click.argument("event_ids", type=identifier, metavar="ID...", nargs=-1, required=True)
@click.option("--reason", metavar="TEXT", help="Why; kept with the dead letter. Asked for on a terminal.")
@yes_option
@as_json_option
@database_option
def discard(event_ids: tuple[UUID, ...], reason: str | None, yes: bool, as_json: bool, database_url: str | None) -> int:
    """Close dead letters for good. They are kept, with the reason."""
    if reason is None:
        reason = click.prompt("why", err=True) if sys.stdin.isatty() else NO_REASON
    if not reason.strip() or "\0" in reason:
        raise click.UsageError("--reason: say why in some words", click.get_current_context())

    async def one(database: Database, event_id: UUID) -> Result:
        async with database.transaction() as connection:
            if await letters.discard_if_open(connection, event_id, reason.strip()):
                return Result(event_id, True)
        return Result(event_id, False, f"{event_id}: no open dead letter has this id")

    async def work(database: Database) -> list[Result]:
        chosen = unique(event_ids)
        _agree(chosen, "discarded", yes)
        return await _each(chosen, "discarding", lambda event_id: one(database, event_id))

    return _report(with_database(database_url, work), "discarded", as_json)


async def redrive_one(database: Database, event_id: UUID) -> Result:
    """Redrive one in a transaction of its own: one that cannot be redriven does not hold up the others."""
    from orderflow.payments.redrive import redrive as redrive_event

    try:
        async with database.transaction() as connection:
            done = await redrive_event(connection, event_id)
    except letters.NotRedrivable as error:
        return Result(event_id, False, str(error))
    return Result(event_id, True, "", done.event_type, done.aggregate_id, done.order_reopened)


async def _redrivable(database: Database) -> list[UUID]:
    """Open dead letters that have an outbox row, oldest first; says on stderr how many have none."""
    rows = await database.fetch(
        """
        SELECT d.event_id, EXISTS (SELECT FROM outbox o WHERE o.event_id = d.event_id) AS ours
        FROM dead_letter_events d WHERE d.discarded_at IS NULL ORDER BY d.failed_at, d.event_id
        """
    )
    foreign = sum(not row["ours"] for row in rows)
    if foreign:
        click.echo(f"{foreign} left out, which have no outbox row to publish again: discard them", err=True)
    return [row["event_id"] for row in rows if row["ours"]]


def unique(event_ids: Sequence[UUID]) -> list[UUID]:
    """The ids without repetitions, in the order given."""
    return list(dict.fromkeys(event_ids))


def _agree(chosen: Sequence[UUID], what: str, yes: bool) -> None:
    if len(chosen) > 1:
        agreed(f"{len(chosen)} dead letters will be {what}. Go ahead?", yes=yes)


async def _each(chosen: Sequence[UUID], what: str, one: Any) -> list[Result]:
    results = []
    with counting(what, len(chosen)) as advance:
        for event_id in chosen:
            results.append(await one(event_id))
            advance(1)
    return results


def _report(results: list[Result], what: str, as_json: bool) -> int:
    failed = [result for result in results if not result.done]
    if as_json:
        print_json([{camel(name): value for name, value in asdict(result).items()} for result in results])
    else:
        reopened = sum(result.order_reopened for result in results)
        note = f", {reopened} orders back to PAYMENT_PENDING" if reopened else ""
        click.echo(f"{len(results) - len(failed)} {what}{note}")
    for result in failed:
        click.echo(f"orderflow: {escaped(result.problem)}", err=True)
    return 1 if failed else 0


def _public(letter: DeadLetter) -> dict[str, Any]:
    return {camel(name): value for name, value in asdict(letter).items()}


def _preview(raw: bytes | None) -> str | None:
    if raw is None:
        return None
    more = f" ... ({len(raw)} bytes)" if len(raw) > RAW_PREVIEW else ""
    return shown(raw[:RAW_PREVIEW].decode("utf-8", "backslashreplace")) + more
