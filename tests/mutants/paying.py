"""Safeguards of a payment: one charge at the most, and an order's state that agrees with it whatever dies when."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Edit, Mutant

STORE: Final = "orderflow/payments/store.py"
HANDLERS: Final = "orderflow/payments/handlers.py"
EXECUTOR: Final = "orderflow/engine/executor.py"
ORDERS: Final = "orderflow/orders/store.py"
LOST_ANSWER: Final = "integration/test_payments.py::test_the_charge_is_made_and_the_answer_is_lost"

MUTANTS: Final = (
    Mutant(
        "pending-before-charge",
        "PAYMENT_PENDING is committed before the gateway is asked for money",
        "charged first",
        "I3: whoever finds the order after a crash asks for its charge",
        [
            Edit(
                HANDLERS,
                "        results = await store.begin_if_fresh(self._database, messages)",
                "        for m in messages:\n"
                '            amount = __import__("decimal").Decimal(m.payload["amount"])\n'
                "            request = ChargeRequest(m.aggregate_id, idempotency_key(m.aggregate_id), amount)\n"
                "            await self._gateway.charge(request)\n"
                "        results = await store.begin_if_fresh(self._database, messages)",
            )
        ],
        ["integration/test_payments.py::test_pending_is_committed_before_the_gateway_is_asked"],
    ),
    Mutant(
        "charge-key",
        "The idempotency key of a charge is the order's",
        "a new one at each attempt",
        "I3: exactly one charge",
        [
            Edit(
                "orderflow/payments/gateway.py",
                'return f"orderflow-charge-{order_id}"',
                "return f\"orderflow-charge-{order_id}-{__import__('uuid').uuid4()}\"",
            )
        ],
        ["integration/test_simulated_gateway.py::test_the_same_key_at_the_same_moment_charges_once"],
    ),
    Mutant(
        "begin-if-created",
        "A charge is begun on an order that is CREATED",
        "on any order",
        "I2; an order that was begun before is not taken for a fresh one",
        [Edit(STORE, "WHERE o.id = i.order_id AND o.state = 'CREATED' AND o.version = 1\n", "WHERE o.id = i.order_id\n")],
        ["integration/test_payments.py::test_an_order_that_is_pending_already_is_resumed"],
        error="CheckViolationError",
    ),
    Mutant(
        "begin-the-attempt-that-counts",
        "A delivery of an older attempt begins nothing",
        "attempts are not compared",
        "what is on its way from before a redrive decides nothing",
        [Edit(STORE, " AND e.attempt <= i.attempt AND", " AND")],
        ["integration/test_executor.py::test_a_delivery_of_an_older_attempt_is_a_duplicate"],
    ),
    Mutant(
        "begin-nothing-buried",
        "An event that lies buried begins nothing",
        "dead letters are not looked at",
        "I5: a buried event comes back by a redrive only",
        [Edit(STORE, "p.event_id IS NULL AND d.event_id IS NULL\nRETURNING", "p.event_id IS NULL\nRETURNING")],
        ["integration/test_executor.py::test_a_buried_event_that_is_delivered_again_stays_buried"],
    ),
    Mutant(
        "begin-the-order-of-the-event",
        "An event begins the order that its row tells of",
        "the order that the record names",
        "I3: no order is charged for another's event",
        [Edit(STORE, "ON e.event_id = i.event_id AND e.aggregate_id = i.order_id\n", "ON e.event_id = i.event_id\n")],
        ["integration/test_executor.py::test_an_event_that_names_another_order_charges_neither"],
    ),
    Mutant(
        "ask-before-charging-again",
        "An order that was begun before is charged after the gateway was asked for its charge",
        "charged at once",
        "I3: exactly one charge, also where the gateway has forgotten the key",
        [Edit(HANDLERS, "if not order.moved and (found := await self._find(order.order_id)):", "if False:")],
        ["integration/test_payments.py::test_an_order_that_is_pending_already_is_resumed"],
    ),
    Mutant(
        "ask-after-silence",
        "After no answer the gateway is asked for the charge",
        "it counts as failed",
        "I3: a timeout is an unknown outcome",
        [Edit(HANDLERS, "            if found := await self._find(order.order_id):\n                return found\n", "")],
        [LOST_ANSWER],
    ),
    Mutant(
        "broken-connection-is-silence",
        "A connection that breaks is no answer of the gateway",
        "it counts as failed",
        "I3: a timeout is an unknown outcome",
        [
            Edit(
                HANDLERS,
                "not isinstance(error, ChargeUnknown) and not is_transient(error)",
                "not isinstance(error, ChargeUnknown)",
            )
        ],
        [LOST_ANSWER],
    ),
    Mutant(
        "gateway-call-is-bounded",
        "A call of the gateway takes a bounded time",
        "without an end",
        "I6: an order does not stay non-terminal",
        [Edit(HANDLERS, "self._limit.run(self._gateway.charge(request))", "self._gateway.charge(request)")],
        ["integration/test_payments.py::test_no_answer_and_no_charge_is_bounded_and_tried_again"],
        timeout=20,
    ),
    Mutant(
        "ask-before-giving-up",
        "Before an order is given up, the gateway is asked for its charge",
        "it is not asked",
        "I3: no FAILED order has a charge",
        [Edit(EXECUTOR, "return await handler.before_giving_up(delivery) or decided", "return decided")],
        ["integration/test_payments.py::test_a_charge_that_exists_after_three_errors_is_not_given_up"],
    ),
    Mutant(
        "no-burial-without-an-answer",
        "As long as the gateway cannot tell, an order is not given up",
        "it is given up",
        "I3: no FAILED order has a charge",
        [Edit(EXECUTOR, "return self._policy.retry(failures, unknown, self._random)", "return decided")],
        ["integration/test_payments.py::test_a_find_that_is_broken_for_good_is_no_reason_to_give_up_either"],
    ),
    Mutant(
        "settle-the-version-charged",
        "A settlement counts for the version on which its charge was begun",
        "for any version",
        "I2: each transition is guarded by state and version",
        [Edit(STORE, " AND o.version = i.version\n", "\n")],
        ["integration/test_redrive.py::test_a_decline_of_before_the_redrive_decides_nothing"],
    ),
    Mutant(
        "settle-once",
        "Of two settlements of an order, one takes effect",
        "neither state nor version is asked",
        "I3: exactly one settlement",
        [Edit(STORE, " AND o.state = 'PAYMENT_PENDING' AND o.version = i.version\n", "\n")],
        ["integration/test_executor.py::test_the_same_event_at_the_same_moment_settles_once"],
    ),
    Mutant(
        "settled-is-processed",
        "A settlement records its event as processed in the same statement",
        "not recorded",
        "I5: every event is processed",
        [Edit(STORE, "SELECT event_id, $8 FROM moved\n", "SELECT event_id, $8 FROM moved WHERE false\n")],
        ["integration/test_payments.py::test_success"],
    ),
    Mutant(
        "settled-is-announced",
        "A settlement writes OrderPaid or OrderFailed in the same statement",
        "not written",
        "I2: an order's events fit its state",
        [Edit(STORE, "order_id, payload, headers FROM moved)", "order_id, payload, headers FROM moved WHERE false)")],
        ["integration/test_payments.py::test_declined_at_once_without_a_retry_or_a_dead_letter"],
    ),
    Mutant(
        "buried-with-its-order",
        "A dead letter and its order's failure are one transaction",
        "two transactions, the dead letter's first",
        "I2, I6: no dead letter leaves its order pending",
        [
            Edit(
                EXECUTOR,
                "                tell = await handler.on_buried(",
                "            async with self._database.transaction() as connection:\n"
                "                tell = await handler.on_buried(",
            )
        ],
        ["integration/test_payments.py::test_a_failure_that_cannot_be_written_leaves_no_dead_letter"],
    ),
    Mutant(
        "burial-is-announced",
        "The burial of an order's event writes OrderFailed",
        "not written",
        "I2: an order's events fit its state",
        [Edit(HANDLERS, "        await outbox.append(connection, [failed])", "        pass")],
        ["integration/test_payments.py::test_three_errors"],
    ),
    Mutant(
        "fail-if-not-terminal",
        "A burial fails an order that has not ended",
        "any order",
        "I3: no paid order becomes FAILED",
        [Edit(STORE, "WHERE id = $1 AND state = ANY($2::text[])\n", "WHERE id = $1 AND $2::text[] <> '{}'\n")],
        ["integration/test_relay.py::test_an_unpublishable_row_is_buried_and_the_rest_goes_on"],
        error="CheckViolationError",
    ),
    Mutant(
        "settled-meanwhile",
        "A burial that finds its order settled is undone",
        "it stands",
        "I5: processed or dead-lettered, not both",
        [Edit(HANDLERS, "                raise SettledMeanwhile\n", "                pass\n")],
        ["integration/test_payments.py::test_a_burial_that_waits_for_a_settlement_is_undone"],
    ),
    Mutant(
        "late-charge",
        "A charge that ends after its order was given up takes the order back",
        "the order stays FAILED",
        "I3: no FAILED order has a charge",
        [Edit(HANDLERS, "        if not settled and charge is not None:", "        if False:")],
        ["integration/test_payments.py::test_a_charge_that_ends_after_the_burial_by_another_delivery"],
    ),
    Mutant(
        "decline-is-never-redriven",
        "A redrive takes back an order that failed for a technical reason",
        "any FAILED order",
        "a declined order is never redriven",
        [Edit(ORDERS, "AND state = 'FAILED' AND failure = 'error' RETURNING", "AND state = 'FAILED' RETURNING")],
        ["integration/test_redrive.py::test_a_declined_order_is_never_taken_back"],
        error="CheckViolationError",
    ),
    Mutant(
        "redriven-once",
        "Of two people who redrive a dead letter, one does",
        "its row is not locked",
        "fresh attempts are given once",
        [Edit("orderflow/engine/dead_letters.py", "WHERE event_id = $1 FOR UPDATE", "WHERE event_id = $1")],
        ["integration/test_redrive.py::test_two_people_redrive_the_same_letter"],
    ),
)
