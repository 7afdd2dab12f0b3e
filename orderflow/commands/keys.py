"""`orderflow keys new`: an API key for somebody, and its entry for ORDERFLOW_API_KEYS."""

from __future__ import annotations

import click

from orderflow.commands.output import as_json as print_json
from orderflow.commands.parameters import as_json_option
from orderflow.orders.api_keys import WrongKeys, new_key


@click.group()
def keys() -> None:
    """Make API keys, which the API asks for at /orders when there are any."""


@keys.command()
@click.argument("name")
@as_json_option
def new(name: str, as_json: bool) -> None:
    """Print a new key, once, and the entry for ORDERFLOW_API_KEYS that lets it in.

    Nothing is stored. To change a key: add the new entry, restart the API, hand the key over, remove the old entry.
    """
    try:
        key, entry = new_key(name)
    except WrongKeys as error:
        raise click.BadParameter(str(error), param_hint="NAME") from None
    if as_json:
        print_json({"name": name, "key": key, "entry": entry})
        return
    click.echo(f"key, for {name} alone; it is shown this once:\n    {key}\n")
    click.echo(f"entry for ORDERFLOW_API_KEYS, or a line of the file that it names with @FILE:\n    {entry}\n")
    click.echo(f"how it is sent:\n    Authorization: Bearer {key[:8]}...")
