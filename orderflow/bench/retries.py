"""T11: one charge in five fails once, beside the same without failures: the rate at full load, and who waits for whom.

Whether an order waits for another's retry is asked in an open loop, at a rate that leaves the cores room. At full load
everything waits for the cores, and the more so the more there is to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from orderflow.bench import database, latency, throughput
from orderflow.bench.running import rate as paid_rate
from orderflow.bench.servers import Servers, Target
from orderflow.bench.throughput import Audited

ERROR_RATE = 0.2
# How far the share of orders that were retried may be from it: so much, or so many standard deviations when they are few.
TOLERANCE = 0.05
DEVIATIONS = 5

# Of the orders since $1: their number, the share that was retried, and percentiles of what the others took until PAID.
_TOOK = """
SELECT count(*) AS orders, count(*) FILTER (WHERE e.attempt > 1)::float8 / greatest(count(*), 1) AS retried,
       percentile_disc(ARRAY[0.5, 0.99]) WITHIN GROUP (
           ORDER BY extract(epoch FROM o.entered_at[o.version] - o.created_at)::float8 * 1000)
           FILTER (WHERE e.attempt = 1) AS took
FROM orders o JOIN outbox e ON e.aggregate_id = o.id AND e.event_type = 'OrderCreated'
WHERE o.state = 'PAID' AND o.created_at >= to_timestamp($1)
"""


@dataclass(frozen=True, slots=True)
class Paid:
    """Without failures, or with them.

    `orders_per_second`: PAID while the closed loop lasted. The tail, in which retries wait out their backoff, is apart:
    `tail_seconds` from the end of the load until the last order was seen PAID. Of the open loop, `retried`: the share of orders
    (0 to 1) that were attempted more than once; `untouched_p50` and `_p99`: milliseconds from created to PAID of the others.
    """

    orders_per_second: float
    tail_seconds: float
    retried: float
    untouched_p50: float
    untouched_p99: float
    audits: list[Audited]


@dataclass(frozen=True, slots=True)
class Retries:
    """`failing` is divided by `plain`: the rate, and what an order waited for that had no retry of its own."""

    plain: Paid
    failing: Paid

    @property
    def audits(self) -> list[Audited]:
        """Of all four runs."""
        return [*self.plain.audits, *self.failing.audits]


async def measure(
    servers: Servers, directory: Path, *, split: str, seconds: float, connections: int, warm_up: float, rate: float
) -> Retries:
    """All four runs, gateway 0 ms; `rate` is that of the open loop. Raises EmbeddedError, ProgramFailed."""

    async def one(error_rate: float) -> Paid:
        settings = {"ORDERFLOW_GATEWAY_ERROR_RATE": str(error_rate)}
        run = await throughput.measure(
            servers, directory, split=split, delay_ms=0, seconds=seconds, connections=connections, warm_up=warm_up,
            settings=settings,
        )  # fmt: skip
        async with servers.fresh() as target:
            found = await latency.measure(
                servers, directory, split=split, rates=(rate,), seconds=seconds, warm_up=warm_up, settings=settings,
                target=target,
            )  # fmt: skip
            orders, retried, p50, p99 = await _untouched(target, found.paced[0].begun)
        if abs(retried - error_rate) > _tolerance(error_rate, orders):
            found.audited.problems.append(f"{retried:.0%} of the orders were retried, not {error_rate:.0%}")
        during = paid_rate(run.paid_over_time, 0.0, seconds)
        return Paid(during, run.seconds - seconds, retried, p50, p99, [run.audited, found.audited])

    return Retries(await one(0.0), await one(ERROR_RATE))


def _tolerance(share: float, orders: int) -> float:
    return max(TOLERANCE, DEVIATIONS * sqrt(share * (1 - share) / max(orders, 1)))


async def _untouched(target: Target, since: float) -> tuple[int, float, float, float]:
    connection = await database.connected(target.database_url)
    try:
        row = await connection.fetchrow(_TOOK, since)
    finally:
        await connection.close(timeout=5)
    assert row is not None
    p50, p99 = row["took"] or (0.0, 0.0)
    return row["orders"], row["retried"], p50, p99
