"""The same order flow on other Python stacks, beside ours, measured in one run: `python -m bench.peers.measure`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TextIO
from uuid import UUID

import asyncpg
import click

from bench.peers.environments import pins, python_of, redis_version
from bench.peers.stacks import STACKS, Stack, running
from orderflow.bench import database
from orderflow.bench.about import about
from orderflow.bench.exchange import Address, ask, post_order
from orderflow.bench.load import Options, Record, order_body
from orderflow.bench.program import ProgramFailed
from orderflow.bench.sending import accepted_ids, send
from orderflow.bench.servers import Servers, fetch_kafka
from orderflow.bench.usage import Meter
from orderflow.commands.output import fields, table
from orderflow.commands.progress import progress
from orderflow.embedded.errors import EmbeddedError

RATE = 20.0
CONNECTIONS = 64
POLL = 0.001
ANSWER_TIMEOUT = 10.0
# An order is lost when none has become PAID for this long and it has not.
STALL_TIMEOUT = 20.0
WARM_UP_ORDERS = 20
COMMAND = " ".join(["python -m bench.peers.measure", *sys.argv[1:]])

# column -> field of Measured, its factor, digits
COLUMNS = {
    "PAID p50 ms": ("paid_p50", 1, 1),
    "p99 ms": ("paid_p99", 1, 1),
    "orders/s": ("orders_per_second", 1, 0),
    "CPU ms/order": ("cpu", 1000, 2),
    "memory MB": ("memory", 1e-6, 0),
}

_PAID = "SELECT count(*) FROM orders WHERE state = 'PAID'"
_PAID_OF = "SELECT id FROM orders WHERE id = ANY($1) AND state = 'PAID'"
_LAST_PAID = "SELECT extract(epoch FROM max(updated_at))::float8 FROM orders WHERE state = 'PAID'"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to measure: alternating rounds, seconds of one load, single orders."""

    rounds: int = 3
    seconds: float = 8.0
    orders: int = 200
    warm_up: float = 2.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One stack in one round. Latencies in milliseconds. Of its own processes: `memory`, the sum of their peaks in bytes (Linux
    only, else 0), and `cpu`, seconds an order. `violations`: what the audit found, which knows ours alone.
    """

    paid_p50: float
    paid_p99: float
    orders_per_second: float
    memory: int
    cpu: float
    accepted: int
    lost: int
    violations: list[str]


async def measure(servers: Servers, stack: Stack, directory: Path, extent: Extent) -> Measured:
    """Single orders at 20/s, then a closed loop until all are PAID. Raises EmbeddedError, ProgramFailed."""
    async with servers.fresh() as target:
        connection = await database.connected(target.database_url)
        record_file = directory / f"{target.topic}.accepted"
        record = Record(str(record_file))
        try:
            async with running(stack, target, connection, directory) as run:
                if not await paced(run.address, connection, record, WARM_UP_ORDERS):
                    raise ProgramFailed(f"{stack.name} pays no order")
                latencies = await paced(run.address, connection, record, extent.orders)

                async def load(seconds: float, seed: int) -> float:
                    at = run.address
                    return (await send(Options(at.host, at.port, CONNECTIONS, seconds, str(record_file), seed=seed))).first_sent

                await load(extent.warm_up, 1)
                before = len(accepted_ids(str(record_file)))
                await until_paid(connection, before)
                meter = Meter({name: child.pid for name, child in run.children.items()})
                meter.start()
                began = await load(extent.seconds, 2)
                accepted = accepted_ids(str(record_file))
                await until_paid(connection, len(accepted))
                used = await meter.stop()
                orders = len(accepted) - before
                took = await connection.fetchval(_LAST_PAID) - began
            paid = len(await connection.fetch(_PAID_OF, accepted))
            findings = [] if stack.peer else await database.audited(connection, accepted)
            return Measured(
                percentile(latencies, 50), percentile(latencies, 99), orders / took, sum(u.peak_bytes for u in used),
                sum(u.cpu_seconds for u in used) / orders, len(accepted), len(accepted) - paid,
                [f"{f.invariant}: {f.text}" for f in findings if f.violations],
            )  # fmt: skip
        finally:
            record.close()
            await connection.close(timeout=5)


async def until_paid(connection: asyncpg.Connection, orders: int) -> None:
    """Wait until that many orders are PAID, or none has become so for STALL_TIMEOUT seconds."""
    paid, end = -1, 0.0
    while (now := await connection.fetchval(_PAID)) < orders:
        if now != paid:
            paid, end = now, time.monotonic() + STALL_TIMEOUT
        if time.monotonic() >= end:
            return
        await asyncio.sleep(0.1)


async def paced(address: Address, connection: asyncpg.Connection, record: Record, orders: int) -> list[float]:
    """Milliseconds from the time at which each order was due until another connection saw it PAID, in ascending order.

    Orders are placed at RATE whatever becomes of them. One that is never PAID is not in the list; it is counted as lost.
    """
    source, waiting, latencies = random.Random(orders), dict[UUID, float](), list[float]()
    start = time.monotonic() + 1 / RATE

    async def place(due: float) -> None:
        await asyncio.sleep(due - time.monotonic())
        answer = await ask(address, post_order(address, order_body(source)), timeout=ANSWER_TIMEOUT)
        if answer.status != 201:
            raise ProgramFailed(f"an order was answered {answer.status}: {answer.body[:200]!r}")
        record.accepted(answer.order_id)
        waiting[UUID(answer.order_id)] = due

    async def watch() -> None:
        end = start + orders / RATE + STALL_TIMEOUT
        while len(latencies) < orders and time.monotonic() < end:
            if waiting:
                rows = await connection.fetch(_PAID_OF, list(waiting))
                seen = time.monotonic()
                latencies.extend((seen - waiting.pop(row["id"])) * 1000 for row in rows)
            await asyncio.sleep(POLL)

    await asyncio.gather(watch(), *(place(start + number / RATE) for number in range(orders)))
    return sorted(latencies)


def percentile(ascending: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of the values do not exceed; infinite when there is none."""
    return ascending[-(-len(ascending) * percent // 100) - 1] if ascending else float("inf")


async def measure_all(names: Sequence[str], extent: Extent) -> tuple[dict[str, Any], dict[str, list[Measured]]]:
    """Every stack once a round, so that a slow minute of the machine meets all of them. Raises EmbeddedError, ProgramFailed."""
    with progress("fetching Apache Kafka") as tell:
        await fetch_kafka(tell)
    peers = sorted({peer for name in names if (peer := STACKS[name].peer)})
    with tempfile.TemporaryDirectory(prefix="orderflow-peers-") as folder, progress("peers") as tell:
        directory = Path(folder)
        os.chmod(directory, 0o711)  # as root, PostgreSQL runs as another user, who must get through
        versions: dict[str, str] = {}
        for number, peer in enumerate(peers):
            tell(number / len(peers), f"the environment of {peer}")
            python, versions[peer] = await python_of(peer), pins(peer)
            if any(STACKS[name].redis for name in names if STACKS[name].peer == peer):
                versions["redis"] = redis_version(python)
        results: dict[str, list[Measured]] = {name: [] for name in names}
        async with Servers(directory) as servers:
            head = {**await about(servers, []), "command": COMMAND, **versions}
            for number in range(extent.rounds * len(names)):
                name = names[number % len(names)]
                tell(number / (extent.rounds * len(names)), f"round {number // len(names) + 1}: {STACKS[name].name}")
                results[name].append(await measure(servers, STACKS[name], directory, extent))
        return head, results


def show(head: dict[str, Any], results: dict[str, list[Measured]], extent: Extent) -> None:
    """Print a line a stack under what the figures depend on."""
    fields([(name, value) for name, value in head.items() if name != "executable"])
    click.echo(
        f"{extent.rounds} alternating rounds, {extent.seconds:g} s of load over {CONNECTIONS} connections; median (min..max)\n"
    )
    rows = []
    for name, runs in results.items():
        rows.append([
            STACKS[name].name,
            *(spread([getattr(run, what) * scale for run in runs], digits) for what, scale, digits in COLUMNS.values()),
            f"{sum(run.lost for run in runs)} of {sum(run.accepted for run in runs)}",
            STACKS[name].atomic,
        ])  # fmt: skip
    table(["stack", *COLUMNS, "lost", "atomic"], rows, right=(*COLUMNS, "lost"))


def spread(values: Sequence[float], digits: int) -> str:
    """Such as `9.5 (8.1..11.0)`."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...", type=click.Choice(list(STACKS)))
@click.option("--quick", is_flag=True, help="One short round: shows that it runs, not how fast it is.")
@click.option("--rounds", type=click.IntRange(1, 100), metavar="N", help="Alternating rounds [3; 1 with --quick].")
@click.option("--seconds", type=click.FloatRange(0.5, 3600), metavar="N", help="Length of one load [8; 1 with --quick].")
@click.option("--json", "json_file", type=click.File("w", lazy=True), metavar="FILE", help="Write everything there.")
def main(names: tuple[str, ...], quick: bool, rounds: int | None, seconds: float | None, json_file: TextIO | None) -> None:
    """Measure the order flow on other Python stacks beside ours; all of them without a NAME.

    Exit 1 when the audit of one of our own runs finds a violation, or we lost an order.
    """
    extent = Extent(1, 1.0, 20, 0.5) if quick else Extent()
    extent = replace(extent, rounds=rounds or extent.rounds, seconds=seconds or extent.seconds)
    try:
        head, results = asyncio.run(measure_all(names or tuple(STACKS), extent))
    except (EmbeddedError, ProgramFailed) as error:
        raise click.ClickException(str(error)) from error
    show(head, results, extent)
    if json_file is not None:
        runs = {name: [asdict(run) for run in runs] for name, runs in results.items()}
        json.dump({**head, "extent": asdict(extent), "runs": runs}, json_file, indent=2)
    problems = [
        problem
        for name, runs in results.items() if STACKS[name].peer is None
        for run in runs
        for problem in (*run.violations, *([f"{run.lost} orders were lost"] if run.lost else []))
    ]  # fmt: skip
    for problem in problems:
        click.echo(f"orderflow: {problem}", err=True)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
