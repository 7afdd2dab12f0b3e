"""What commands print: tables, JSON, questions. No text from the database is trusted to be printable."""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import click

NARROWEST = 24


def escaped(text: str) -> str:
    """The text with each control character (terminal escapes, newlines, direction marks) shown as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A value as a cell of a table; None is empty, times are UTC with milliseconds."""
    match value:
        case None:
            return ""
        case datetime():
            return moment(value)
        case timedelta():
            return duration(value.total_seconds())
        case bool():
            return "yes" if value else "no"
        case _:
            return escaped(str(value))


def moment(value: datetime) -> str:
    """A time in UTC with milliseconds, such as `2026-05-01 12:00:00.123Z`."""
    try:
        return value.astimezone(UTC).isoformat(" ", "milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError):
        return str(value)


def duration(seconds: float) -> str:
    """A length of time that is easy to compare: `0.4 ms`, `512 ms`, `3.1 s`, `12 min`, `5 h`, `3 d`."""
    size = abs(seconds)
    if size < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if size < 1:
        return f"{seconds * 1000:.0f} ms"
    if size < 120:
        return f"{seconds:.1f} s"
    for unit, name, limit in ((60, "min", 7200), (3600, "h", 172_800)):
        if size < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def as_json(value: object) -> None:
    """Print one JSON document; UUIDs and decimals become strings, bytes base64, times RFC 3339."""
    import orjson

    click.echo(orjson.dumps(value, default=_plain, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))


def camel(name: str) -> str:
    """A column's name as it stands in JSON: `event_id` is `eventId`."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


def _plain(value: object) -> object:
    match value:
        # UUID too: asyncpg's are of a class of their own, which orjson does not know.
        case Decimal() | UUID():
            return str(value)
        case timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            raise TypeError(f"{type(value).__name__} has no JSON form")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[str] = (),
    wrap: Sequence[str] = (),
    empty: str = "",
) -> None:
    """Print rows under headings: a table on a terminal, aligned text in a pipe; without rows `empty`, on stderr.

    `right` names the columns that hold numbers, `wrap` those whose text may be broken to fit the terminal. Ids, times and
    numbers stay whole for copying: a table of those that is wider than the terminal is left to the terminal to break.
    """
    if not rows:
        click.echo(empty, err=True)
        return
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    texts = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *texts, strict=True)]
    grid = Table(
        box=box.SIMPLE_HEAD if terminal else None,
        padding=(0, 1, 0, 0) if terminal else (0, 2, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bold" if terminal else "",
    )
    least = [min(width, NARROWEST) if name in wrap else width for name, width in zip(columns, widths, strict=True)]
    for name, width, narrowest in zip(columns, widths, least, strict=True):
        grid.add_column(
            name,
            justify="right" if name in right else "left",
            min_width=narrowest,
            max_width=width,
            overflow="fold",
        )
    for row in texts:
        grid.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in row))
    out = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    out.width = max(out.width, sum(least) + 2 * len(columns)) if terminal else sum(widths) + 2 * len(columns)
    with out.capture() as captured:
        out.print(grid)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


_STYLES = {
    "PAID": "green",
    "FAILED": "red",
    "PAYMENT_PENDING": "yellow",
    "CREATED": "cyan",
    "ok": "green",
    "warning": "yellow",
    "problem": "bold red",
    "VIOLATED": "bold red",
    "missed": "bold red",
    "not checked": "dim",
}


def fields(values: Sequence[tuple[str, object]]) -> None:
    """Print name and value pairs, one a line; pairs without a value are left out."""
    width = max((len(name) for name, value in values if value is not None), default=0)
    for name, value in values:
        if value is not None:
            click.echo(f"{name.ljust(width)}  {shown(value)}")


def agreed(question: str, *, yes: bool) -> None:
    """Ask on a terminal; `--yes`, or no terminal to ask on, goes ahead.

    Raises click.ClickException when the answer is no.
    """
    if yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    if not click.confirm(question, err=True):
        raise click.ClickException("nothing was changed")
