"""`orderflow torture --promises`: what each kind of failure costs, measured one by one."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import table
from orderflow.commands.progress import progress

if TYPE_CHECKING:
    from orderflow.torture.stage import Measured, Promise


def measure_promises(*, quick: bool, as_json: bool) -> int:
    """Print what was measured beside what was promised; 1 when something was not kept, or an audit found something."""
    from orderflow.bench.program import ProgramFailed
    from orderflow.embedded.errors import EmbeddedError

    with tempfile.TemporaryDirectory(prefix="orderflow-promises-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o711)  # as root, PostgreSQL runs as another user, who must get through
        try:
            found, problems = asyncio.run(_measure(directory, quick=quick))
        except (EmbeddedError, ProgramFailed) as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        rows = [{"promise": p.text, "limit": p.limit, "unit": p.unit, **asdict(m)} for p, m in found]
        print_json({"promises": rows, "problems": problems})
    else:
        table(
            ["promise", "at most", "measured", "unit", "verdict", "what bounds it, and what else was seen"],
            [[p.text, f"{p.limit:g}", f"{m.value:.2f}", p.unit, _verdict(p, m), m.note] for p, m in found],
            right=("at most", "measured"), wrap=("promise", "what bounds it, and what else was seen"),
        )  # fmt: skip
    for problem in problems:
        click.echo(f"orderflow: {problem}", err=True)
    return 1 if problems or any(m.value > p.limit for p, m in found) else 0


def _verdict(promise: Promise, measured: Measured) -> str:
    return "kept" if measured.value <= promise.limit else "BROKEN"


async def _measure(directory: Path, *, quick: bool) -> tuple[list[tuple[Promise, Measured]], list[str]]:
    from orderflow.bench.servers import Servers, fetch_kafka
    from orderflow.torture.promises import PROMISES
    from orderflow.torture.stage import Stage, measured

    with progress("promises") as tell:
        await fetch_kafka(tell)
        async with Servers(directory) as servers:
            stage = Stage(servers, directory, quick=quick)
            return await measured(stage, PROMISES, tell), stage.problems
