"""`orderflow audit`: every invariant over the whole database."""

from __future__ import annotations

from dataclasses import asdict
from typing import TextIO
from uuid import UUID

import click

from orderflow import audit as invariants
from orderflow.audit import Finding
from orderflow.commands.output import as_json as print_json
from orderflow.commands.output import escaped, table
from orderflow.commands.parameters import as_json_option, database_option
from orderflow.commands.progress import progress
from orderflow.commands.session import with_database
from orderflow.engine.postgres import Database


@click.command()
@click.option(
    "--accepted",
    type=click.File(encoding="utf-8", errors="replace"),
    metavar="FILE",
    help="The load generator's record for I7: the id of an accepted order a line; - reads stdin.",
)
@click.option(
    "--retry-horizon",
    type=click.FloatRange(min=0),
    default=invariants.RETRY_HORIZON,
    show_default=True,
    metavar="SECONDS",
    help="I4 and I5: how long publishing and processing may take.",
)
@click.option(
    "--reconcile-horizon",
    type=click.FloatRange(min=0),
    default=invariants.RECONCILE_HORIZON,
    show_default=True,
    metavar="SECONDS",
    help="I6: how long an order may stay non-terminal.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=900.0,
    show_default=True,
    metavar="SECONDS",
    help="Limit for each invariant's statement.",
)
@as_json_option
@database_option
def audit(
    accepted: TextIO | None,
    retry_horizon: float,
    reconcile_horizon: float,
    timeout: float,
    as_json: bool,
    database_url: str | None,
) -> int:
    """Check every invariant over the whole database; exit 1 when one is violated.

    Reads one snapshot and changes nothing: it may run beside a working system. An order whose charge has an
    unknown outcome stays PAYMENT_PENDING on purpose; past the reconcile horizon I6 names it, so that somebody looks.
    """
    ids = None if accepted is None else accepted_ids(accepted)

    async def work(database: Database) -> list[Finding]:
        with progress("auditing") as tell:
            async with database.acquire() as connection:
                return await invariants.audit(
                    connection,
                    retry_horizon=retry_horizon,
                    reconcile_horizon=reconcile_horizon,
                    accepted=ids,
                    timeout=timeout,
                    checking=lambda invariant: tell(
                        invariants.INVARIANTS.index(invariant) / len(invariants.INVARIANTS),
                        f"{invariant.name}: {invariant.text}",
                    ),
                )

    findings = with_database(database_url, work, statement_seconds=timeout)
    if as_json:
        print_json([{**asdict(f), "verdict": f.verdict} for f in findings])
    else:
        show(findings)
    return 1 if any(finding.violations for finding in findings) else 0


def accepted_ids(lines: TextIO) -> list[UUID]:
    """The ids in the file, one a line, empty lines left out; usage error that names the line which is not a UUID."""
    ids = []
    for number, line in enumerate(lines, 1):
        if text := line.strip():
            try:
                ids.append(UUID(text))
            except ValueError:
                wrong = f"line {number} is not a UUID: {text[:80]!r}"
                raise click.BadParameter(wrong, click.get_current_context(), param_hint="--accepted") from None
    return ids


def show(findings: list[Finding]) -> None:
    """Print the findings as a table, and what is violated below it."""
    table(
        ["", "verdict", "checked", "violations", "invariant"],
        [
            [f.invariant, f.verdict, *(("", "") if f.not_checked else (f.checked, f.violations)),
             f"{f.text} ({f.not_checked})" if f.not_checked else f.text]
            for f in findings
        ],
        right=("checked", "violations"),
        wrap=("invariant",),
    )  # fmt: skip
    for finding in findings:
        if finding.violations:
            click.echo()
            click.echo(f"{finding.invariant}: {finding.violations} violations")
            for example in finding.examples:
                click.echo(f"  {escaped(example)}")
            if finding.violations > len(finding.examples):
                click.echo(f"  ... and {finding.violations - len(finding.examples)} more")
