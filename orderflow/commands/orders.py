"""`orderflow orders list|show`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any
from uuid import UUID

import click
import orjson

from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import camel, fields, table
from orderflow.commands.parameters import as_json_option, database_option, identifier, limit_option
from orderflow.commands.session import with_database
from orderflow.engine.postgres import Database
from orderflow.orders import store
from orderflow.orders.model import State
from orderflow.orders.store import Order

EVENT_COLUMNS = (
    "event_id", "event_type", "attempt", "created_at", "published_at", "processed_at", "worker_id", "reason",
)  # fmt: skip


@click.group()
def orders() -> None:
    """List orders, show one."""


@orders.command("list")
@click.option("--state", type=click.Choice(list(State), case_sensitive=False), help="Only orders in this state.")
@click.option("--after", type=identifier, metavar="ID", help="Go on after this order, the last of a listing.")
@limit_option
@as_json_option
@database_option
def list_orders(state: State | None, after: UUID | None, limit: int, as_json: bool, database_url: str | None) -> None:
    """Orders, newest first."""

    async def work(database: Database) -> list[Order]:
        return await store.newest(database, state=state, limit=limit, after=await _cursor(database, after))

    found = with_database(database_url, work)
    if as_json:
        print_json([_public(order) for order in found])
        return
    table(
        ["id", "state", "version", "amount", "created", "took", "user"],
        [[o.id, o.state.value, o.version, o.amount, o.created_at, o.updated_at - o.created_at, o.user_id] for o in found],
        right=("version", "amount", "took"),
        empty="no orders" if state is None else f"no orders in {state.value}",
    )


async def _cursor(database: Database, after: UUID | None) -> tuple[datetime, UUID] | None:
    if after is None:
        return None
    return (await existing(database, after)).created_at, after


async def existing(database: Database, order_id: UUID) -> Order:
    """The order; ClickException when there is none."""
    order = await store.get(database, order_id)
    if order is None:
        raise click.ClickException(f"there is no order {order_id}: `orderflow orders list` shows the newest")
    return order


@orders.command()
@click.argument("order_id", type=identifier, metavar="ID")
@as_json_option
@database_option
def show(order_id: UUID, as_json: bool, database_url: str | None) -> None:
    """One order and its events."""

    async def work(database: Database) -> tuple[Order, list[dict[str, Any]]]:
        order = await existing(database, order_id)
        return order, [dict(row) for row in await store.timeline(database, order_id)]

    order, events = with_database(database_url, work)
    for event in events:
        event["payload"] = orjson.loads(event["payload"])
        event["failures"] = orjson.loads(event["failures"] or "[]")
    if as_json:
        told = [{camel(name): value for name, value in event.items()} for event in events]
        print_json({**_public(order), "events": told})
        return
    fields([
        ("order", order.id),
        ("user", order.user_id),
        ("amount", order.amount),
        ("state", order.state.value),
        ("version", order.version),
        ("failure", order.failure),
        ("created", order.created_at),
        ("updated", order.updated_at),
        ("retired", order.retired_at),
    ])  # fmt: skip
    click.echo()
    table(
        ["event", "type", "attempt", "created", "published", "processed", "by", "dead letter"],
        [[e[name] for name in EVENT_COLUMNS] for e in events],
        right=("attempt",),
        wrap=("dead letter",),
        empty="its events were deleted for their age (ORDERFLOW_RETENTION_DAYS)"
        if order.retired_at
        else "no events: `orderflow audit` will say so too",
    )


def _public(order: Order) -> dict[str, Any]:
    """The order as GET /orders/{id} shows it, with why it failed and when each version began."""
    return {camel(name): value for name, value in asdict(order).items()}
