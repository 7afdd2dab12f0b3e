"""End to end: orders by HTTP, all roles, until the last one is PAID; then the audit of everything that was written."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import asyncpg

from orderflow.audit import Finding
from orderflow.bench import database
from orderflow.bench.cost import Cost, Counters
from orderflow.bench.database import LONG, LONG_AGO
from orderflow.bench.load import SLOT, Options, Summary
from orderflow.bench.program import Program, ProgramFailed
from orderflow.bench.sending import accepted_ids, send
from orderflow.bench.servers import Servers, Target
from orderflow.bench.usage import Meter, Usage, server_roots

# How the roles can be split; what `orderflow run` takes.
ONE_PROCESS = "one process"
THREE_PROCESSES = "three processes"
SPLITS: dict[str, tuple[str, ...]] = {
    ONE_PROCESS: (),
    THREE_PROCESSES: ("--api", "1", "--publisher", "1", "--worker", "1"),
    "two workers": ("--api", "1", "--publisher", "1", "--worker", "2"),
}
# The API by itself: what it accepts stays CREATED.
API_ONLY = ("--role", "api")
SETTLE_TIMEOUT = 120.0

_PAID_OVER_TIME = """
SELECT floor((extract(epoch FROM entered_at[3])::float8 - $1) / $2)::integer AS slot, count(*) AS orders
FROM orders WHERE state = 'PAID' AND created_at >= to_timestamp($1) - interval '1 minute' AND entered_at[3] >= to_timestamp($1)
GROUP BY slot
"""


@dataclass(frozen=True, slots=True)
class Audited:
    """The audit after one measured run; `problems` is what makes the command fail."""

    run: str
    findings: list[Finding]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Throughput:
    """One measured run. `seconds` is from the first POST until the last order was seen PAID.

    `paid_over_time`: orders that became PAID in each SLOT seconds since the first POST. `usage`: while the load lasted and
    until everything was settled.
    """

    run: str
    orders: int
    seconds: float
    load: Summary
    audited: Audited
    usage: list[Usage]
    cost: Cost
    paid_over_time: list[int]

    @property
    def orders_per_second(self) -> float:
        """The figure."""
        return self.orders / self.seconds


def paying_settings(target: Target, *, delay_ms: int) -> dict[str, str]:
    """Settings under which every order becomes PAID, `delay_ms` milliseconds after the gateway was asked."""
    return {
        **target.environment(), "ORDERFLOW_GATEWAY_DELAY_MS": str(delay_ms), "ORDERFLOW_GATEWAY_SUCCESS_RATE": "1.0",
    }  # fmt: skip


def record_file(directory: Path, target: Target) -> Path:
    """A new name for the load generator's record: a target may serve several runs."""
    return directory / f"{target.topic}-{secrets.token_hex(3)}.accepted"


@asynccontextmanager
async def prepared(servers: Servers, target: Target | None) -> AsyncIterator[Target]:
    """The target, or a fresh one for the length of the block."""
    if target is not None:
        yield target
        return
    async with servers.fresh() as fresh:
        yield fresh


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop: `connections` connections for `seconds` seconds, after `warm_up` seconds that do not count."""

    seconds: float
    warm_up: float
    connections: int


async def measure(
    servers: Servers, directory: Path, *, split: str, delay_ms: int, seconds: float, connections: int, warm_up: float,
    settings: Mapping[str, str] | None = None, target: Target | None = None,
) -> Throughput:  # fmt: skip
    """One run, on a database and a topic of its own unless they are given. Raises EmbeddedError, ProgramFailed."""
    name = f"{split}, gateway {delay_ms} ms"
    load = Load(seconds, warm_up, connections)
    async with prepared(servers, target) as at:
        chosen = {**paying_settings(at, delay_ms=delay_ms), **(settings or {})}
        return await _Run(servers, directory, at, name, SPLITS[split], chosen, load, until_paid=True).run()


async def measure_accepting(
    servers: Servers, directory: Path, *, seconds: float, connections: int, warm_up: float
) -> Throughput:
    """Orders accepted durably by one process with the API alone; they stay CREATED. Raises EmbeddedError, ProgramFailed."""
    load = Load(seconds, warm_up, connections)
    async with servers.fresh() as target:
        return await _Run(
            servers, directory, target, "POST accepted", API_ONLY, target.environment(), load, until_paid=False
        ).run()


@dataclass(frozen=True, slots=True)
class _Run:
    """What one measured run is made of; `until_paid` False: the run ends with the last answer."""

    servers: Servers
    directory: Path
    target: Target
    name: str
    arguments: tuple[str, ...]
    settings: Mapping[str, str]
    load: Load
    until_paid: bool

    async def run(self) -> Throughput:
        record = record_file(self.directory, self.target)
        async with _connection(self.target) as connection:
            since: datetime = await connection.fetchval("SELECT now()")
            before = await Counters.read(connection)
        program = Program(self.arguments, self.settings, self.directory, name=record.stem)
        await program.start()
        try:
            async with _connection(self.target) as connection:
                said: list[str] = []
                connection.add_query_logger(lambda query: said.append(query.query))
                load, usage, took, settled = await self._loaded(program, connection, record, since)
            code = await program.stop()
        finally:
            await program.stop()
        async with _connection(self.target) as connection:
            await database.until_alone(connection)
            after = await Counters.read(connection)
            audited = await audit_run(
                connection, self.name, record, settled=settled, code=code, load=load, since=since,
                state="PAID" if self.until_paid else "CREATED",
            )  # fmt: skip
            cost = Cost.between(before, after, orders=len(accepted_ids(str(record))), ours=len(said))
            paid = await paid_over_time(connection, load.first_sent)
        program.log.unlink(missing_ok=True)
        return Throughput(self.name, load.accepted, took, load, audited, usage, cost, paid)

    async def _loaded(
        self, program: Program, connection: asyncpg.Connection, record: Path, since: datetime
    ) -> tuple[Summary, list[Usage], float, bool]:
        def options(length: float, seed: int) -> Options:
            at = program.address
            return Options(at.host, at.port, self.load.connections, length, str(record), seed=seed)

        # Connections, prepared statements and the consumer group's first assignment belong to the start.
        await send(options(self.load.warm_up, 1))
        if self.until_paid and not await database.until_settled(connection, timeout=SETTLE_TIMEOUT, since=since):
            raise ProgramFailed(f"{self.name}: the warm-up did not settle within {SETTLE_TIMEOUT:.0f} s: {program.log_tail()}")
        meter = Meter({"orderflow": program.pid, **server_roots(self.servers)})
        meter.start()
        try:
            load = await send(options(self.load.seconds, 2))
            settled, ended = True, load.last_answered
            if self.until_paid:
                settled = await database.until_no_order_in_flight(connection, timeout=SETTLE_TIMEOUT)
                ended = time.time()
                settled = settled and await database.until_settled(connection, timeout=SETTLE_TIMEOUT, since=since)
        finally:
            usage = await meter.stop()
        usage.append(Usage("load", 0, load.cpu_seconds, load.peak_bytes))
        return load, usage, ended - load.first_sent, settled


@asynccontextmanager
async def _connection(target: Target) -> AsyncIterator[asyncpg.Connection]:
    connection = await database.connected(target.database_url)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


async def paid_over_time(connection: asyncpg.Connection, begin: float) -> list[int]:
    """Orders that became PAID in each SLOT seconds since `begin` (Unix seconds), from the orders' own history: after a run."""
    slots = {row["slot"]: row["orders"] for row in await connection.fetch(_PAID_OVER_TIME, begin, SLOT)}
    return [slots.get(slot, 0) for slot in range(max(slots, default=-1) + 1)]


def violations(findings: Sequence[Finding]) -> list[str]:
    """A line for each invariant that is violated, with its first example."""
    return [f"{f.invariant} violated: {f.text}: {f.examples[0]}" for f in findings if f.violations]


async def audit_run(
    connection: asyncpg.Connection, name: str, record: Path, *, settled: bool, code: int, load: Summary | None = None,
    since: datetime = LONG_AGO, state: str = "PAID",
) -> Audited:  # fmt: skip
    """Audit the database of a run that has ended, against the record of what its clients were told.

    Every order placed since then must have reached `state`; where that is CREATED, nobody was there to publish and consume.
    """
    accepted = accepted_ids(str(record))
    findings = await database.audited(connection, accepted, horizon=LONG if state == "CREATED" else 0.0)
    problems = violations(findings)
    if not settled:
        problems.append(f"not everything was settled within {SETTLE_TIMEOUT:.0f} s")
    if code != 0:
        problems.append(f"the program ended with exit code {code}")
    ended = await connection.fetchval("SELECT count(*) FROM orders WHERE state = $1 AND created_at >= $2", state, since)
    if ended != len(accepted):
        problems.append(f"{len(accepted)} orders were accepted and {ended} are {state}")
    if load is not None and (load.answers.keys() - {"201"} or load.lost_connections):
        problems.append(f"answers: {load.answers}, lost connections: {load.lost_connections}")
    return Audited(name, findings, problems)
