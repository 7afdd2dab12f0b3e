"""`orderflow explain ID`: one order's whole story."""

from __future__ import annotations

from dataclasses import asdict
from uuid import UUID

import click

from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import camel, duration, moment, table
from orderflow.commands.parameters import as_json_option, database_option, identifier
from orderflow.commands.session import with_database
from orderflow.engine.postgres import Database
from orderflow.explain import Entry, Story, Unknown, story


@click.command()
@click.argument("order_id", type=identifier, metavar="ID")
@as_json_option
@database_option
def explain(order_id: UUID, as_json: bool, database_url: str | None) -> None:
    """One order's whole story, with the time between its steps.

    Transitions, events, publishes, deliveries, attempts, charges and dead letters on one time line.
    ID is an order's, or that of one of its events.
    """

    async def work(database: Database) -> Story:
        async with database.acquire() as connection:
            return await story(connection, order_id)

    try:
        told = with_database(database_url, work)
    except Unknown as error:
        raise click.ClickException(f"{error}: `orderflow orders list` shows the newest orders") from None
    if as_json:
        print_json({
            **{camel(name): value for name, value in asdict(told).items() if name != "entries"},
            "entries": [{camel(name): value for name, value in asdict(entry).items()} for entry in told.entries],
        })  # fmt: skip
    else:
        show(told)


def show(told: Story) -> None:
    """Print the story as a table under a line that sums it up."""
    if told.state is None:
        click.echo(f"order {told.order_id} does not exist; what else has its id:")
    else:
        why = f" ({told.failure})" if told.failure else ""
        took = duration(told.took.total_seconds()) if told.took is not None else ""
        click.echo(f"order {told.order_id}: {told.state}{why}, version {told.version}, {told.amount}, {took}")
    if day := _day(told):
        click.echo(f"on {day}, times in UTC")
    click.echo()
    table(
        ["time", "after", "kind", "what", "detail"],
        [[_time(told, e), _after(e), e.kind, e.what, e.detail] for e in told.entries],
        right=("after",),
        wrap=("what", "detail"),
        empty="nothing happened to it",
    )


def _after(entry: Entry) -> str:
    return "" if entry.since_previous is None else f"+ {duration(entry.since_previous.total_seconds())}"


def _time(told: Story, entry: Entry) -> str:
    """The time of day alone where the whole story is of one day, which stands above the table."""
    full = moment(entry.at)
    return full if _day(told) is None else full.partition(" ")[2]


def _day(told: Story) -> str | None:
    days = {moment(entry.at).partition(" ")[0] for entry in told.entries}
    return days.pop() if len(days) == 1 else None
