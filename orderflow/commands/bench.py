"""`orderflow bench`: the benchmarks of the README, each beside its reference from the same run."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from orderflow.commands.output import escaped, fields, table
from orderflow.commands.parameters import database_option, kafka_option
from orderflow.commands.progress import progress

if TYPE_CHECKING:
    from orderflow.bench.extent import Extent
    from orderflow.bench.figures import Comparison, Figure, Spread, Target
    from orderflow.bench.results import Results

NAMES = ("A", "B", "C", "D", *(f"T{number}" for number in range(1, 18)), "LOAD")
LOG_NOTE = "JSON, to files"
WRITTEN = click.File("w", encoding="utf-8", lazy=True)
MEGABYTE = 1_000_000


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", type=click.Choice(NAMES, case_sensitive=False))
@click.option("--quick", is_flag=True, help="One short round: shows that it runs, not how fast it is.")
@click.option("--rounds", type=click.IntRange(1, 100), metavar="N", help="Alternating rounds [5; 1 with --quick].")
@click.option("--seconds", type=click.FloatRange(0.5, 3600), metavar="N", help="Length of one load [15; 1 with --quick].")
@click.option("--json", "json_file", type=WRITTEN, metavar="FILE", help="Write everything there; - is stdout.")
@click.option("--plot", "plot_file", type=WRITTEN, metavar="FILE.svg", help="Draw T1, T2, T4 over time, and LOAD.")
@click.option("--embedded-broker", is_flag=True, help="Use the broker of `dev` instead of Apache Kafka, and say so.")
@database_option
@kafka_option
def bench(
    names: tuple[str, ...],
    quick: bool,
    rounds: int | None,
    seconds: float | None,
    json_file: TextIO | None,
    plot_file: TextIO | None,
    embedded_broker: bool,
    database_url: str | None,
    kafka_bootstrap_servers: str | None,
) -> int:
    """Measure, beside references from the same run; exit 1 when the audit after a run finds a violation.

    \b
    A, B, C, D   references: bare aiohttp; pgbench step by step; a producer
                 after the commit; SQL by hand in groups
    T1, T2, T4   HTTP POST to PAID: best role split, one process, gateway 500 ms
    T3           POST accepted durably, one API process
    T5, T6       commit to consumer at 50/s and at 500/s
    T7, LOAD     HTTP POST to PAID at 20/s, and at rising rates
    T8           the relay alone drains 1,000,000 rows
    T9, T10      T1 with 10,000,000 settled orders; under a pinned xmin
    T11, T12     T1 with retries; with one hot key
    T13 to T15   idle CPU and statements; start; memory
    T16, T17     T1 with more processes; with logging on against off

    A target that is missed is printed and changes no exit code. Each name brings its references along. All of
    them in full take hours: bench/README.md says which.

    Starts a PostgreSQL and an Apache Kafka of its own (Java 17, and Maven once) unless told where they are. On
    servers that are named it makes scratch databases and topics, and touches nothing else.
    """
    if embedded_broker and kafka_bootstrap_servers:
        raise click.UsageError("--embedded-broker and --kafka exclude each other", click.get_current_context())

    from orderflow.bench.document import as_json
    from orderflow.bench.extent import QUICK, Extent
    from orderflow.bench.plot import plot
    from orderflow.bench.program import ProgramFailed
    from orderflow.embedded.errors import EmbeddedError

    extent = _changed(QUICK if quick else Extent(), rounds, seconds)
    try:
        head, results = asyncio.run(_measure(names, extent, database_url, kafka_bootstrap_servers, embedded_broker))
    except (EmbeddedError, ProgramFailed) as error:
        raise click.ClickException(str(error)) from error
    if json_file is None or json_file.name != "-":
        show(head, results, extent)
    if json_file is not None:
        json_file.write(as_json(head, results, extent))
    if plot_file is not None:
        drawn = plot(results, head)
        if drawn is None:
            click.echo("orderflow: nothing to draw: the plot is of T1, T2, T4 and LOAD", err=True)
        else:
            plot_file.write(drawn)
    for problem in results.problems:
        click.echo(f"orderflow: {escaped(' '.join(problem.split()))}", err=True)
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


def show(head: dict[str, Any], results: Results, extent: Extent) -> None:
    """Print the figures and the costs as tables under what they depend on."""
    from orderflow.bench.document import costs

    fields([(name, value) for name, value in head.items() if name != "executable"])
    rounds = "round" if extent.rounds == 1 else "rounds"
    click.echo(f"{extent.rounds} alternating {rounds}, loads of {extent.seconds:g} s; median (min..max)")
    click.echo()
    table(
        ["figure", "median", "min..max", "unit", "to", "its median", "ratio", "min..max", "target", "verdict", "what"],
        [row for figure in results.measured for row in _rows(figure)],
        right=("median", "its median", "ratio"),
        wrap=("what",),
    )
    if found := costs(results):
        click.echo()
        _show_costs(found)
    click.echo()
    runs = len(results.audits)
    if not results.problems:
        click.echo(f"audit after each of {runs} runs: ok" if runs else "no run with an audit")


def _rows(figure: Figure) -> list[list[str]]:
    """One for the figure by itself or for the first comparison, and one for each further comparison."""
    spread = figure.spread
    own = [figure.name, _number(spread.median), _range(spread), figure.unit]
    compared = [(comparison, ratio) for comparison in figure.beside if (ratio := comparison.ratio(figure))]
    if not compared or figure.target:
        alone = [*own, "", "", "", "", *_judged(figure.target, spread), figure.what]
        return [alone, *(["", "", "", "", *_compared(figure, *pair), ""] for pair in compared)]
    first, *further = (_compared(figure, *pair) for pair in compared)
    return [[*own, *first, figure.what], *(["", "", "", "", *row, ""] for row in further)]


def _compared(figure: Figure, comparison: Comparison, ratio: Spread) -> list[str]:
    return [
        comparison.reference.name, _number(comparison.reference_median(figure)), f"{ratio.median:.2f}",
        f"{ratio.low:.2f}..{ratio.high:.2f}", *_judged(comparison.target, ratio),
    ]  # fmt: skip


def _judged(target: Target | None, spread: Spread) -> list[str]:
    return [target.text, target.verdict(spread)] if target else ["", ""]


def _show_costs(found: dict[str, dict[str, Any]]) -> None:
    click.echo("CPU microseconds an order, and the peak of memory in MB, by process; what PostgreSQL did for an order")
    processes = list(dict.fromkeys(process for cost in found.values() for process in cost["cpu"]))
    columns = ["run", *processes, "together", "WAL bytes", "commits", "fsyncs"]
    rows = []
    for name, cost in found.items():
        cells = [
            f"{cost['cpu'][process]:,.0f} ({cost['peak'][process] / MEGABYTE:,.0f})" if process in cost["cpu"] else ""
            for process in processes
        ]
        counted = [cost["cost"].get(counter) for counter in ("wal_bytes", "commits", "fsyncs")]
        rows.append([name, *cells, f"{sum(cost['cpu'].values()):,.0f}", *("" if c is None else _number(c) for c in counted)])
    table(columns, rows, right=columns[1:])


def _range(spread: Spread) -> str:
    return f"{_number(spread.low)}..{_number(spread.high)}"


def _number(value: float) -> str:
    """Three significant digits or more, whatever the unit."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
