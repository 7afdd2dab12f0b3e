"""T5, T6 and reference C: servers, the publisher where it is what is measured, and the audit around `delivery`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orderflow.bench import database
from orderflow.bench.apart import run_apart
from orderflow.bench.database import LONG
from orderflow.bench.delivery import OUTBOX, PLAIN_TABLE, PRODUCER, Delivered, Options
from orderflow.bench.program import Program
from orderflow.bench.servers import Servers, Target
from orderflow.bench.throughput import Audited, violations

MODULE = "orderflow.bench.delivery"
LIMIT = 60.0
_UNPUBLISHED = "SELECT count(*) FROM outbox WHERE published_at IS NULL"


@dataclass(frozen=True, slots=True)
class Trickle:
    """How much: `rate` events a second for `seconds` seconds over `connections` connections."""

    rate: float
    connections: int
    seconds: float
    warm_up: float

    def options(self, target: Target, through: str) -> Options:
        """Of the measuring process."""
        return Options(
            target.database_url, target.bootstrap, target.topic, target.embedded_broker, through, self.rate, self.connections,
            self.seconds, self.warm_up,
        )  # fmt: skip


async def measure_reference(servers: Servers, trickle: Trickle) -> tuple[Delivered, Audited]:
    """C: a commit, and then the producer. Raises EmbeddedError, ProgramFailed."""
    async with servers.fresh() as target:
        connection = await database.connected(target.database_url)
        try:
            await connection.execute(PLAIN_TABLE)
        finally:
            await connection.close(timeout=5)
        delivered = await _delivered(trickle, trickle.options(target, PRODUCER))
        return delivered, Audited(f"C at {trickle.rate:g}/s", [], _problems(delivered))


async def measure(servers: Servers, directory: Path, trickle: Trickle) -> tuple[Delivered, Audited]:
    """T5 and T6: rows of the outbox by plain SQL, published by a process of that role. Raises EmbeddedError, ProgramFailed."""
    async with servers.fresh() as target:
        program = Program(("--role", "publisher"), target.environment(), directory, name=target.topic)
        await program.start()
        connection = await database.connected(target.database_url)
        try:
            delivered = await _delivered(trickle, trickle.options(target, OUTBOX))
            code = await program.stop()
            problems = _problems(delivered)
            if code != 0:
                problems.append(f"the program ended with exit code {code}")
            if unpublished := await connection.fetchval(_UNPUBLISHED):
                problems.append(f"{unpublished} events are not published")
            # Nobody consumes here: that these events are not processed is no violation yet.
            findings = await database.audited(connection, [], horizon=LONG)
            problems += violations(findings)
            return delivered, Audited(f"events at {trickle.rate:g}/s", findings, problems)
        finally:
            await connection.close(timeout=5)
            await program.stop()


async def _delivered(trickle: Trickle, options: Options) -> Delivered:
    return Delivered(**await run_apart(MODULE, options, limit=trickle.seconds + trickle.warm_up + LIMIT))


def _problems(delivered: Delivered) -> list[str]:
    lost = delivered.sent - delivered.received
    return [f"{lost} of {delivered.sent} events were committed and never received"] if lost else []
