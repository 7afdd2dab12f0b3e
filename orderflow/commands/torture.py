"""`orderflow torture`: load, a seeded plan of crashes and faults on real servers, then the audit."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orderflow.commands import audit as audit_command
from orderflow.commands import explain as explain_command
from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import escaped, table
from orderflow.commands.progress import Tell, progress
from orderflow.commands.promises import measure_promises

if TYPE_CHECKING:
    from orderflow.torture.driver import Extent
    from orderflow.torture.plan import Kind
    from orderflow.torture.report import Report
    from orderflow.torture.runs import Runs

SECONDS = click.FloatRange(1, 86_400)
FILE = click.Path(dir_okay=False, writable=True)
RATE = click.FloatRange(1, 100_000)
EVERY = click.FloatRange(1, 3_600)


@click.command()
@click.option("--seed", type=click.IntRange(0), metavar="N", help="The plan's seed; without it one is chosen and told.")
@click.option("--seconds", type=SECONDS, default=60.0, metavar="N", help="Length of load and faults [60].")
@click.option("--rate", type=RATE, default=200.0, metavar="N", help="Orders a second at the most [200].")
@click.option("--clients", type=click.IntRange(1, 10_000), default=16, metavar="N", help="Who send them [16].")
@click.option("--every", type=EVERY, default=2.25, metavar="SECONDS", help="Mean time from a fault to the next [2.25].")
@click.option("--settle", type=SECONDS, default=90.0, metavar="SECONDS", help="Time to end everything after it [90].")
@click.option("--fault", "faults", multiple=True, metavar="NAME", help="Faults of this kind only; several times for several.")
@click.option("--only", metavar="N,N,...", help="Of the plan these faults only, by their numbers from 1.")
@click.option("--shrink", "tries", type=click.IntRange(0), default=0, metavar="N", help="Cut down what fails, in N more runs.")
@click.option("--report", type=FILE, metavar="FILE", help="Write a report in Markdown, and its picture beside it.")
@click.option("--embedded-broker", is_flag=True, help="Use the broker of `dev` instead of Apache Kafka; it is not restarted.")
@click.option("--keep", is_flag=True, help="Keep the logs and the data, also when every promise was kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--at-seams", is_flag=True, help="Beside the plan, kill and mislead all processes at their seams all the time.")
@click.option("--seams", is_flag=True, help="Only list the seams where ORDERFLOW_FAILPOINTS can make something go wrong.")
@click.option("--kinds", is_flag=True, help="Only list the kinds of faults.")
@click.option("--promises", is_flag=True, help="Only measure what each kind of failure costs, and nothing of it at random.")
@click.option("--quick", is_flag=True, help="With --promises: short absences, to show that it runs.")
@click.option("--each", "alone", is_flag=True, help="A run for each kind of fault alone, one after the other, --seconds long.")
def torture(
    seed: int | None,
    seconds: float,
    rate: float,
    clients: int,
    every: float,
    settle: float,
    faults: Sequence[str],
    only: str | None,
    tries: int,
    report: str | None,
    embedded_broker: bool,
    keep: bool,
    as_json: bool,
    at_seams: bool,
    seams: bool,
    kinds: bool,
    promises: bool,
    quick: bool,
    alone: bool,
) -> int:
    """Break everything, then check every promise; exit 1 when one was not kept.

    Starts a PostgreSQL and an Apache Kafka of its own (Java 17, and Maven once) and the program as processes, sends
    orders, and meanwhile kills, stops, restarts and misleads them by a plan that is a pure function of the seed.
    After a violation the servers' data and all logs are kept.
    """
    if seams:
        return _list_seams(as_json)
    if kinds:
        return _list_kinds(as_json)
    if promises:
        return measure_promises(quick=quick, as_json=as_json)
    from orderflow.torture.driver import Extent
    from orderflow.torture.plan import plan
    from orderflow.torture.runs import Runs

    chosen = secrets.randbelow(1_000_000) if seed is None else seed
    if not as_json:
        click.echo(f"seed {chosen}")
    flags = " --embedded-broker" * embedded_broker + " --at-seams" * at_seams
    size = f"--seconds {seconds:g} --every {every:g} --rate {rate:g} --clients {clients} --settle {settle:g}"
    command = f"orderflow torture --seed {chosen} {size}{flags}"
    extent = Extent(seconds, rate, clients, settle=settle, at_seams=at_seams)
    done = _kinds(faults, embedded_broker)
    if alone:
        return _each(done, chosen, every, extent, command, embedded_broker=embedded_broker, keep=keep, as_json=as_json)
    command += "".join(f" --fault {name}" for name in faults)
    drawn = plan(chosen, seconds, every=every, kinds=done)
    runs = Runs(chosen, drawn, extent, command, embedded_broker, keep)
    result = _carried_out(runs, _numbers(only, len(runs.plan)), tries)
    if report is not None:
        _write(result, Path(report), runs.again(result.plan))
    if as_json:
        print_json(result.document())
    else:
        show(result)
    if runs.kept is not None:
        click.echo(f"orderflow: again with: {runs.again(result.plan)}; logs in {runs.kept}", err=True)
    return 1 if result.problems else 0


def _each(
    kinds: Sequence[Kind], seed: int, every: float, extent: Extent, command: str,
    *, embedded_broker: bool, keep: bool, as_json: bool,
) -> int:  # fmt: skip
    import orderflow.app  # noqa: F401  (the seams are those of what has been imported)
    from orderflow.torture.each import each
    from orderflow.torture.runs import RunFailed

    _fetch(embedded_broker)
    try:
        with progress("torture") as tell:
            found = asyncio.run(
                each(
                    kinds, seed, every, extent, lambda kind: f"{command} --fault {option_of(kind)}",
                    embedded_broker=embedded_broker, keep=keep, tell=tell,
                )
            )  # fmt: skip
    except RunFailed as failed:
        raise click.ClickException(str(failed)) from failed
    if as_json:
        print_json({option_of(kind): report.document() for kind, report, _ in found})
    else:
        table(
            ["fault", "times", "orders", "ended meanwhile", "settled after", "verdict"],
            [[option_of(kind), str(len(report.injected)), *_outcome(report)] for kind, report, _ in found],
            right=("times", "orders", "ended meanwhile", "settled after"),
        )
    for kind, report, runs in found:
        for problem in report.problems:
            click.echo(f"orderflow: {option_of(kind)}: {escaped(problem)}", err=True)
        if runs.kept is not None:
            click.echo(f"orderflow: {option_of(kind)} again with: {runs.command}; logs in {runs.kept}", err=True)
    return 1 if any(report.problems for _, report, _ in found) else 0


def _outcome(report: Report) -> list[str]:
    settled = "" if report.settled_after is None else f"{report.settled_after:.1f} s"
    verdict = "VIOLATED" if report.problems else "kept"
    return [f"{sum(report.states.values()):,}", f"{report.ended_meanwhile:,}", settled, verdict]


def _carried_out(runs: Runs, numbers: Sequence[int], tries: int) -> Report:
    import orderflow.app  # noqa: F401  (the seams are those of what has been imported)
    from orderflow.torture.runs import RunFailed

    _fetch(runs.embedded_broker)
    try:
        with progress("torture") as tell:
            result = asyncio.run(runs.of(numbers, tell))
        if result.problems and tries:
            with progress("shrinking") as tell:
                result = asyncio.run(runs.shrunk(result, tries, tell))
    except RunFailed as failed:
        raise click.ClickException(str(failed)) from failed
    return result


def _kinds(names: Sequence[str], embedded_broker: bool) -> list[Kind]:
    """Those that were named, or all that can be done here. Raises a usage error."""
    from orderflow.torture import limited
    from orderflow.torture.plan import OF_KAFKA, OF_ROOT, Kind

    impossible = (OF_KAFKA if embedded_broker else frozenset()) | (frozenset() if limited.possible() else OF_ROOT)
    known = {option_of(kind): kind for kind in Kind}
    for name in names:
        if name not in known:
            raise click.BadParameter(f"no fault is named {name!r}: see `orderflow torture --kinds`", param_hint="--fault")
        if known[name] in impossible:
            needed = "root on Linux" if known[name] in OF_ROOT else "Apache Kafka"
            raise click.BadParameter(f"{name} needs {needed}", param_hint="--fault")
    return [known[name] for name in names] or [kind for kind in Kind if kind not in impossible]


def option_of(kind: Kind) -> str:
    """The kind's name on the command line."""
    return kind.name.lower().replace("_", "-")


def _numbers(only: str | None, planned: int) -> list[int]:
    """Indices from 0 of the faults to do. Raises a usage error."""
    if only is None:
        return list(range(planned))
    try:
        numbers = sorted({int(text) for text in only.split(",")})
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= planned for number in numbers):
        raise click.BadParameter(f"numbers from 1 to {planned}, divided by commas", param_hint="--only")
    return [number - 1 for number in numbers]


def _fetch(embedded_broker: bool) -> None:
    if not embedded_broker:
        with progress("fetching Apache Kafka") as tell:
            asyncio.run(_fetched(tell))


async def _fetched(tell: Tell) -> None:
    from orderflow.bench.servers import fetch_kafka
    from orderflow.embedded.errors import EmbeddedError

    try:
        await fetch_kafka(tell)
    except EmbeddedError as error:
        raise click.ClickException(str(error)) from error


def _write(report: Report, path: Path, again: str) -> None:
    picture = path.with_suffix(".svg")
    path.write_text(report.markdown(again, picture.name), encoding="utf-8")
    picture.write_text(report.picture(), encoding="utf-8")


def _list_kinds(as_json: bool) -> int:
    from orderflow.torture.plan import LASTING, Kind

    rows = [[option_of(kind), str(kind), "{:g} to {:g} s".format(*LASTING[kind]) if kind in LASTING else ""] for kind in Kind]
    if as_json:
        print_json({name: text for name, text, _ in rows})
    else:
        table(["fault", "what is done", "lasts"], rows)
    return 0


def _list_seams(as_json: bool) -> int:
    import orderflow.app  # noqa: F401  (whatever can run has been imported then)
    from orderflow.engine import seams

    found = {name: (function.__doc__ or "").partition("\n")[0] for name, function in sorted(seams.seams().items())}
    if as_json:
        print_json(found)
    else:
        table(["seam", "what is done there"], [[name, text] for name, text in found.items()], wrap=("what is done there",))
    return 0


def show(report: Report) -> None:
    """Print what was done, what came of it, and the story of the first order that was wronged."""
    table(
        ["planned", "began", "ended", "fault", "what"],
        [[f"{i.fault.at:.1f} s", f"{i.began:.1f} s", f"{i.ended:.1f} s", i.fault.kind, i.what] for i in report.injected],
        right=("planned", "began", "ended"),
        empty="no fault fits into so short a time",
    )
    from orderflow.torture.report import counts

    load = report.load
    click.echo()
    click.echo(
        f"{load.accepted + report.accepted_besides:,} orders accepted ({counts(report.states)}), "
        f"{report.ended_meanwhile:,} of them ended among the faults; "
        f"answers: {', '.join(f'{n:,} x {status}' for status, n in sorted(load.answers.items()))}; "
        f"{load.lost_connections:,} lost connections, {load.unresolved:,} requests without an answer"
    )
    if report.killed_at:
        click.echo(f"{sum(report.killed_at.values()):,} processes killed themselves, at {len(report.killed_at)} places")
    if report.settled_after is not None:
        click.echo(f"settled {report.settled_after:.1f} s after the load")
    click.echo()
    audit_command.show(report.findings)
    for problem in report.problems:
        click.echo(f"orderflow: {escaped(problem)}", err=True)
    if report.first is not None:
        click.echo()
        explain_command.show(report.first)
