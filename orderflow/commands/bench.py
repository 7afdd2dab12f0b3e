"""`orderflow bench`: the benchmarks of the README, each beside its reference from the same run."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from orderflow.commands.output import fields, table
from orderflow.commands.parameters import database_option, kafka_option
from orderflow.commands.progress import progress

if TYPE_CHECKING:
    from orderflow.bench.figures import Figure, Spread
    from orderflow.bench.suite import Extent, Results

NAMES = ("B", "E1", "E4", "L1", "S1")
LOG_NOTE = "JSON, to files"
JSON_FILE = click.File("w", encoding="utf-8", lazy=True)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", type=click.Choice(NAMES, case_sensitive=False))
@click.option("--quick", is_flag=True, help="One short round: shows that it runs, not how fast it is.")
@click.option("--rounds", type=click.IntRange(1, 100), metavar="N", help="Alternating rounds [3; 1 with --quick].")
@click.option("--seconds", type=click.FloatRange(0.5, 3600), metavar="N", help="Length of one load [15; 2 with --quick].")
@click.option("--json", "json_file", type=JSON_FILE, metavar="FILE", help="Write everything there; - is stdout.")
@click.option("--embedded-broker", is_flag=True, help="Use the broker of `dev` instead of Apache Kafka, and say so.")
@database_option
@kafka_option
def bench(
    names: tuple[str, ...],
    quick: bool,
    rounds: int | None,
    seconds: float | None,
    json_file: TextIO | None,
    embedded_broker: bool,
    database_url: str | None,
    kafka_bootstrap_servers: str | None,
) -> int:
    """Measure, beside a reference from the same run; exit 1 when the audit after a run finds a violation.

    \b
    B    reference: pgbench, one order's five transactions step by step
    E1   end to end, HTTP to PAID, gateway 0 ms, all roles
    E4   the same with the gateway at 500 ms
    L1   single orders at 20/s on an idle system
    S1   start until ready, and --help

    Starts a PostgreSQL and an Apache Kafka of its own (Java 17, and Maven once) unless told where they are. On
    servers that are named it makes scratch databases and topics, and touches nothing else.
    """
    if embedded_broker and kafka_bootstrap_servers:
        raise click.UsageError("--embedded-broker and --kafka exclude each other", click.get_current_context())

    from orderflow.bench.program import ProgramFailed
    from orderflow.bench.suite import Extent
    from orderflow.embedded.errors import EmbeddedError

    extent = Extent(rounds=1, seconds=2.0, warm_up=0.5, orders=20) if quick else Extent()
    extent = _changed(extent, rounds, seconds)
    try:
        head, results = asyncio.run(_measure(names, extent, database_url, kafka_bootstrap_servers, embedded_broker))
    except (EmbeddedError, ProgramFailed) as error:
        raise click.ClickException(str(error)) from error
    if json_file is None or json_file.name != "-":
        show(head, results, extent)
    if json_file is not None:
        _write_json(json_file, head, results, extent)
    for problem in results.problems:
        click.echo(f"orderflow: {problem}", err=True)
    return 1 if results.problems else 0


def _changed(extent: Extent, rounds: int | None, seconds: float | None) -> Extent:
    from dataclasses import replace

    return replace(extent, rounds=rounds or extent.rounds, seconds=seconds or extent.seconds)


async def _measure(
    names: tuple[str, ...], extent: Extent, database_url: str | None, bootstrap: str | None, embedded_broker: bool
) -> tuple[dict[str, Any], Results]:
    from orderflow.bench.about import about
    from orderflow.bench.servers import Servers, fetch_kafka
    from orderflow.bench.suite import Suite

    if not (bootstrap or embedded_broker):
        with progress("fetching Apache Kafka") as tell:
            await fetch_kafka(tell)
    with tempfile.TemporaryDirectory(prefix="orderflow-bench-") as name, progress("bench") as tell:
        directory = Path(name)
        os.chmod(directory, 0o711)  # as root, PostgreSQL runs as another user, who must get through
        tell(0.0, "starting the servers")
        async with Servers(
            directory, database_url=database_url, bootstrap=bootstrap, embedded_broker=embedded_broker
        ) as servers:
            head = {**await about(servers, sys.argv[1:]), "log": LOG_NOTE}
            return head, await Suite(servers, directory, [n.upper() for n in names], extent, tell).run()


def _write_json(file: TextIO, head: dict[str, Any], results: Results, extent: Extent) -> None:
    from dataclasses import asdict

    import orjson

    document = {
        **head,
        "extent": asdict(extent),
        "figures": [figure.as_json() for figure in results.figures],
        "runs": [
            {"run": run.audited.run, "orders": run.orders, "seconds": run.seconds, "ordersPerSecond": run.orders_per_second,
             "load": asdict(run.load)}
            for run in results.throughputs
        ],
        "audits": [
            {"run": a.run, "findings": [{**asdict(f), "verdict": f.verdict} for f in a.findings], "problems": a.problems}
            for a in results.audits
        ],
        "sound": not results.problems,
    }  # fmt: skip
    file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")


def show(head: dict[str, Any], results: Results, extent: Extent) -> None:
    """Print the figures as a table under what they depend on."""
    fields([(name, value) for name, value in head.items() if name != "executable"])
    rounds = "round" if extent.rounds == 1 else "rounds"
    click.echo(f"{extent.rounds} alternating {rounds} of {extent.seconds:g} s; median (min..max)")
    click.echo()
    table(
        ["figure", "median", "min..max", "unit", "ratio", "min..max", "to", "what"],
        [_row(figure) for figure in results.figures],
        right=("median", "ratio"),
        wrap=("what",),
    )
    click.echo()
    runs = len(results.audits)
    if not results.problems:
        click.echo(f"audit after each of {runs} runs: ok" if runs else "no run with an audit")


def _row(figure: Figure) -> list[str]:
    spread, ratio = figure.spread, figure.ratio
    return [
        figure.name, _number(spread.median), _range(spread), figure.unit,
        f"{ratio.median:.2f}" if ratio else "", _range(ratio, 2) if ratio else "",
        figure.reference.name if figure.reference else "", figure.what,
    ]  # fmt: skip


def _range(spread: Spread, digits: int | None = None) -> str:
    if digits is not None:
        return f"{spread.low:.{digits}f}..{spread.high:.{digits}f}"
    return f"{_number(spread.low)}..{_number(spread.high)}"


def _number(value: float) -> str:
    """Three significant digits or more, whatever the unit."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
