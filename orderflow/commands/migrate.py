"""`orderflow migrate`: create or upgrade the schema."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import click

from orderflow import migrations
from orderflow.commands.output import as_json as print_json
from orderflow.commands.parameters import as_json_option, database_option
from orderflow.engine.patience import wait_until
from orderflow.settings import load


@click.command()
@click.option("--wait", type=click.FloatRange(0), default=0.0, metavar="SECONDS", help="Wait so long for the server.")
@click.option("--roles", is_flag=True, help="Create the roles orderflow_app and orderflow_read, with their rights.")
@as_json_option
@database_option
def migrate(wait: float, roles: bool, as_json: bool, database_url: str | None) -> None:
    """Create the schema, or upgrade it to the version of this program.

    Safe to run twice and from many processes at once. Needs a database user that may create tables; with --roles, one that
    may create roles where they are not there yet. An upgrade renews the rights of roles that are there.
    """
    settings = load(database_url=database_url)
    done = asyncio.run(
        wait_until(
            lambda: migrations.migrate(settings.direct_url, roles=roles),
            timeout=wait,
            waiting=lambda reason: click.echo(f"waiting: {reason}", err=True),
        )
    )
    if as_json:
        print_json(asdict(done))
    elif done.before == done.after:
        click.echo(f"the schema is at version {done.after} already: nothing to do")
    elif done.before == 0:
        click.echo(f"the schema was created, version {done.after}")
    else:
        click.echo(f"the schema was upgraded from version {done.before} to {done.after}")
    if roles and not as_json:
        click.echo("orderflow_app and orderflow_read have their rights: CREATE ROLE ... LOGIN IN ROLE orderflow_app")
