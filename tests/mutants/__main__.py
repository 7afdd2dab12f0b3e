"""The mutation gate: `make mutants` switches each safeguard of the program off, one at a time; some test has to fail.

    python -m tests.mutants [NAME ...] [--quick] [--seed N] [--jobs N] [--list]

The tests of all chosen mutants are run on the program as it is first, and have to pass. Then each mutant is applied to a copy
of the tree, and its tests are run there. What was caught is written into docs/guarantees.md, except by --quick. Exit code 1
when one survives, or when a trial says nothing: a test was skipped, or failed for another reason than its promise.

A new safeguard comes with its mutant: one entry in the module of its room (`placing`, `tables`, `publishing`, `waking`,
`delivering`, `paying`, `upkeep`, `guarding`) that says what is switched off and which test has to notice.
`tests/unit/test_mutants.py`, a part of the whole suite, fails as soon as an entry no longer fits the program.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from orderflow.commands.output import duration, table
from orderflow.commands.progress import counting
from tests.mutants.catalogue import MUTANTS
from tests.mutants.document import DOCUMENT, written
from tests.mutants.mutant import Mutant, NotApplicable
from tests.mutants.trial import STARTING, Caught, Verdict, attempt, copied, run

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = 6
# For all tests on the program as it is; each has its own limit as well.
BASELINE_SECONDS = 900.0


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--quick", is_flag=True, help=f"Only {QUICK} of them, chosen by the seed.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Of the choice; without it one is chosen and told.")
@click.option("--jobs", type=click.IntRange(1, 8), default=2, metavar="N", help="Trials at a time [2].")
@click.option("--list", "only_list", is_flag=True, help="Only list the mutants.")
def main(names: Sequence[str], quick: bool, seed: int | None, jobs: int, only_list: bool) -> None:
    """Switch each safeguard off, one at a time: some test has to notice. NAME: only these."""
    chosen = _chosen(names, quick, seed)
    if only_list:
        table(("name", "safeguard"), [(mutant.name, mutant.safeguard) for mutant in chosen], wrap=("safeguard",))
        return
    began = time.monotonic()
    try:
        for mutant in chosen:
            mutant.mutated(ROOT)
    except NotApplicable as error:
        raise click.ClickException(str(error)) from None
    verdicts = asyncio.run(_tried(chosen, jobs))
    caught = {mutant.name: str(verdict) if isinstance(verdict, Caught) else "" for mutant, verdict in verdicts}
    if not quick:
        document = ROOT / DOCUMENT
        document.write_text(written(document.read_text("utf-8"), MUTANTS, caught), "utf-8")
    # What needs somebody's attention comes last, where a terminal shows it.
    rows = sorted(((mutant.name, str(verdict)) for mutant, verdict in verdicts), key=lambda row: not caught[row[0]])
    table(("mutant", "caught by"), rows, wrap=("caught by",))
    missed = sum(not by for by in caught.values())
    click.echo(f"{len(chosen) - missed} of {len(chosen)} caught in {duration(time.monotonic() - began)}")
    sys.exit(1 if missed else 0)


def _chosen(names: Sequence[str], quick: bool, seed: int | None) -> list[Mutant]:
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := set(names) - by_name.keys():
        raise click.UsageError(f"there is no mutant {', '.join(sorted(unknown))}: --list names them")
    chosen = [by_name[name] for name in names] or list(MUTANTS)
    if quick:
        seed = secrets.randbelow(1_000_000) if seed is None else seed
        click.echo(f"seed {seed}")
        chosen = random.Random(seed).sample(chosen, min(QUICK, len(chosen)))
    return chosen


async def _tried(chosen: Sequence[Mutant], jobs: int) -> list[tuple[Mutant, Verdict]]:
    tests = list(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    with counting("mutants", len(chosen) + 1) as advance:
        with copied(ROOT) as tree:
            timeout = max(mutant.timeout for mutant in chosen)
            parallel = ("-n", str(jobs), "--dist", "worksteal")
            baseline = await run(tree, tests, *parallel, timeout=timeout, limit=STARTING + BASELINE_SECONDS)
        if baseline.code != 0:
            click.echo(baseline.output, err=True)
            raise click.ClickException("these tests fail on the program as it is: nothing was switched off")
        advance(1)
        at_a_time = asyncio.Semaphore(jobs)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_attempt(mutant, at_a_time, advance)) for mutant in chosen]
    return [(mutant, task.result()) for mutant, task in zip(chosen, tasks, strict=True)]


async def _attempt(mutant: Mutant, at_a_time: asyncio.Semaphore, advance: Callable[[int], None]) -> Verdict:
    async with at_a_time:
        verdict = await attempt(mutant, ROOT)
        if not sys.stderr.isatty():
            # In a log, where there is no bar to show that it goes on.
            click.echo(f"{mutant.name}: {verdict}", err=True)
        advance(1)
        return verdict


if __name__ == "__main__":
    main(prog_name="make mutants")
