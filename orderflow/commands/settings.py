"""`orderflow settings`: every setting with its value and source; also writes `.env.example` and the README's table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click

from orderflow.commands import environment
from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import table
from orderflow.settings import Settings, environment_name, load, masked

SECRET = ("password", "secret", "token")
_DIGEST = re.compile(r"(?<=:)[0-9a-fA-F]{64}")
HEAD = """\
# Every setting of orderflow with its default. Flags win over the environment, the environment wins over `.env`.
# Copy this file to `.env` and change what you need; `orderflow settings` shows what is in force, and from where.
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as people see it. `value` has secrets masked; `unit` is empty where there is none."""

    name: str
    value: str
    default: str
    unit: str
    description: str
    source: str


def unit_of(field: str) -> str:
    """The unit that stands in a setting's name."""
    for ending, unit in (("_ms", "ms"), ("_seconds", "s"), ("_days", "d")):
        if field.endswith(ending):
            return unit
    return ""


def public_fields() -> Iterator[tuple[str, Any]]:
    """The settings that are people's business: (name, field)."""
    return (
        (name, field) for name, field in Settings.model_fields.items() if not (field.description or "").startswith("internal")
    )


def text_of(value: object) -> str:
    """A value as it is written in the environment."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def described(field: str, description: str) -> str:
    """The description with the unit in front of it."""
    return f"[{unit_of(field)}] {description}" if unit_of(field) else description


def env_example() -> str:
    """The text of `.env.example`: a commented line for settings without a default, an assignment for the others."""
    lines = [HEAD]
    for name, field in public_fields():
        text = text_of(field.default)
        assignment = f"{environment_name(name)}={text}" if text else f"#{environment_name(name)}="
        lines.append(f"# {described(name, field.description or '')}\n{assignment}\n")
    return "\n".join(lines)


def markdown() -> str:
    """The settings table of the README."""
    rows = ["| Setting | Default | Unit | |", "|---|---|---|---|"]
    for name, field in public_fields():
        default = f"`{text_of(field.default)}`" if text_of(field.default) else ""
        description = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{environment_name(name)}` | {default} | {unit_of(name)} | {description} |")
    return "\n".join(rows) + "\n"


def effective(settings: Settings) -> list[Setting]:
    """Every setting as it is in force."""
    where = environment.given()
    return [
        Setting(
            environment_name(name),
            _safe(name, getattr(settings, name)),
            text_of(field.default),
            unit_of(name),
            field.description or "",
            where.get(environment_name(name), "default"),
        )
        for name, field in public_fields()
    ]


def _safe(name: str, value: object) -> str:
    if value is None:
        return ""
    if any(word in name for word in SECRET):
        return "***"
    # Whose keys they are is worth seeing; what stands for a key is not.
    return masked(str(value)) if name.endswith("_url") else _DIGEST.sub("***", text_of(value))


@click.command()
@click.option("--env", "form", flag_value="env", help="Print the text of .env.example.")
@click.option("--markdown", "form", flag_value="markdown", help="Print the table of the README.")
@click.option("--json", "form", flag_value="json", help="Print JSON instead of a table.")
def settings(form: str | None) -> None:
    """Every setting, its value with secrets masked, and where that comes from."""
    if form == "env":
        click.echo(env_example(), nl=False)
    elif form == "markdown":
        click.echo(markdown(), nl=False)
    elif form == "json":
        print_json([asdict(setting) for setting in effective(load())])
    else:
        table(
            ["setting", "value", "from", "what it is"],
            [[s.name, f"{s.value} {s.unit}".strip() if s.value else "", s.source, s.description] for s in effective(load())],
            wrap=("value", "what it is"),
        )
