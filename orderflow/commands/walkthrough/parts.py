"""The parts of the walk-through, in the contract's words.

Each does one thing, waits for what must follow, and says what it saw.

A part raises Missed when something expected does not come, or is not as expected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from orderflow.audit import audit
from orderflow.commands.events import publish_again
from orderflow.commands.walkthrough import Missed
from orderflow.commands.walkthrough.programs import Line, until
from orderflow.commands.walkthrough.stage import Stage, counted, default
from orderflow.payments.simulated import SimulatedGateway

PUBLISHER = "outbox-publisher"
WORKER = "payment-worker"
GATEWAY_ERROR = "Payment gateway error: Insufficient funds"
DEAD_REASON = "Max retries exceeded (3)"
DUPLICATE = "Event already processed, skipping"
# A killed worker's partitions are given to another one only when its session has timed out in Kafka.
TAKE_OVER = 90.0
START = 60.0


@dataclass(frozen=True, slots=True)
class Part:
    """One part: its number, what is done, what is expected, and the play itself, which returns what was seen."""

    number: int
    title: str
    expected: str
    play: Callable[[Stage], Awaitable[str]]


def require(holds: bool, seen: object) -> None:
    """Raise Missed, with what was seen, unless it holds."""
    if not holds:
        raise Missed(str(seen))


async def start(stage: Stage) -> str:
    """Part 1."""
    await asyncio.gather(stage.front.start(), stage.worker.start())
    listening = await stage.log.line("order-api", "STARTUP", timeout=START)
    await stage.log.line(PUBLISHER, "STARTUP", timeout=START)
    worker = await stage.log.line(WORKER, "STARTUP", timeout=START)
    stage.url = "http" + str(listening["message"]).rpartition("http")[2].strip()

    async def readiness() -> int:
        async with stage.http.get(f"{stage.url}/readyz") as response:
            return response.status

    await until(readiness, lambda status: status == 200, "/readyz answers 200", timeout=START)
    return f"{stage.url} is ready, {worker['workerId']} consumes"


async def pay(stage: Stage) -> str:
    """Part 2."""
    async with stage.gateway("succeed"):
        order_id = await stage.place("299.99")
        event_id = await stage.created_event(order_id)
        name: Line = {"eventId": event_id}
        order: Line = {"orderId": str(order_id)}
        aggregate: Line = {"aggregateId": str(order_id)}
        lines = [
            await stage.log.line(PUBLISHER, "EVENT_PUBLISHED", eventType="OrderCreated", **name, **aggregate),
            await stage.log.line(WORKER, "EVENT_RECEIVED", eventType="OrderCreated", **name),
            await _change(stage, order, "CREATED", "PAYMENT_PENDING"),
            await stage.log.line(WORKER, "PAYMENT_RESULT", status="SUCCESS", **order),
            await _change(stage, order, "PAYMENT_PENDING", "PAID"),
            await stage.log.line(PUBLISHER, "EVENT_PUBLISHED", eventType="OrderPaid", **aggregate),
        ]
    found = await stage.get(order_id)
    require((found["state"], found["version"], found["amount"]) == ("PAID", 3, "299.99"), found)
    require(await stage.charges(order_id) == 1, f"{await stage.charges(order_id)} charges")
    return f"{len(lines)} lines as expected, PAID, version {found['version']}, {found['amount']}"


async def _change(stage: Stage, order: dict[str, Any], old: str, new: str) -> Line:
    return await stage.log.line(WORKER, "STATE_CHANGE", oldState=old, newState=new, **order)


async def repeat(stage: Stage) -> str:
    """Part 3."""
    order_id = stage.orders[0]
    before = await stage.database.fetchrow("SELECT * FROM orders WHERE id = $1", order_id)
    event_id = await stage.created_event(order_id)
    mark = len(stage.log.lines)
    async with stage.database.acquire() as connection:
        await publish_again(connection, [UUID(event_id)])
    line = await stage.log.line(WORKER, "DUPLICATE_EVENT", after=mark, eventId=event_id)
    require(line["message"] == DUPLICATE, line)
    after = await stage.database.fetchrow("SELECT * FROM orders WHERE id = $1", order_id)
    require(before == after, after)
    require(await stage.charges(order_id) == 1, f"{await stage.charges(order_id)} charges")
    state, version = await stage.order(order_id)
    return f"DUPLICATE_EVENT, still {state}, version {version}, one charge"


async def give_up(stage: Stage) -> str:
    """Part 4."""
    async with stage.gateway("error"):
        order_id = await stage.place("42.00")
        event_id = await stage.created_event(order_id)
        for attempt in (1, 2, 3):
            name: Line = {"eventId": event_id, "retryCount": attempt}
            line = await stage.log.line(WORKER, "PROCESSING_ERROR", **name)
            require(GATEWAY_ERROR in str(line["error"]), line)
            if attempt < 3:
                await stage.log.line(WORKER, "RETRY_SCHEDULED", maxRetries=3, **name)
        await stage.log.line(WORKER, "DLQ_EVENT", eventId=event_id, reason=DEAD_REASON)
        state, _ = await stage.ended(order_id)
    reason = await stage.database.fetchval("SELECT reason FROM dead_letter_events WHERE event_id = $1", UUID(event_id))
    require(reason == DEAD_REASON, f"dead letter with reason {reason!r}")
    require(state == "FAILED", state)
    require(await stage.charges(order_id) == 0, f"{await stage.charges(order_id)} charges")
    return f"attempts 1, 2, 3; dead letter {reason!r}; {state}"


_WORK_DONE = """
SELECT (SELECT count(*) FROM processed_events WHERE processed_at >= $1) AS "eventsProcessed",
       (SELECT count(*) FROM orders WHERE state = 'PAID' AND updated_at >= $1) AS "paymentsSuccess",
       (SELECT count(*) FROM orders WHERE state = 'FAILED' AND updated_at >= $1) AS "paymentsFailed",
       (SELECT coalesce(sum(attempt - first_attempt), 0) FROM outbox WHERE created_at >= $1)::bigint AS "retriedEvents",
       (SELECT count(*) FROM dead_letter_events WHERE failed_at >= $1) AS "dlqEvents"
"""


async def agree(stage: Stage) -> str:
    """Part 5."""
    mark = len(stage.log.lines)

    async def compared() -> tuple[dict[str, int], dict[str, int]]:
        nonlocal mark
        line = await stage.log.line(WORKER, "METRICS", after=mark)
        mark = stage.log.lines.index(line, mark) + 1
        expected = dict(await counted(stage.database, _WORK_DONE, stage.began))
        expected["duplicatesSkipped"] = stage.log.count("DUPLICATE_EVENT")
        return {name: line[name] for name in expected}, expected

    said, _ = await until(compared, lambda both: both[0] == both[1], "METRICS (left) and the database (right) agree")
    return ", ".join(f"{name} {value}" for name, value in said.items())


TABLES = {
    "orders": "SELECT id, state, version, amount, updated_at FROM orders ORDER BY created_at DESC",
    "outbox": "SELECT event_id, event_type, aggregate_id, attempt, published_at FROM outbox ORDER BY seq DESC",
    "processed_events": "SELECT event_id, worker_id, processed_at FROM processed_events ORDER BY processed_at DESC",
    "dead_letter_events": "SELECT event_id, event_type, aggregate_id, reason FROM dead_letter_events ORDER BY failed_at DESC",
}


async def count_tables(stage: Stage) -> str:
    """Part 6."""
    counts = {table: await stage.database.fetchval(f"SELECT count(*) FROM {table}") for table in TABLES}
    require(all(counts.values()), counts)
    return ", ".join(f"{table} {count}" for table, count in counts.items())


async def ten_at_once(stage: Stage) -> str:
    """Part 7."""
    placed = await asyncio.gather(*(stage.place(f"{10 + n}.5") for n in range(10)))
    ended = await asyncio.gather(*(stage.ended(order_id) for order_id in placed))
    gateway = SimulatedGateway(stage.database, success_rate=default("gateway_success_rate"), seed=default("gateway_seed"))
    paid = [state for state, _ in ended].count("PAID")
    foretold = sum(gateway.would_succeed(order_id) for order_id in placed)
    require(paid == foretold, f"{paid} of 10 PAID where the seed says {foretold}")
    charged = sum(await asyncio.gather(*(stage.charges(order_id) for order_id in placed)))
    require(charged == paid, f"{charged} charges for {paid} PAID")
    return f"{paid} PAID, {10 - paid} FAILED, which is what the seed says for these ten; {charged} charges"


async def survive(stage: Stage) -> str:
    """Part 8."""
    async with stage.gateway("succeed"):
        order_id = await stage.place("77.70")
        await until(lambda: stage.order(order_id), lambda now: now[0] != "CREATED", "the order is taken up")
        await stage.worker.kill()
        state, version = await stage.order(order_id)
        require((state, version) == ("PAYMENT_PENDING", 2), f"killed too late: {state}, version {version}")
        await stage.worker.start()
        ended, version = await stage.ended(order_id, timeout=TAKE_OVER)
    charges = await stage.charges(order_id)
    require((ended, version, charges) == ("PAID", 3, 1), f"{ended}, version {version}, {charges} charges")
    return f"killed at {state}; then {ended}, version {version}, {charges} charge"


async def check(stage: Stage) -> str:
    """What the audit says about all of it; only on a database that is the demo's own."""

    async def violations() -> list[str]:
        async with stage.database.acquire() as connection:
            findings = await audit(connection, retry_horizon=0.0, reconcile_horizon=0.0, accepted=stage.orders)
        return [f"{f.invariant}: {'; '.join(f.examples)}" for f in findings if f.violations]

    # The last event may still be on its way: with horizons of 0 that counts, until it has arrived.
    await until(violations, lambda found: not found, "the audit finds nothing")
    return f"I1 to I7 hold for {len(stage.orders)} orders"


PARTS = (
    Part(1, "start everything", "publisher and worker up, /readyz 200", start),
    Part(2, "one order of 299.99", "published, received, PENDING, paid, version 3", pay),
    Part(3, "its event delivered again", "DUPLICATE_EVENT, state and version unchanged", repeat),
    Part(4, "a gateway that fails", "attempts 1, 2, 3, dead letter, order FAILED", give_up),
    Part(5, "the METRICS line", "agrees with the database", agree),
    Part(6, "the four tables", "each has rows", count_tables),
    Part(7, "ten orders at once", "all terminal, about 70 % PAID", ten_at_once),
    Part(8, "SIGKILL of the worker at PAYMENT_PENDING", "the order still ends, with exactly one charge", survive),
)
AUDIT = Part(9, "the audit over all of it", "every invariant holds", check)
