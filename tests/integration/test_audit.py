"""Every invariant of the audit: a sound database passes, and each planted violation fires exactly its own invariant."""

from __future__ import annotations

from uuid import UUID, uuid4

import asyncpg
import pytest

from orderflow.audit import FAILED_ENTRIES, INVARIANTS, audit
from orderflow.orders.model import IllegalTransition, State, path_to

# The database refuses most of what the audit looks for: the audit is there for the day when something got past it.
DROP_GUARDS = """
ALTER TABLE orders DROP CONSTRAINT orders_version_fits, DROP CONSTRAINT orders_failure_explains,
    DROP CONSTRAINT orders_history_complete;
ALTER TABLE orders DISABLE TRIGGER orders_legal_transition;
ALTER TABLE orders DISABLE TRIGGER orders_times_complete;
"""

# Ten minutes of history, so that every horizon has passed: orders in each state, with what belongs to each.
SOUND = """
CREATE FUNCTION at(seconds float8) RETURNS timestamptz LANGUAGE sql AS
    $$ SELECT now() - interval '10 min' + make_interval(secs => seconds) $$;
CREATE FUNCTION told(n int, kind text, seconds float8, row_id uuid) RETURNS void LANGUAGE sql AS $$
    INSERT INTO outbox (event_id, event_type, aggregate_id, payload, created_at, published_at)
    SELECT row_id, kind, id, jsonb_build_object('orderId', id, 'userId', user_id, 'amount', amount::text),
           at(seconds), at(seconds + 0.01)
    FROM orders WHERE id = ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid $$;
CREATE FUNCTION placed(n int, new_state text, new_version int, why text) RETURNS void LANGUAGE sql AS $$
    INSERT INTO orders (id, user_id, state, version, amount, failure, created_at, updated_at, entered_at)
    VALUES (('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid, gen_random_uuid(), new_state, new_version, 10.50,
            why, at(0), at(new_version - 1), ARRAY(SELECT at(v) FROM generate_series(0, new_version - 1) AS v)) $$;

SELECT placed(1, 'PAID', 3, NULL), placed(2, 'FAILED', 3, 'declined'), placed(3, 'FAILED', 3, 'error'),
       placed(4, 'PAID', 5, NULL), placed(5, 'FAILED', 2, 'error');
SELECT told(n, 'OrderCreated', 0, ('00000000-0000-7000-8000-0000000c' || lpad(n::text, 4, '0'))::uuid)
FROM generate_series(1, 5) AS n;
SELECT told(1, 'OrderPaid', 2, gen_random_uuid()), told(2, 'OrderFailed', 2, gen_random_uuid()),
       told(3, 'OrderFailed', 2, gen_random_uuid()), told(4, 'OrderFailed', 2, gen_random_uuid()),
       told(4, 'OrderPaid', 4, gen_random_uuid()), told(5, 'OrderFailed', 1, gen_random_uuid());

INSERT INTO dead_letter_events (event_id, event_type, aggregate_id, reason, failed_at)
SELECT event_id, event_type, aggregate_id, 'Max retries exceeded (3)', at(2) FROM outbox
WHERE event_type = 'OrderCreated' AND aggregate_id::text LIKE ANY (ARRAY['%3', '%5']);
UPDATE outbox SET available_at = 'infinity' WHERE event_id IN (SELECT event_id FROM dead_letter_events);
INSERT INTO processed_events (event_id, worker_id, processed_at)
SELECT event_id, 'payment-worker-1', created_at + interval '1 s' FROM outbox WHERE available_at IS NULL;
INSERT INTO gateway_charges (id, idempotency_key, reference, amount, status)
SELECT gen_random_uuid(), id::text, id, amount, 'settled' FROM orders WHERE state = 'PAID'
UNION ALL SELECT gen_random_uuid(), id::text, id, amount, 'declined' FROM orders WHERE failure = 'declined';
"""

PAID = UUID("00000000-0000-7000-8000-000000000001")


@pytest.fixture
async def sound(connection: asyncpg.Connection) -> asyncpg.Connection:
    """A database with a history that holds every invariant, and without the guards that keep it so."""
    await connection.execute(DROP_GUARDS)
    await connection.execute(SOUND)
    return connection


async def violated(connection: asyncpg.Connection, accepted: list[UUID] | None = None) -> dict[str, int]:
    findings = await audit(connection, accepted=accepted)
    return {finding.invariant: finding.violations for finding in findings if finding.violations}


async def test_an_empty_database_is_sound(connection: asyncpg.Connection) -> None:
    findings = await audit(connection, accepted=[])
    assert [(f.checked, f.violations, f.examples) for f in findings] == [(0, 0, [])] * 7


async def test_a_sound_history_passes_and_everything_was_looked_at(sound: asyncpg.Connection) -> None:
    findings = await audit(sound, accepted=[PAID, PAID])
    assert {f.invariant: (f.checked, f.violations) for f in findings} == {
        "I1": (5, 0), "I2": (5, 0), "I3": (5, 0), "I4": (11, 0), "I5": (11, 0), "I6": (0, 0), "I7": (1, 0),
    }  # fmt: skip
    assert {f.verdict for f in findings} == {"ok"}


ONE = "'00000000-0000-7000-8000-000000000001'"
CREATED = "'00000000-0000-7000-8000-0000000c0001'"

PLANTED = {
    "I1 no OrderCreated": ("I1", f"DELETE FROM outbox WHERE event_id = {CREATED}"),
    "I1 a second OrderCreated": (
        "I1",
        "SELECT told(1, 'OrderCreated', 1, gen_random_uuid());"
        "INSERT INTO processed_events SELECT event_id, 'w' FROM outbox ON CONFLICT DO NOTHING;"
        "DELETE FROM processed_events WHERE event_id IN (SELECT event_id FROM dead_letter_events)",
    ),
    "I2 PAID without OrderPaid": ("I2", f"DELETE FROM outbox WHERE event_type = 'OrderPaid' AND aggregate_id = {ONE}"),
    "I2 OrderPaid of an order in work": (
        "I2",
        f"UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, entered_at = entered_at[1:2], created_at = now(),"
        f" updated_at = now() WHERE id = {ONE}",
    ),
    "I2 an OrderFailed too many": (
        "I2",
        "SELECT told(1, 'OrderFailed', 1, '00000000-0000-7000-8000-00000000ffff');"
        "INSERT INTO processed_events VALUES ('00000000-0000-7000-8000-00000000ffff', 'w')",
    ),
    "I2 an OrderFailed too few": ("I2", "DELETE FROM outbox WHERE event_type = 'OrderFailed' AND aggregate_id::text LIKE '%4'"),
    "I2 a version that the state cannot have": (
        "I2", f"UPDATE orders SET version = 2, entered_at = entered_at[1:2] WHERE id = {ONE}"
    ),
    "I2 a failure of an order that did not fail": ("I2", f"UPDATE orders SET failure = 'error' WHERE id = {ONE}"),
    "I2 a history cut short": ("I2", f"UPDATE orders SET entered_at = entered_at[1:2] WHERE id = {ONE}"),
    "I2 a history out of order": (
        "I2", f"UPDATE orders SET entered_at = ARRAY[entered_at[2], entered_at[1], entered_at[3]] WHERE id = {ONE}"
    ),
    "I2 a payload of another amount": (
        "I2", f"""UPDATE outbox SET payload = payload || '{{"amount": "10.51"}}' WHERE event_id = {CREATED}"""
    ),
    "I2 a payload whose amount is no number": (
        "I2", f"""UPDATE outbox SET payload = payload || '{{"amount": "1e400"}}' WHERE event_id = {CREATED}"""
    ),
    "I2 a payload of another order": (
        "I2",
        f"""UPDATE outbox SET payload = payload || '{{"orderId": "x"}}'
            WHERE event_type = 'OrderPaid' AND aggregate_id = {ONE}""",
    ),
    "I3 PAID without a charge": ("I3", f"DELETE FROM gateway_charges WHERE reference = {ONE}"),
    "I3 PAID and charged twice": (
        "I3", f"INSERT INTO gateway_charges VALUES (gen_random_uuid(), 'again', {ONE}, 10.50, 'settled')"
    ),
    "I3 FAILED and charged": (
        "I3",
        "INSERT INTO gateway_charges SELECT gen_random_uuid(), 'again', id, amount, 'settled'"
        " FROM orders WHERE failure = 'declined'",
    ),
    "I3 another amount charged": ("I3", f"UPDATE gateway_charges SET amount = 10.51 WHERE reference = {ONE}"),
    "I4 never published": ("I4", f"UPDATE outbox SET published_at = NULL WHERE event_id = {CREATED}"),
    "I4 a retry that nobody took up": (
        "I4", f"UPDATE outbox SET published_at = NULL, available_at = at(5) WHERE event_id = {CREATED}"
    ),
    "I5 published and lost": ("I5", f"DELETE FROM processed_events WHERE event_id = {CREATED}"),
    "I5 buried and lost": ("I5", "DELETE FROM dead_letter_events WHERE aggregate_id::text LIKE '%3'"),
    "I5 processed and dead-lettered": (
        "I5", f"INSERT INTO dead_letter_events (event_id, reason) VALUES ({CREATED}, 'both')"
    ),
    "I6 stuck in CREATED": (
        "I6",
        "SELECT placed(6, 'CREATED', 1, NULL), told(6, 'OrderCreated', 0, '00000000-0000-7000-8000-00000000ffff');"
        "INSERT INTO processed_events VALUES ('00000000-0000-7000-8000-00000000ffff', 'w')",
    ),
    "I6 stuck after a redrive": (
        "I6",
        "UPDATE orders SET state = 'PAYMENT_PENDING', failure = NULL, version = 4, entered_at = entered_at || at(9)"
        " WHERE id::text LIKE '%3'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
async def test_a_planted_violation_fires_its_invariant_and_no_other(sound: asyncpg.Connection, planted: str) -> None:
    invariant, sql = PLANTED[planted]
    await sound.execute("SELECT at(0)")
    await sound.execute(sql)
    assert await violated(sound) == {invariant: 1}


UNHARMED = {
    "a retry that is due later": f"UPDATE outbox SET published_at = NULL, available_at = now() WHERE event_id = {CREATED}",
    "a fresh order": "INSERT INTO orders (id, user_id, amount)"
    " VALUES ('00000000-0000-7000-8000-000000000009', gen_random_uuid(), 1);"
    "SELECT told(9, 'OrderCreated', 600, gen_random_uuid()); UPDATE outbox SET published_at = NULL WHERE created_at > at(599)",
    "published this moment": f"UPDATE outbox SET published_at = now() WHERE event_id = {CREATED};"
    f"DELETE FROM processed_events WHERE event_id = {CREATED}",
    "a discarded dead letter": "UPDATE dead_letter_events SET discarded_at = now(), discard_reason = 'seen'",
    "a record of no event of ours": "INSERT INTO dead_letter_events (event_id, reason) VALUES (gen_random_uuid(), 'not JSON')",
    "an event of another program": "INSERT INTO outbox (event_type, aggregate_type, aggregate_id, payload)"
    f" VALUES ('Shipped', 'parcel', {ONE}, '[1]')",
    "an amount written as a number": f"""UPDATE outbox SET payload = payload || '{{"amount": 10.5}}'
        WHERE event_id = {CREATED}""",
    "reopened just now": "UPDATE orders SET state = 'PAYMENT_PENDING', failure = NULL, version = 4, updated_at = now(),"
    " entered_at = entered_at || now() WHERE id::text LIKE '%3'",
}  # fmt: skip


@pytest.mark.parametrize("harmless", UNHARMED)
async def test_what_is_merely_unfinished_is_no_violation(sound: asyncpg.Connection, harmless: str) -> None:
    await sound.execute(UNHARMED[harmless])
    assert await violated(sound) == {}


async def test_an_accepted_order_that_does_not_exist(sound: asyncpg.Connection) -> None:
    lost = uuid4()
    findings = {f.invariant: f for f in await audit(sound, accepted=[PAID, lost, lost])}
    assert (findings["I7"].checked, findings["I7"].violations) == (2, 1)
    assert str(lost) in findings["I7"].examples[0]
    assert [f.invariant for f in findings.values() if f.violations] == ["I7"]


async def test_without_a_record_of_accepted_orders_i7_is_not_passed(sound: asyncpg.Connection) -> None:
    finding = (await audit(sound))[-1]
    assert finding.invariant == "I7"
    assert finding.verdict == "not checked"
    assert "--accepted" in finding.not_checked


async def test_at_most_twenty_examples_and_every_violation_counted(sound: asyncpg.Connection) -> None:
    await sound.execute(
        "INSERT INTO orders (id, user_id, amount) SELECT gen_random_uuid(), gen_random_uuid(), 1 FROM generate_series(1, 33)"
    )
    finding = (await audit(sound))[0]
    assert (finding.invariant, finding.violations, len(finding.examples)) == ("I1", 33, 20)


async def test_horizons_are_parameters(sound: asyncpg.Connection) -> None:
    await sound.execute(PLANTED["I4 never published"][1] + ";" + PLANTED["I6 stuck in CREATED"][1])
    assert set(await violated(sound)) == {"I4", "I6"}
    patient = await audit(sound, retry_horizon=3600, reconcile_horizon=3600)
    assert not any(finding.violations for finding in patient)


async def test_it_writes_nothing_and_reads_one_snapshot(sound: asyncpg.Connection) -> None:
    queries: list[str] = []
    with sound.query_logger(lambda record: queries.append(record.query)):
        await audit(sound, accepted=[])
    assert queries[0] == "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;"
    assert [query for query in queries if query.startswith("BEGIN")] == queries[:1]
    assert len([query for query in queries if "violating AS MATERIALIZED" in query]) == len(INVARIANTS)


async def test_the_count_of_failures_in_sql_is_that_of_the_state_machine(connection: asyncpg.Connection) -> None:
    for state in State:
        for version in range(1, 12):
            try:
                expected = path_to(state, version).count(State.FAILED)
            except IllegalTransition:
                continue
            found = await connection.fetchval(
                f"SELECT {FAILED_ENTRIES} FROM (VALUES ($1::text, $2::int)) AS o(state, version)", state.value, version
            )
            assert (state, version, found) == (state, version, expected)
