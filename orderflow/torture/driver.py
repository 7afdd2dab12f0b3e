"""One torture: servers and program up, load, faults by the plan, settling, end of the program, audit."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import asyncpg

from orderflow.audit import Finding
from orderflow.bench import database
from orderflow.bench.load import Options, Summary
from orderflow.bench.program import Program
from orderflow.bench.sending import accepted_ids, send
from orderflow.bench.servers import Servers
from orderflow.embedded.postgres import APP_DATABASE
from orderflow.explain import Story, Unknown, story
from orderflow.migrations import migrate
from orderflow.torture.faults import Faults, Injected
from orderflow.torture.plan import Fault
from orderflow.torture.victims import Victims

PROCESSES = ("--api", "1", "--publisher", "1", "--worker", "2")
# Short, so that a run of a minute sees each of them expire many times; what they do is the same at any length.
SETTINGS = {
    "ORDERFLOW_GATEWAY_DELAY_MS": "50",
    "ORDERFLOW_GATEWAY_TIMEOUT_MS": "1000",
    "ORDERFLOW_RECONCILE_SECONDS": "5",
    "ORDERFLOW_BACKOFF_CAP_MS": "2000",
    # The plan kills on purpose: the parent must not take that for a program that cannot work.
    "ORDERFLOW_CRASH_BUDGET": "100000",
}
TICK = 0.5
# Of the whole, for a progress bar: where the load ends, and where the audit begins.
LOAD_SHARE = 0.8
AUDIT_FROM = 0.95
# Load goes on until the last fault is undone: at the most so much longer than was asked for, in seconds.
LONGEST_RECOVERY = 300.0
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

# Every order was placed under a key, so an order without one is a request that was carried out twice.
_ORDERS_WITHOUT_KEY = """
SELECT o.id FROM orders o WHERE NOT EXISTS (SELECT FROM idempotency_keys k WHERE k.order_id = o.id) LIMIT 20
"""
_STATES = "SELECT state, count(*) AS orders FROM orders GROUP BY state ORDER BY state"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much: `seconds` of load and faults, `settle` seconds at the most until everything has ended."""

    seconds: float = 60.0
    rate: float = 200.0
    clients: int = 16
    settle: float = 90.0


@dataclass(slots=True)
class Report:
    """What a run came to. `problems` is empty when every promise was kept; `first` tells of the first one that was not."""

    seed: int
    plan: list[Fault]
    injected: list[Injected] = field(default_factory=list)
    load: Summary = field(default_factory=Summary)
    states: dict[str, int] = field(default_factory=dict)
    settled_after: float | None = None
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    first: Story | None = None


class Driver:
    """Runs one plan against servers of its own.

    `tell` hears, twice a second, how much of the whole is done (0 to 1), and what is going on.
    """

    def __init__(
        self, servers: Servers, directory: Path, seed: int, plan: list[Fault], extent: Extent,
        tell: Callable[[float, str], None] = lambda done, text: None,
    ) -> None:  # fmt: skip
        if servers.postgres is None:
            raise ValueError("the torture kills its PostgreSQL: it takes none that was given")
        self._servers = servers
        self._postgres = servers.postgres
        self._directory = directory
        self._extent = extent
        self._tell = tell
        self._record = directory / "accepted"
        self._doing: set[str] = set()
        self.report = Report(seed, plan)

    async def run(self) -> Report:
        """Raises EmbeddedError or ProgramFailed when servers, program or load generator fail on their own account."""
        await migrate(self._postgres.url)
        self._record.touch()
        program = Program(PROCESSES, self._settings(), self._directory)
        self._tell(0.0, "starting the program")
        await program.start()
        try:
            await self._under_load(program)
            await self._settle()
            code = await program.stop()
        finally:
            await program.stop()
        if code != 0:
            self.report.problems.append(f"the program ended with exit code {code} after a SIGTERM: see {program.log}")
        await self._audit()
        return self.report

    def _settings(self) -> dict[str, str]:
        return {
            **SETTINGS,
            "DATABASE_URL": self._postgres.url,
            "KAFKA_BOOTSTRAP_SERVERS": self._servers.bootstrap,
            "ORDERFLOW_KAFKA_EMBEDDED": str(self._servers.embedded_broker).lower(),
        }

    async def _under_load(self, program: Program) -> None:
        extent = self._extent
        options = Options(
            program.address.host, program.address.port, extent.clients, extent.seconds + LONGEST_RECOVERY, str(self._record),
            persistent=True, rate=extent.rate, seed=self.report.seed,
        )  # fmt: skip
        faults = Faults(self._postgres, self._servers.kafka, APP_DATABASE, Victims(program.pid))
        began = time.monotonic()
        # One that fails ends the others: a server that does not come back leaves nothing to learn.
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(self._tick(began))
            enough = asyncio.Event()
            load = group.create_task(send(options, enough))
            injections = [group.create_task(self._inject(faults, fault, began)) for fault in self.report.plan]
            await asyncio.wait([load, group.create_task(asyncio.sleep(extent.seconds))], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*injections)
            enough.set()
            await load
            ticking.cancel()
        self.report.load = load.result()
        self.report.injected = [task.result() for task in injections]

    async def _inject(self, faults: Faults, fault: Fault, began: float) -> Injected:
        await asyncio.sleep(max(0.0, fault.at - (time.monotonic() - began)))
        self._doing.add(fault.kind)
        try:
            return await faults.inject(fault, began)
        finally:
            self._doing.discard(fault.kind)

    async def _tick(self, began: float) -> None:
        while True:
            accepted = self._record.stat().st_size // 37
            doing = ", ".join(sorted(self._doing)) or "no fault"
            passed = time.monotonic() - began
            # A server may come back later than the load was to last.
            done = LOAD_SHARE * min(1.0, passed / self._extent.seconds)
            self._tell(done, f"{passed:.1f} s of {self._extent.seconds:g}, {accepted:,} accepted, {doing}")
            await asyncio.sleep(TICK)

    async def _settle(self) -> None:
        began = time.monotonic()

        def tell(orders: int, events: int) -> None:
            passed = time.monotonic() - began
            done = LOAD_SHARE + (AUDIT_FROM - LOAD_SHARE) * min(1.0, passed / self._extent.settle)
            self._tell(done, f"settling, {passed:.0f} s: {orders:,} orders, {events:,} events to go")

        connection = await database.connected(self._postgres.url)
        try:
            if await database.until_settled(connection, timeout=self._extent.settle, tell=tell):
                self.report.settled_after = time.monotonic() - began
            else:
                orders, events = await database.unsettled(connection)
                self.report.problems.append(
                    f"not settled within {self._extent.settle:g} s: {orders} orders in flight, {events} events unsettled"
                )
        finally:
            await connection.close(timeout=5)

    async def _audit(self) -> None:
        self._tell(AUDIT_FROM, "auditing")
        report = self.report
        connection = await database.connected(self._postgres.url)
        try:
            report.findings = await database.audited(connection, accepted_ids(str(self._record)))
            report.states = {row["state"]: row["orders"] for row in await connection.fetch(_STATES)}
            violated = [
                f"{finding.invariant} violated {finding.violations} times, first: {finding.examples[0]}"
                for finding in report.findings
                if finding.violations
            ]
            violated += [
                f"order {row['id']} was placed under no key: a request was carried out twice"
                for row in await connection.fetch(_ORDERS_WITHOUT_KEY)
            ]
            violated += report.load.contradictions
            report.problems[:0] = violated
            with contextlib.suppress(Unknown):
                report.first = await self._story_of(connection, violated)
        finally:
            await connection.close(timeout=5)

    async def _story_of(self, connection: asyncpg.Connection, violated: list[str]) -> Story | None:
        found = _ID.search(violated[0]) if violated else None
        return await story(connection, UUID(found[0])) if found else None
