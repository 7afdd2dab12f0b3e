"""Does the work keep up, and does anything wait for a person?"""

from __future__ import annotations

import asyncpg

from orderflow.audit import RECONCILE_HORIZON
from orderflow.commands.checks import Check, ok, problem, warning
from orderflow.commands.output import duration
from orderflow.engine.low_water import NEVER_PUBLISHED

ABOUT = "backlog"
# A row that is due waits for a relay: longer than this, in seconds, and none is at work.
RELAY_TOLERANCE = 10.0

_DUE = f"""
SELECT count(*) AS rows,
       coalesce(extract(epoch FROM max(now() - greatest(created_at, available_at))), 0)::float8 AS oldest
FROM ({NEVER_PUBLISHED} UNION ALL
      SELECT * FROM outbox WHERE available_at <= now() AND available_at < 'infinity' AND published_at IS NULL) AS due
"""
_SCHEDULED = """
SELECT count(*) AS rows, extract(epoch FROM min(available_at) - now())::float8 AS next
FROM outbox WHERE available_at > now() AND available_at < 'infinity' AND published_at IS NULL
"""
_IN_FLIGHT = """
SELECT count(*) AS orders, count(*) FILTER (WHERE old) AS stuck,
       count(*) FILTER (WHERE old AND state = 'PAYMENT_PENDING') AS unknown
FROM (SELECT state, updated_at < now() - make_interval(secs => $1) AS old FROM orders WHERE in_flight) AS o
"""
_CIRCUIT = """
SELECT state, extract(epoch FROM now() - opened_at)::float8 AS open_for, extract(epoch FROM due_at - now())::float8 AS due
FROM circuits WHERE name = 'gateway' AND state <> 'closed'
"""
_DEAD = "SELECT count(*) AS letters, min(failed_at) AS oldest FROM dead_letter_events WHERE discarded_at IS NULL"


async def check(connection: asyncpg.Connection) -> list[Check]:
    """The outbox, retries, orders in flight, dead letters, and the gateway's mode."""
    return [
        await _due(connection),
        await _scheduled(connection),
        await _in_flight(connection),
        await _dead_letters(connection),
        await _gateway(connection),
        await _circuit(connection),
    ]


async def _due(connection: asyncpg.Connection) -> Check:
    row = await connection.fetchrow(_DUE)
    assert row is not None
    if not row["rows"]:
        return ok(ABOUT, "no event is due")
    seen = f"{row['rows']} events due, the oldest for {duration(max(0.0, row['oldest']))}"
    if row["oldest"] > RELAY_TOLERANCE:
        return problem(ABOUT, seen, "is a publisher running (`orderflow run --role publisher`), and Kafka reachable?")
    return ok(ABOUT, seen)


async def _scheduled(connection: asyncpg.Connection) -> Check:
    row = await connection.fetchrow(_SCHEDULED)
    assert row is not None
    if not row["rows"]:
        return ok(ABOUT, "no retry is scheduled")
    return ok(ABOUT, f"{row['rows']} retries scheduled, the next in {duration(row['next'])}")


async def _in_flight(connection: asyncpg.Connection) -> Check:
    row = await connection.fetchrow(_IN_FLIGHT, RECONCILE_HORIZON)
    assert row is not None
    if row["stuck"]:
        return problem(
            ABOUT,
            f"{row['stuck']} of {row['orders']} orders in flight have not moved for {RECONCILE_HORIZON:.0f} s"
            f" ({row['unknown']} PAYMENT_PENDING: what became of their charges is not known)",
            "is a worker running, does the gateway answer? `orderflow audit` names them, `orderflow explain ID` tells of each",
        )
    return ok(ABOUT, f"{row['orders']} orders in flight")


async def _dead_letters(connection: asyncpg.Connection) -> Check:
    row = await connection.fetchrow(_DEAD)
    assert row is not None
    if row["letters"]:
        return warning(
            ABOUT,
            f"{row['letters']} dead letters are open",
            "`orderflow dead-letters list`, then redrive or discard",
        )
    return ok(ABOUT, "no dead letter is open")


async def _gateway(connection: asyncpg.Connection) -> Check:
    mode = await connection.fetchval("SELECT mode FROM gateway_control") or "random"
    if mode != "random":
        return warning("gateway", f"the simulated gateway is in mode {mode}", "back: `orderflow gateway mode random`")
    return ok("gateway", "mode random")


async def _circuit(connection: asyncpg.Connection) -> Check:
    row = await connection.fetchrow(_CIRCUIT)
    if row is None:
        return ok("gateway", "it answers: the circuit breaker is closed")
    due = f"in {duration(row['due'])}" if row["due"] > 0 else "with the next order"
    return problem(
        "gateway",
        f"no answer: the circuit breaker has been {row['state']} for {duration(row['open_for'])}, the next probe comes {due}",
        "bring the gateway back; orders wait meanwhile, and none of their attempts is used up",
    )
