"""`orderflow torture`: load, a seeded plan of crashes and faults on real servers, then the audit."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orderflow.commands import audit as audit_command
from orderflow.commands import explain as explain_command
from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import escaped, table
from orderflow.commands.progress import progress

if TYPE_CHECKING:
    from orderflow.torture.driver import Extent, Report

SECONDS = click.FloatRange(1, 86_400)
RATE = click.FloatRange(1, 100_000)


@click.command()
@click.option("--seed", type=click.IntRange(0), metavar="N", help="The plan's seed; without it one is chosen and told.")
@click.option("--seconds", type=SECONDS, default=60.0, metavar="N", help="Length of load and faults [60].")
@click.option("--rate", type=RATE, default=200.0, metavar="N", help="Orders a second at the most [200].")
@click.option("--settle", type=SECONDS, default=90.0, metavar="SECONDS", help="Time to end everything after it [90].")
@click.option("--embedded-broker", is_flag=True, help="Use the broker of `dev` instead of Apache Kafka; it is not restarted.")
@click.option("--keep", is_flag=True, help="Keep the logs and the data, also when every promise was kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def torture(
    seed: int | None, seconds: float, rate: float, settle: float, embedded_broker: bool, keep: bool, as_json: bool
) -> int:
    """Break everything, then check every promise; exit 1 when one was not kept.

    Starts a PostgreSQL and an Apache Kafka of its own (Java 17, and Maven once) and the program as processes, sends
    orders, and meanwhile kills, stops, restarts and misleads them by a plan that is a pure function of the seed.
    After a violation the servers' data and all logs are kept.
    """
    from orderflow.bench.program import ProgramFailed
    from orderflow.embedded.errors import EmbeddedError
    from orderflow.torture.driver import Extent

    chosen = secrets.randbelow(1_000_000) if seed is None else seed
    if not as_json:
        click.echo(f"seed {chosen}")
    extent = Extent(seconds, rate, settle=settle)
    again = f"orderflow torture --seed {chosen} --seconds {seconds:g} --rate {rate:g}{' --embedded-broker' * embedded_broker}"
    directory = Path(tempfile.mkdtemp(prefix="orderflow-torture-"))
    directory.chmod(0o711)  # as root, PostgreSQL runs as another user, who must get through
    kept = True
    try:
        report = asyncio.run(_run(directory, chosen, extent, embedded_broker))
        kept = keep or bool(report.problems)
    except KeyboardInterrupt:
        kept = keep
        raise
    except ExceptionGroup as group:
        reasons = "; ".join(dict.fromkeys(map(_reason, _leaves(group))))
        raise click.ClickException(f"{reasons} (again with: {again}; logs in {directory})") from group
    except (EmbeddedError, ProgramFailed) as error:
        raise click.ClickException(f"{error} (again with: {again}; logs in {directory})") from error
    finally:
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)
    if as_json:
        print_json(_document(report))
    else:
        show(report)
    if kept:
        click.echo(f"orderflow: again with: {again}; logs in {directory}", err=True)
    return 1 if report.problems else 0


def _reason(error: BaseException) -> str:
    from orderflow.bench.program import ProgramFailed
    from orderflow.embedded.errors import EmbeddedError

    return str(error) if isinstance(error, EmbeddedError | ProgramFailed) else f"{type(error).__name__}: {error}"


async def _run(directory: Path, seed: int, extent: Extent, embedded_broker: bool) -> Report:
    from orderflow.bench.servers import Servers, fetch_kafka
    from orderflow.torture.driver import Driver
    from orderflow.torture.plan import plan

    if not embedded_broker:
        with progress("fetching Apache Kafka") as tell:
            await fetch_kafka(tell)
    with progress("torture") as tell:
        tell(0.0, "starting the servers")
        async with Servers(directory, embedded_broker=embedded_broker) as servers:
            faults = plan(seed, extent.seconds, broker_restarts=not embedded_broker)
            return await Driver(servers, directory, seed, faults, extent, tell).run()


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def show(report: Report) -> None:
    """Print what was done, what came of it, and the story of the first order that was wronged."""
    table(
        ["planned", "began", "ended", "fault", "what"],
        [[f"{i.fault.at:.1f} s", f"{i.began:.1f} s", f"{i.ended:.1f} s", i.fault.kind, i.what] for i in report.injected],
        right=("planned", "began", "ended"),
        empty="no fault fits into so short a time",
    )
    load = report.load
    click.echo()
    click.echo(
        f"{load.accepted:,} orders accepted ({', '.join(f'{n:,} {state}' for state, n in report.states.items())}); "
        f"answers: {', '.join(f'{n:,} x {status}' for status, n in sorted(load.answers.items()))}; "
        f"{load.lost_connections:,} lost connections, {load.unresolved:,} requests without an answer"
    )
    if report.settled_after is not None:
        click.echo(f"settled {report.settled_after:.1f} s after the load")
    click.echo()
    audit_command.show(report.findings)
    for problem in report.problems:
        click.echo(f"orderflow: {escaped(problem)}", err=True)
    if report.first is not None:
        click.echo()
        explain_command.show(report.first)


def _document(report: Report) -> dict[str, object]:
    document = asdict(report)
    document["findings"] = [{**asdict(f), "verdict": f.verdict} for f in report.findings]
    document["sound"] = not report.problems
    return document
