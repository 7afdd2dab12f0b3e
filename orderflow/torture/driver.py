"""One torture: servers and program up, load, faults by the plan, settling, end of the program, audit."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import asyncpg

from orderflow.bench import database
from orderflow.bench.load import Options, Summary
from orderflow.bench.program import Program, ProgramFailed
from orderflow.bench.sending import accepted_ids, send
from orderflow.bench.servers import Servers
from orderflow.embedded.ports import HOST
from orderflow.embedded.postgres import APP_DATABASE
from orderflow.engine import seams
from orderflow.explain import Story, Unknown, story
from orderflow.migrations import migrate
from orderflow.torture.crashes import Crashes, counted
from orderflow.torture.detour import Detour
from orderflow.torture.faults import Faults, Injected
from orderflow.torture.grounds import Grounds
from orderflow.torture.limited import limited_disk
from orderflow.torture.plan import Fault, Kind
from orderflow.torture.report import Report
from orderflow.torture.victims import Victims

PROCESSES = ("--api", "2", "--publisher", "2", "--worker", "3")
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
_OVER_TIME = """
SELECT second, sum(placed)::integer AS placed, sum(ended)::integer AS ended FROM (
    SELECT floor(extract(epoch FROM created_at) - $1)::integer AS second, 1 AS placed, 0 AS ended FROM orders
    UNION ALL
    SELECT floor(extract(epoch FROM updated_at) - $1)::integer, 0, 1 FROM orders WHERE NOT in_flight) AS events
GROUP BY second ORDER BY second
"""
# A fault is done to the topic and to the group by their names.
TOPIC, GROUP = "order-events", "payment-worker"
# Of the file system that is filled: what the heaps of an order take, and room for the orders of faults.
ORDER_BYTES, ROOM_BYTES = 4_096, 1 << 30
_STATES = "SELECT state, count(*) AS orders FROM orders GROUP BY state ORDER BY state"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much: `seconds` of load and faults, `settle` seconds at the most until everything has ended.

    `at_seams`: beside the plan, processes are killed and misled at their seams all the time.
    """

    seconds: float = 60.0
    rate: float = 200.0
    clients: int = 16
    settle: float = 90.0
    at_seams: bool = False


class Driver:
    """Runs one plan against servers of its own; the program goes to an Apache Kafka by way of `kafka_detour`.

    `tell` hears, twice a second, how much of the whole is done (0 to 1), and what is going on.
    """

    def __init__(
        self, servers: Servers, kafka_detour: Detour, directory: Path, seed: int, plan: Sequence[Fault], extent: Extent,
        tell: Callable[[float, str], None] = lambda done, text: None,
    ) -> None:  # fmt: skip
        if servers.postgres is None:
            raise ValueError("the torture kills its PostgreSQL: it takes none that was given")
        self._servers = servers
        self._postgres = servers.postgres
        self._kafka_detour: Detour | None = None
        if servers.kafka is not None:
            self._kafka_detour = kafka_detour
            kafka_detour.to = servers.kafka.detoured_port
        self._directory = directory
        self._extent = extent
        self._tell = tell
        self._record = directory / "accepted"
        self._doing: set[str] = set()
        self._crashes = Crashes(directory, seed, list(seams.seams())) if extent.at_seams else None
        self._records: list[Path] = []
        self.report = Report(seed, plan)

    async def run(self) -> Report:
        """Raises EmbeddedError or ProgramFailed when servers, program or load generator fail on their own account."""
        await migrate(self._postgres.url)
        self._record.touch()
        detour = Detour(self._postgres.port)
        async with AsyncExitStack() as stack:
            await detour.start()
            stack.push_async_callback(detour.stop)
            limited = None
            if any(fault.kind is Kind.DISK_FULL for fault in self.report.plan):
                size = ROOM_BYTES + int(self._extent.seconds * self._extent.rate) * ORDER_BYTES
                disk = limited_disk(self._postgres, APP_DATABASE, self._directory / "limited", size)
                limited = await stack.enter_async_context(disk)
            await self._run(detour, limited)
        return self.report

    async def _run(self, detour: Detour, limited: Path | None) -> None:
        program = Program(PROCESSES, self._settings(detour), self._directory)
        self._tell(0.0, "starting the program")
        await program.start()
        try:
            grounds = Grounds(
                self._postgres, self._servers.kafka, self._servers.bootstrap, TOPIC, GROUP, APP_DATABASE, program.address,
                Victims(program.pid), detour, self._directory, limited, self._records, self._kafka_detour,
            )  # fmt: skip
            await self._under_load(program, grounds)
            await self._settle()
            code = await program.stop()
        finally:
            await program.stop()
        if code != 0:
            self.report.problems.append(f"the program ended with exit code {code} after a SIGTERM: see {program.log}")
        self.report.killed_at = dict(counted(program.log).most_common())
        await self._audit()

    def _settings(self, detour: Detour) -> dict[str, str]:
        kafka = f"{HOST}:{self._kafka_detour.port}" if self._kafka_detour else self._servers.bootstrap
        return {
            **SETTINGS,
            **(self._crashes.settings if self._crashes else {}),
            "DATABASE_URL": self._postgres.url,
            "ORDERFLOW_DATABASE_DIRECT_URL": self._postgres.url.replace(f":{self._postgres.port}/", f":{detour.port}/"),
            "ORDERFLOW_TOPIC": TOPIC,
            "ORDERFLOW_CONSUMER_GROUP": GROUP,
            "KAFKA_BOOTSTRAP_SERVERS": kafka,
            "ORDERFLOW_KAFKA_EMBEDDED": str(self._servers.embedded_broker).lower(),
        }

    async def _under_load(self, program: Program, grounds: Grounds) -> None:
        extent = self._extent
        options = Options(
            program.address.host, program.address.port, extent.clients, extent.seconds + LONGEST_RECOVERY, str(self._record),
            persistent=True, rate=extent.rate, seed=self.report.seed,
        )  # fmt: skip
        faults = Faults(grounds, self._heard)
        began = time.monotonic()
        # One that fails ends the others: a server that does not come back leaves nothing to learn.
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(self._tick(began, program))
            enough = asyncio.Event()
            load = group.create_task(send(options, enough))
            crashing = group.create_task(self._crashes.run()) if self._crashes else None
            injections = [group.create_task(self._inject(faults, fault, began)) for fault in self.report.plan]
            await asyncio.wait([load, group.create_task(asyncio.sleep(extent.seconds))], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*injections)
            enough.set()
            await load
            ticking.cancel()
            if crashing is not None:
                crashing.cancel()
        self.report.load = load.result()
        self.report.injected = [task.result() for task in injections]

    def _heard(self, summary: Summary) -> None:
        self.report.accepted_besides += summary.accepted
        self.report.problems += summary.contradictions

    async def _inject(self, faults: Faults, fault: Fault, began: float) -> Injected:
        await asyncio.sleep(max(0.0, fault.at - (time.monotonic() - began)))
        self._doing.add(fault.kind)
        try:
            return await faults.inject(fault, began)
        finally:
            self._doing.discard(fault.kind)

    async def _tick(self, began: float, program: Program) -> None:
        while True:
            if program.returncode is not None:
                raise ProgramFailed(f"the program ended by itself, with exit code {program.returncode}: {program.log_tail()}")
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
            accepted = [order for record in (self._record, *self._records) for order in accepted_ids(str(record))]
            report.findings = await database.audited(connection, accepted)
            rows = await connection.fetch(_OVER_TIME, report.load.first_sent)
            seen = {row["second"]: (row["second"], row["placed"], row["ended"]) for row in rows}
            # A second without an order is what a fault looks like.
            report.over_time = [seen.get(at, (at, 0, 0)) for at in range(min(seen, default=0), max(seen, default=-1) + 1)]
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
