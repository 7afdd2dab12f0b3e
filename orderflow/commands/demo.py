"""`orderflow demo`: the walk-through, played on real processes, and every expected result checked."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import aiohttp
import asyncpg
import click

from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import duration, table
from orderflow.commands.parameters import as_json_option, database_option, kafka_option
from orderflow.commands.progress import progress
from orderflow.settings import load

if TYPE_CHECKING:
    from orderflow.commands.walkthrough.parts import Part
    from orderflow.commands.walkthrough.stage import Stage

SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True)
class Result:
    """One part's result; `seconds` is how long it took."""

    part: int
    title: str
    expected: str
    seen: str
    ok: bool
    seconds: float


@click.command()
@as_json_option
@database_option
@kafka_option
def demo(as_json: bool, database_url: str | None, kafka_bootstrap_servers: str | None) -> int:
    """Walk an order through everything and check each step; exit 1 when one is missed.

    Starts PostgreSQL and a broker of its own, as `orderflow dev` does, in a temporary directory. With --database-url and
    --kafka it uses those servers instead: a database that nothing else works on, since it fills it and switches its gateway.
    """
    if (database_url is None) != (kafka_bootstrap_servers is None):
        raise click.UsageError(
            "give both --database-url and --kafka, or neither: then it starts servers of its own",
            click.get_current_context(),
        )
    results = asyncio.run(play(database_url, kafka_bootstrap_servers, quiet=as_json))
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        table(
            ["part", "", "what", "expected", "seen", "took"],
            [[r.part, "ok" if r.ok else "missed", r.title, r.expected, r.seen, duration(r.seconds)] for r in results],
            right=("took",),
            wrap=("what", "expected", "seen"),
        )
    return 0 if all(result.ok for result in results) else 1


async def play(database_url: str | None, kafka: str | None, *, quiet: bool) -> list[Result]:
    """Play every part; after one that is missed the others are played all the same, unless nothing was started."""
    from orderflow.commands.walkthrough.parts import AUDIT, PARTS
    from orderflow.commands.walkthrough.stage import prepared
    from orderflow.embedded.errors import EmbeddedError

    settings = load(database_url=database_url, kafka_bootstrap_servers=kafka)
    results: list[Result] = []
    try:
        async with AsyncExitStack() as stack:
            bar = stack.enter_context(ExitStack())
            tell = bar.enter_context(progress("demo"))
            tell(0.0, "starting the servers")
            stage = await stack.enter_async_context(prepared(settings, embedded=database_url is None))
            parts = (*PARTS, AUDIT) if stage.private else PARTS
            for part in parts:
                tell(len(results) / len(parts), f"part {part.number}, {part.title}")
                results.append(await _played(part, stage))
                if not results[0].ok:
                    break
            bar.close()
            if not quiet and results[0].ok:
                await _show_tables(stage)
    except EmbeddedError as error:
        raise click.ClickException(str(error)) from error
    return results


async def _played(part: Part, stage: Stage) -> Result:
    from orderflow.commands.walkthrough import Missed

    began = time.monotonic()
    try:
        seen, ok = await part.play(stage), True
    except (Missed, KeyError, TimeoutError, OSError, asyncpg.PostgresError, aiohttp.ClientError) as error:
        seen, ok = (str(error) if isinstance(error, Missed) else f"{type(error).__name__}: {error}"), False
    return Result(part.number, part.title, part.expected, seen, ok, round(time.monotonic() - began, 3))


async def _show_tables(stage: Stage) -> None:
    from orderflow.commands.walkthrough.parts import TABLES

    for name, query in TABLES.items():
        rows = await stage.database.fetch(f"{query} LIMIT {SHOWN_ROWS}")
        click.echo(f"{name}, the newest {len(rows)}:")
        table(list(rows[0].keys()) if rows else [], [list(row.values()) for row in rows], empty="  (empty)")
        click.echo()
