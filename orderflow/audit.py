"""The invariants that make "nothing lost, nothing twice" checkable, each as one SQL statement over the whole database.

All run in one read-only snapshot, so that an audit beside a running system sees no order half-way through a transition.

Of an order that retention has retired (`retired_at`) nothing is left but its own row: an event or a charge that is there all
the same has come since, and is as wrong as one too many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from orderflow.engine.postgres import Connection

RETRY_HORIZON = 60.0
RECONCILE_HORIZON = 120.0
EXAMPLES = 20
NO_RECORD = "no record of accepted orders was given (--accepted FILE)"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one invariant's check came to. `examples` names at most 20 violations, each with what is wrong.

    `not_checked` says why there was nothing to check it against; such a finding is neither passed nor violated.
    """

    invariant: str
    text: str
    checked: int
    violations: int
    examples: list[str] = field(default_factory=list)
    not_checked: str = ""

    @property
    def verdict(self) -> str:
        """`ok`, `VIOLATED` or `not checked`."""
        return "not checked" if self.not_checked else "VIOLATED" if self.violations else "ok"


@dataclass(frozen=True, slots=True)
class Invariant:
    """`checked` counts what is looked at; `violating` selects an `order_id` and an `example` text for each violation.

    $1 is the retry horizon, $2 the reconcile horizon, both in seconds; $3 the accepted order ids or NULL.
    """

    name: str
    text: str
    checked: str
    violating: str


I1 = Invariant(
    "I1",
    "every order has exactly one OrderCreated event",
    "SELECT count(*) FROM orders",
    """
    SELECT o.id AS order_id, format('order %s: %s OrderCreated events%s', o.id, count(e.event_id),
                                    CASE WHEN o.retired_at IS NOT NULL THEN ' since it was retired' END) AS example
    FROM orders o LEFT JOIN outbox e ON e.aggregate_id = o.id AND e.event_type = 'OrderCreated'
    GROUP BY o.id, o.retired_at HAVING count(e.event_id) <> (o.retired_at IS NULL)::int
    """,
)

# How often an order was FAILED follows from state and version alone (orders/model.py, path_to): going backwards, FAILED
# and PAYMENT_PENDING alternate down to version 2.
FAILED_ENTRIES = """CASE o.state WHEN 'CREATED' THEN 0 WHEN 'PAYMENT_PENDING' THEN (o.version - 1) / 2
                                 WHEN 'PAID' THEN (o.version - 2) / 2 ELSE o.version / 2 END"""

# A payload may come from another program: nothing in it is cast before it looks like a number.
_AMOUNT_AGREES = r"""CASE WHEN e.payload->>'amount' ~ '^[0-9]{1,10}(\.[0-9]{1,9})?$'
                          THEN (e.payload->>'amount')::numeric = o.amount ELSE false END"""

I2 = Invariant(
    "I2",
    "every order's state, version, history and events fit together",
    "SELECT count(*) FROM orders",
    f"""
    WITH told AS (
        SELECT e.aggregate_id AS id,
               count(*) FILTER (WHERE e.event_type = 'OrderPaid') AS paid,
               count(*) FILTER (WHERE e.event_type = 'OrderFailed') AS failed,
               count(*) FILTER (
                   WHERE CASE e.event_type
                       WHEN 'OrderCreated' THEN
                           e.payload->>'orderId' IS DISTINCT FROM o.id::text
                           OR e.payload->>'userId' IS DISTINCT FROM o.user_id::text OR NOT {_AMOUNT_AGREES}
                       ELSE (e.payload ? 'orderId' AND e.payload->>'orderId' IS DISTINCT FROM o.id::text)
                            OR (e.payload ? 'amount' AND NOT {_AMOUNT_AGREES}) END) AS contradicting
        FROM outbox e JOIN orders o ON o.id = e.aggregate_id
        WHERE e.event_type IN ('OrderCreated', 'OrderPaid', 'OrderFailed')
        GROUP BY e.aggregate_id),
    judged AS (
        SELECT o.id, concat_ws('; ',
            CASE WHEN NOT coalesce(
                     CASE WHEN o.state = 'CREATED' THEN o.version = 1 WHEN o.state = 'PAID' THEN o.version >= 3
                          WHEN o.state IN ('PAYMENT_PENDING', 'FAILED') THEN o.version >= 2 END, false)
                 THEN format('%s cannot have version %s', o.state, o.version) END,
            CASE WHEN o.failure IS NOT NULL AND o.state <> 'FAILED'
                 THEN format('%s with failure %s', o.state, coalesce(o.failure, 'unset')) END,
            CASE WHEN cardinality(o.entered_at) <> o.version
                 THEN format('version %s but %s times of entry', o.version, cardinality(o.entered_at)) END,
            CASE WHEN o.entered_at <> ARRAY(SELECT t FROM unnest(o.entered_at) AS t ORDER BY t)
                 THEN 'a version began before the one it follows' END,
            CASE WHEN coalesce(t.paid, 0) <> (o.state = 'PAID' AND o.retired_at IS NULL)::int
                 THEN format('%s with %s OrderPaid events', o.state, coalesce(t.paid, 0)) END,
            CASE WHEN coalesce(t.failed, 0) <> CASE WHEN o.retired_at IS NULL THEN {FAILED_ENTRIES} ELSE 0 END
                 THEN format('%s version %s with %s OrderFailed events', o.state, o.version,
                             coalesce(t.failed, 0)) END,
            CASE WHEN t.contradicting > 0
                 THEN format('%s events whose payload contradicts the order', t.contradicting) END) AS wrong
        FROM orders o LEFT JOIN told t USING (id))
    SELECT id AS order_id, format('order %s: %s', id, wrong) AS example FROM judged WHERE wrong <> ''
    """,
)

I3 = Invariant(
    "I3",
    "every PAID order has exactly one settled charge of its amount, every FAILED one none",
    "SELECT count(*) FROM orders WHERE state IN ('PAID', 'FAILED')",
    """
    SELECT o.id AS order_id, format('order %s: %s with %s settled charges%s%s', o.id, o.state, count(c.id),
                                    CASE WHEN o.retired_at IS NOT NULL THEN ' since it was retired' END,
                                    CASE WHEN bool_or(c.amount <> o.amount) THEN ', of another amount' END) AS example
    FROM orders o LEFT JOIN gateway_charges c ON c.reference = o.id AND c.status = 'settled'
    WHERE o.state IN ('PAID', 'FAILED')
    GROUP BY o.id, o.state, o.retired_at
    HAVING count(c.id) <> (o.state = 'PAID' AND o.retired_at IS NULL)::int OR bool_or(c.amount <> o.amount)
    """,
)

I4 = Invariant(
    "I4",
    "every outbox row older than the retry horizon is published",
    "SELECT count(*) FROM outbox WHERE created_at < now() - make_interval(secs => $1)",
    """
    SELECT aggregate_id AS order_id, format('event %s: %s of %s, due since %s', event_id, event_type, aggregate_id,
                                            greatest(created_at, available_at)) AS example
    FROM outbox
    WHERE published_at IS NULL AND created_at < now() - make_interval(secs => $1)
      AND (available_at IS NULL OR available_at < now() - make_interval(secs => $1))
    """,
)

I5 = Invariant(
    "I5",
    "every published event is processed or dead-lettered, once",
    """SELECT count(*) FROM outbox
       WHERE published_at < now() - make_interval(secs => $1) OR available_at = 'infinity'""",
    """
    SELECT aggregate_id AS order_id,
           format('event %s: %s of %s, %s and neither processed nor dead-lettered', event_id, event_type, aggregate_id,
                  CASE WHEN o.available_at = 'infinity' THEN 'buried' ELSE 'published ' || o.published_at END) AS example
    FROM outbox o
    WHERE (o.published_at < now() - make_interval(secs => $1) OR o.available_at = 'infinity')
      AND NOT EXISTS (SELECT FROM processed_events p WHERE p.event_id = o.event_id)
      AND NOT EXISTS (SELECT FROM dead_letter_events d WHERE d.event_id = o.event_id)
    UNION ALL
    SELECT coalesce(d.aggregate_id, p.event_id),
           format('event %s: processed at %s and dead-lettered at %s', p.event_id, p.processed_at, d.failed_at)
    FROM processed_events p JOIN dead_letter_events d USING (event_id)
    """,
)

# Since when an order is not terminal: since it was placed, or, when a redrive took it back, since then.
NON_TERMINAL_SINCE = "CASE WHEN version <= 2 THEN created_at ELSE coalesce(entered_at[version], updated_at) END"

I6 = Invariant(
    "I6",
    "no order stays non-terminal longer than the reconcile horizon",
    "SELECT count(*) FROM orders WHERE state NOT IN ('PAID', 'FAILED')",
    f"""
    SELECT id AS order_id, format('order %s: %s since %s', id, state, {NON_TERMINAL_SINCE}) AS example
    FROM orders
    WHERE state NOT IN ('PAID', 'FAILED') AND {NON_TERMINAL_SINCE} < now() - make_interval(secs => $2)
    """,
)

I7 = Invariant(
    "I7",
    "every 201 that a client holds is an order",
    "SELECT count(DISTINCT id) FROM unnest($3::uuid[]) AS a(id)",
    """
    SELECT DISTINCT a.id AS order_id, format('order %s: was accepted and does not exist', a.id) AS example
    FROM unnest($3::uuid[]) AS a(id) WHERE NOT EXISTS (SELECT FROM orders o WHERE o.id = a.id)
    """,
)

INVARIANTS = (I1, I2, I3, I4, I5, I6, I7)


def statement(invariant: Invariant) -> str:
    """The one statement of an invariant: a row (checked, violations, examples). Takes $1, $2 and $3."""
    return f"""
    WITH parameters AS (SELECT $1::float8, $2::float8, $3::uuid[]),
    violating AS MATERIALIZED ({invariant.violating})
    SELECT ({invariant.checked}) AS checked, (SELECT count(*) FROM violating) AS violations,
           ARRAY(SELECT example FROM violating LIMIT {EXAMPLES}) AS examples
    """


# The tables as they are for some orders only, under their own names: the invariants are written once. Each is read by a key,
# and what is joined is what has been read.
_SOME_ORDERS = """
orders AS MATERIALIZED (SELECT * FROM orders WHERE id = ANY($3::uuid[])),
outbox AS MATERIALIZED (SELECT * FROM outbox WHERE aggregate_id = ANY($3::uuid[])),
processed_events AS MATERIALIZED (SELECT * FROM processed_events WHERE event_id = ANY(ARRAY(SELECT event_id FROM outbox))),
dead_letter_events AS MATERIALIZED (SELECT * FROM dead_letter_events WHERE event_id = ANY(ARRAY(SELECT event_id FROM outbox))),
gateway_charges AS MATERIALIZED (SELECT * FROM gateway_charges WHERE reference = ANY($3::uuid[]))
"""


@dataclass(frozen=True, slots=True)
class Violation:
    """One order, or aggregate of an event, of which an invariant does not hold."""

    invariant: str
    order_id: UUID
    example: str


def statement_for_orders(invariant: Invariant) -> str:
    """The statement of an invariant for the orders $3: a row (order_id, example) for each violation."""
    return f"""
    WITH {_SOME_ORDERS}, parameters AS (SELECT $1::float8, $2::float8, $3::uuid[]),
    violating AS ({invariant.violating})
    SELECT order_id, example FROM violating
    """


async def violations_of(
    connection: Connection, invariants: Sequence[Invariant], order_ids: Sequence[UUID], *,
    retry_horizon: float = RETRY_HORIZON, reconcile_horizon: float = RECONCILE_HORIZON,
) -> list[Violation]:  # fmt: skip
    """Check some invariants (not I7) of some orders, in the caller's transaction; its cost does not grow with the tables."""
    if not order_ids:
        return []
    # A role's session joins by index alone, and what is joined here has none.
    await connection.execute("SET LOCAL enable_hashjoin = on")
    found = [
        Violation(invariant.name, row["order_id"], row["example"])
        for invariant in invariants
        for row in await connection.fetch(statement_for_orders(invariant), retry_horizon, reconcile_horizon, order_ids)
    ]
    await connection.execute("SET LOCAL enable_hashjoin = off")
    return found


async def audit(
    connection: Connection,
    *,
    retry_horizon: float = RETRY_HORIZON,
    reconcile_horizon: float = RECONCILE_HORIZON,
    accepted: Iterable[UUID] | None = None,
    timeout: float = 900.0,
    checking: Callable[[Invariant], None] = lambda invariant: None,
) -> list[Finding]:
    """Check every invariant over the whole database, in one snapshot; `checking` is told each one before it is looked at.

    Horizons in seconds: how long a retry, and how long a stuck order, may take before it counts. `accepted` are the
    orders for which a client holds a 201; without them I7 is not checked. `timeout` bounds each statement, in seconds.
    """
    ids = None if accepted is None else list(accepted)
    findings = []
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute(f"SET LOCAL statement_timeout = {int(timeout * 1000)}")
        await connection.execute("SET LOCAL work_mem = '64MB'")
        for invariant in INVARIANTS:
            checking(invariant)
            if invariant is I7 and ids is None:
                finding = Finding(invariant.name, invariant.text, 0, 0, not_checked=NO_RECORD)
            else:
                row = await connection.fetchrow(statement(invariant), retry_horizon, reconcile_horizon, ids, timeout=timeout)
                assert row is not None
                finding = Finding(invariant.name, invariant.text, row["checked"], row["violations"], list(row["examples"]))
            findings.append(finding)
    return findings
