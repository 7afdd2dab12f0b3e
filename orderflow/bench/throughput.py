"""End to end: orders by HTTP, all roles, until the last one is PAID; then the audit of everything that was written."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from orderflow.audit import Finding
from orderflow.bench import database
from orderflow.bench.load import Options, Summary
from orderflow.bench.program import Program, ProgramFailed
from orderflow.bench.sending import accepted_ids, send
from orderflow.bench.servers import Servers, Target

# How the roles can be split; what `orderflow run` takes.
ONE_PROCESS = "one process"
THREE_PROCESSES = "three processes"
SPLITS: dict[str, tuple[str, ...]] = {
    ONE_PROCESS: (),
    THREE_PROCESSES: ("--api", "1", "--publisher", "1", "--worker", "1"),
}
SETTLE_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Audited:
    """The audit after one measured run; `problems` is what makes the command fail."""

    run: str
    findings: list[Finding]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Throughput:
    """One measured run. `seconds` is from the first POST until the last order was seen PAID."""

    orders: int
    seconds: float
    load: Summary
    audited: Audited

    @property
    def orders_per_second(self) -> float:
        """The figure."""
        return self.orders / self.seconds


def paying_settings(target: Target, *, delay_ms: int) -> dict[str, str]:
    """Settings under which every order becomes PAID, `delay_ms` milliseconds after the gateway was asked."""
    return {
        **target.environment(), "ORDERFLOW_GATEWAY_DELAY_MS": str(delay_ms), "ORDERFLOW_GATEWAY_SUCCESS_RATE": "1.0",
    }  # fmt: skip


async def measure(
    servers: Servers, directory: Path, *, split: str, delay_ms: int, seconds: float, connections: int, warm_up: float
) -> Throughput:
    """One run on a database and a topic of its own. Raises EmbeddedError, ProgramFailed."""
    name = f"{split}, gateway {delay_ms} ms"
    async with servers.fresh() as target:
        record = directory / f"{target.topic}.accepted"
        program = Program(SPLITS[split], paying_settings(target, delay_ms=delay_ms), directory, name=target.topic)
        await program.start()
        connection = await database.connected(target.database_url)
        try:

            def options(length: float, seed: int) -> Options:
                at = program.address
                return Options(at.host, at.port, connections, length, str(record), seed=seed)

            # Connections, prepared statements and the consumer group's first assignment belong to the start.
            await send(options(warm_up, 1))
            if not await database.until_settled(connection, timeout=SETTLE_TIMEOUT):
                raise ProgramFailed(f"{name}: the warm-up did not settle within {SETTLE_TIMEOUT:.0f} s: see {program.log}")
            load = await send(options(seconds, 2))
            ended = await database.until_no_order_in_flight(connection, timeout=SETTLE_TIMEOUT)
            took = time.time() - load.first_sent
            settled = ended and await database.until_settled(connection, timeout=SETTLE_TIMEOUT)
            code = await program.stop()
            audited = await audit_run(connection, name, record, settled=settled, code=code, load=load)
            return Throughput(load.accepted, took, load, audited)
        finally:
            await connection.close(timeout=5)
            await program.stop()


async def audit_run(
    connection: asyncpg.Connection, name: str, record: Path, *, settled: bool, code: int, load: Summary | None = None
) -> Audited:
    """Audit the database of a run that has ended, against the record of what its clients were told."""
    accepted = accepted_ids(str(record))
    findings = await database.audited(connection, accepted)
    problems = [f"{f.invariant} violated: {f.text}: {f.examples[0]}" for f in findings if f.violations]
    if not settled:
        problems.append(f"not everything was settled within {SETTLE_TIMEOUT:.0f} s")
    if code != 0:
        problems.append(f"the program ended with exit code {code}")
    paid = await connection.fetchval("SELECT count(*) FROM orders WHERE state = 'PAID'")
    if paid != len(accepted):
        problems.append(f"{len(accepted)} orders were accepted and {paid} are PAID")
    if load is not None and (load.answers.keys() - {"201"} or load.lost_connections):
        problems.append(f"answers: {load.answers}, lost connections: {load.lost_connections}")
    return Audited(name, findings, problems)
