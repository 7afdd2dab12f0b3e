"""T7 and LOAD: HTTP POST to PAID at fixed arrival times, at one rate and at several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orderflow.bench import database
from orderflow.bench.apart import run_apart
from orderflow.bench.load import Options as Closed
from orderflow.bench.paced import Options, Paced
from orderflow.bench.program import Program
from orderflow.bench.sending import send
from orderflow.bench.servers import Servers, Target
from orderflow.bench.throughput import SETTLE_TIMEOUT, SPLITS, Audited, audit_run, paying_settings, prepared, record_file


@dataclass(frozen=True, slots=True)
class Latencies:
    """One Paced for each rate, in the order of the rates."""

    paced: list[Paced]
    audited: Audited


async def measure(
    servers: Servers, directory: Path, *, split: str, rates: Sequence[float], seconds: float, warm_up: float,
    settings: Mapping[str, str] | None = None, target: Target | None = None,
) -> Latencies:  # fmt: skip
    """Orders at each of these rates, `seconds` seconds long, gateway delay 0. Raises EmbeddedError, ProgramFailed."""
    name = f"{split}, at {', '.join(f'{rate:g}' for rate in rates)}/s"
    async with prepared(servers, target) as on:
        record = record_file(directory, on)
        chosen = {**paying_settings(on, delay_ms=0), **(settings or {})}
        program = Program(SPLITS[split], chosen, directory, name=on.topic)
        await program.start()
        connection = await database.connected(on.database_url)
        try:
            at = program.address
            await send(Closed(at.host, at.port, 8, warm_up, str(record)))
            settled = await database.until_settled(connection, timeout=SETTLE_TIMEOUT)
            paced = []
            for rate in rates:
                options = Options(at.host, at.port, on.database_url, rate, seconds, str(record))
                paced.append(Paced(**await run_apart("orderflow.bench.paced", options, limit=seconds + options.patience + 60)))
                settled = settled and await database.until_settled(connection, timeout=SETTLE_TIMEOUT)
            code = await program.stop()
            audited = await audit_run(connection, name, record, settled=settled, code=code)
            audited.problems.extend(f"{one.rate:g}/s: {problem}" for one in paced for problem in _problems(one))
            return Latencies(paced, audited)
        finally:
            await connection.close(timeout=5)
            await program.stop()


def _problems(paced: Paced) -> list[str]:
    problems = []
    if paced.answers.keys() - {"201"} or paced.lost_connections:
        problems.append(f"answers: {paced.answers}, lost connections: {paced.lost_connections}")
    if paced.unpaid:
        problems.append(f"{paced.unpaid} of {paced.followed} orders were not PAID in time")
    return problems
