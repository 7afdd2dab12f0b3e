"""`orderflow gateway mode`: the simulated gateway's behaviour, for every process at once."""

from __future__ import annotations

from typing import Any

import click

from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import shown
from orderflow.commands.parameters import as_json_option, database_option
from orderflow.commands.session import with_database
from orderflow.engine.postgres import Database

MODES = {
    "random": "succeeds for the configured share of orders, declines the others",
    "succeed": "charges every order",
    "decline": "declines every order",
    "error": "fails with an error, which is retried and then dead-lettered",
    "timeout": "charges and loses the answer",
    "hang": "does not answer at all",
    "unavailable": "turns away whoever asks, for a charge or for its outcome",
}


@click.group()
def gateway() -> None:
    """Switch the simulated gateway's behaviour while everything runs."""


async def set_mode(database: Database, mode: str) -> None:
    """Switch every process's gateway to `mode`, from its next charge on."""
    await database.fetch(
        "INSERT INTO gateway_control (mode) VALUES ($1) "
        "ON CONFLICT (only_row) DO UPDATE SET mode = excluded.mode, changed_at = now()",
        mode,
    )


@gateway.command()
@click.argument("mode", type=click.Choice(list(MODES)), required=False)
@as_json_option
@database_option
def mode(mode: str | None, as_json: bool, database_url: str | None) -> None:
    """Show the mode, or switch every process to another one.

    \b
    random       succeeds for the configured share of orders, declines the others
    succeed      charges every order
    decline      declines every order
    error        fails with an error, which is retried and then dead-lettered
    timeout      charges and loses the answer
    hang         does not answer at all
    unavailable  turns away whoever asks, for a charge or for its outcome
    """

    async def work(database: Database) -> dict[str, Any]:
        if mode is not None:
            await set_mode(database, mode)
        row = await database.fetchrow("SELECT mode, changed_at FROM gateway_control")
        return dict(row) if row else {"mode": "random", "changed_at": None}

    now = with_database(database_url, work)
    if as_json:
        print_json({"mode": now["mode"], "changedAt": now["changed_at"]})
        return
    since = f" (since {shown(now['changed_at'])})" if now["changed_at"] and mode is None else ""
    click.echo(f"{now['mode']}: {MODES[now['mode']]}{since}")
