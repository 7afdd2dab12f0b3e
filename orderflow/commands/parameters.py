"""Flags that several commands share, and the two kinds of argument that click lacks: times and ids."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import click

F = TypeVar("F", bound=Callable[..., Any])

_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s|m|min|h|d|w)(?:\s+ago)?", re.ASCII)
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604_800}


def identifier(value: str | UUID) -> UUID:
    """A UUID, of an order or of an event; usage error for anything else."""
    try:
        if isinstance(value, UUID):
            return value
        # UUID() reads the digits of every script: what is typed in them was not copied from us.
        return UUID(value.strip() if value.isascii() else "")
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a UUID") from None


def moment_or_ago(value: str | datetime) -> datetime:
    """A point in time: ISO 8601 (without an offset: UTC), or so long ago, such as `30m` or `2h`.

    Usage error for anything else.
    """
    if isinstance(value, datetime):
        return value
    text = value.strip()
    try:
        if ago := _AGO.fullmatch(text):
            return datetime.now(UTC) - timedelta(seconds=float(ago[1]) * _UNITS[ago[2]])
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{value!r} is neither a time such as 2026-05-01T12:00Z nor so long ago, such as 30m or 2h"
        ) from None


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
limit_option = click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Rows at the most.")


def database_option(command: F) -> F:
    """`--database-url`."""
    return click.option("--database-url", metavar="URL", help="PostgreSQL [DATABASE_URL].")(command)


def kafka_option(command: F) -> F:
    """`--kafka`, which reaches the command as `kafka_bootstrap_servers`."""
    return click.option("--kafka", "kafka_bootstrap_servers", metavar="HOST:PORT,...", help="Kafka [KAFKA_BOOTSTRAP_SERVERS].")(
        command
    )


def log_format_option(command: F) -> F:
    """`--log-format`."""
    return click.option(
        "--log-format",
        type=click.Choice(["json", "console", "auto", "off"]),
        help="auto: console on a terminal, else json [ORDERFLOW_LOG_FORMAT].",
    )(command)


def server_options(command: F) -> F:
    """All three, for what talks to both servers and logs."""
    return database_option(kafka_option(log_format_option(command)))
