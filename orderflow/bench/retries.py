"""T11: T1 while one charge in five fails once, beside the same load without failures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orderflow.bench import database, throughput
from orderflow.bench.scaling import rate
from orderflow.bench.servers import Servers
from orderflow.bench.throughput import Audited

ERROR_RATE = 0.2
# How far the share of orders that were retried may be from it.
TOLERANCE = 0.05

# One row: the share of orders that were retried, and of the others the percentiles of what they took until PAID.
_TOOK = """
SELECT count(*) FILTER (WHERE e.attempt > 1)::float8 / greatest(count(*), 1) AS retried,
       percentile_disc(ARRAY[0.5, 0.99]) WITHIN GROUP (
           ORDER BY extract(epoch FROM o.entered_at[o.version] - o.created_at)::float8 * 1000)
           FILTER (WHERE e.attempt = 1) AS took
FROM orders o JOIN outbox e ON e.aggregate_id = o.id AND e.event_type = 'OrderCreated'
WHERE o.state = 'PAID' AND o.created_at >= to_timestamp($1)
"""


@dataclass(frozen=True, slots=True)
class Paid:
    """One run. `orders_per_second`: PAID while the load lasted; the tail, in which retries wait out their backoff, is apart:

    `tail_seconds` from the end of the load until the last order was seen PAID. `retried`: share of orders (0 to 1) that
    were attempted more than once. `untouched_p50` and `_p99`: milliseconds from created to PAID of those that were not.
    """

    orders_per_second: float
    tail_seconds: float
    retried: float
    untouched_p50: float
    untouched_p99: float
    audited: Audited


@dataclass(frozen=True, slots=True)
class Retries:
    """`failing` is divided by `plain`: the rate, and what an order waited for that had no retry of its own."""

    plain: Paid
    failing: Paid

    @property
    def rate_ratio(self) -> float:
        """Of the rates while the load lasted."""
        return self.failing.orders_per_second / self.plain.orders_per_second

    @property
    def untouched_p99_ratio(self) -> float:
        """About 1 when no order of another key waits for a retry: a retry's first backoff alone is up to 200 ms."""
        return self.failing.untouched_p99 / self.plain.untouched_p99

    @property
    def audits(self) -> list[Audited]:
        """Of both runs."""
        return [self.plain.audited, self.failing.audited]


async def measure(
    servers: Servers, directory: Path, *, split: str, seconds: float, connections: int, warm_up: float
) -> Retries:
    """Both runs, gateway 0 ms. Raises EmbeddedError, ProgramFailed."""

    async def one(error_rate: float) -> Paid:
        async with servers.fresh() as target:
            run = await throughput.measure(
                servers, directory, split=split, delay_ms=0, seconds=seconds, connections=connections, warm_up=warm_up,
                settings={"ORDERFLOW_GATEWAY_ERROR_RATE": str(error_rate)}, target=target,
            )  # fmt: skip
            connection = await database.connected(target.database_url)
            try:
                row = await connection.fetchrow(_TOOK, run.load.first_sent)
            finally:
                await connection.close(timeout=5)
        assert row is not None
        if abs(row["retried"] - error_rate) > TOLERANCE:
            run.audited.problems.append(f"{row['retried']:.0%} of the orders were retried, not {error_rate:.0%}")
        p50, p99 = row["took"] or (0.0, 0.0)
        during = rate(run.paid_over_time, 0.0, seconds)
        return Paid(during, run.seconds - seconds, row["retried"], p50, p99, run.audited)

    return Retries(await one(0.0), await one(ERROR_RATE))
