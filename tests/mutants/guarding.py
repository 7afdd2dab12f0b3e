"""Safeguards around the way of an order: who may send, what is refused, who is spared, what may be deleted."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Edit, Mutant

CIRCUIT: Final = "orderflow/engine/circuit.py"
RETENTION: Final = "orderflow/retention.py"
API_KEYS: Final = "orderflow/orders/api_keys.py"

MUTANTS: Final = (
    Mutant(
        "circuit-opens",
        "A gateway that does not answer is spared",
        "silences are not counted",
        "an outage is not made worse, and uses up no attempt",
        [Edit(CIRCUIT, "if self._silences == self._failures:", "if False:")],
        ["integration/test_circuit.py::test_silence_opens_it_for_everybody_and_an_answer_in_between_does_not"],
    ),
    Mutant(
        "one-probe",
        "An open circuit is probed by one delivery at a time",
        "by every worker",
        "a gateway that comes back is not met by thousands",
        [Edit(CIRCUIT, "AND state <> 'closed' AND due_at <= now()\n", "AND state <> 'closed'\n")],
        ["integration/test_circuit.py::test_one_delivery_of_one_worker_probes_and_its_answer_closes_it"],
    ),
    Mutant(
        "late-probe",
        "What a probe says after its claim has run out is not heard",
        "it decides",
        "the circuit is what its latest probe has found",
        [Edit(CIRCUIT, "WHERE name = $1 AND state = 'half-open' AND probes = $2\n", "WHERE name = $1 AND $2::integer > 0\n")],
        ["integration/test_circuit.py::test_the_claim_of_a_dead_worker_runs_out_and_what_it_says_too_late_is_not_heard"],
    ),
    Mutant(
        "no-answer-is-no-attempt",
        "A postponement uses up no attempt",
        "it counts as one",
        "never FAILED because a gateway was away",
        [
            Edit(
                "orderflow/engine/outbox.py",
                "        first_attempt = o.first_attempt + (r.failure IS NULL)::integer,\n",
                "",
            )
        ],
        ["integration/test_outbox.py::test_a_postponement_uses_no_attempt_and_outlasts_a_slower_mark"],
    ),
    Mutant(
        "no-failure-without-asking",
        "Who has not asked the gateway fails no order that is PAYMENT_PENDING",
        "the relay's burial fails it",
        "never FAILED with a charge behind it",
        [
            Edit(
                "orderflow/payments/handlers.py",
                "    fails_from: Sequence[State] = (State.CREATED,)",
                "    fails_from: Sequence[State] = (State.CREATED, State.PAYMENT_PENDING)",
            )
        ],
        ["integration/test_payments.py::test_an_unknown_outcome_outlasts_every_attempt_and_whoever_looks_sees_it"],
    ),
    Mutant(
        "behind-the-first",
        "Later events of an aggregate wait behind its buried or retried one",
        "they do not wait",
        "order within an aggregate, for handlers that ask for it",
        [Edit("orderflow/engine/executor.py", "elif delivery.known.held and message.type in self._in_order:", "elif False:")],
        ["integration/test_in_order.py::test_behind_a_dead_letter_until_it_is_redriven"],
    ),
    Mutant(
        "a-note-left-behind",
        "The note of an event that is settled holds nothing",
        "it holds what is behind it",
        "I6: who died before deleting a note stops no aggregate",
        [
            Edit(
                "orderflow/engine/processed.py",
                "h.seq < o.seq AND hp.event_id IS NULL AND hd.event_id IS NULL",
                "h.seq < o.seq",
            )
        ],
        ["integration/test_in_order.py::test_a_note_that_nobody_deleted_holds_nothing"],
    ),
    Mutant(
        "admission",
        "No order is accepted while the oldest has waited too long",
        "all are accepted",
        "429 under overload, accepted work unharmed",
        [Edit("orderflow/orders/admission.py", "if not self.refusing and self.age > self._limit:", "if False:")],
        ["integration/test_admission.py::test_new_orders_are_refused_and_everything_else_is_answered"],
    ),
    Mutant(
        "errors-without-secrets",
        "What ends a command is told without its passwords",
        "as it is",
        "no password in a terminal, or in the log of a job that runs a command",
        [
            Edit(
                "orderflow/cli.py",
                'click.echo(f"orderflow: {_without_secrets(line)}", err=True)',
                'click.echo(f"orderflow: {line}", err=True)',
            )
        ],
        ["unit/test_cli.py::test_an_error_that_nobody_foresaw_is_told_without_the_password"],
    ),
    Mutant(
        "longer-than-kafka",
        "Nothing is deleted that Kafka may still deliver",
        "Kafka's retention is not compared",
        "I3, I5: no redelivery meets a row that is gone",
        [Edit(RETENTION, "    if kept >= timedelta(days=days):", "    if False:")],
        ["integration/test_retention.py::test_nothing_goes_while_kafka_keeps_its_records_for_longer"],
    ),
    Mutant(
        "in-flight-is-kept",
        "An order in flight is kept, however old",
        "its state is not asked",
        "I3: nothing is deleted that is still needed",
        [
            Edit(RETENTION, "OR (o.state IN ('PAID', 'FAILED') AND o.updated_at", "OR (o.updated_at"),
            Edit(
                RETENTION,
                "WHERE id = ANY($2::uuid[]) AND state IN ('PAID', 'FAILED') RETURNING id",
                "WHERE id = ANY($2::uuid[]) RETURNING id",
            ),
        ],
        ["integration/test_retention.py::test_an_order_in_flight_is_kept_however_old"],
    ),
    Mutant(
        "retired-is-no-stranger",
        "A redelivery of a retired order's event is a duplicate",
        "it is buried as a stranger's",
        "I5: what is finished stays finished",
        [Edit("orderflow/engine/executor.py", "if known is None and await self._retired.submit(message):", "if False:")],
        ["integration/test_retention.py::test_a_redelivery_of_what_was_retired_charges_nothing"],
    ),
    Mutant(
        "one-retention",
        "One process deletes at a time",
        "all of them do",
        "they do not wait for each other's locks",
        [Edit(RETENTION, "if not await connection.fetchval(", "if None is await connection.fetchval(")],
        ["integration/test_retention.py::test_one_process_at_a_time"],
    ),
    Mutant(
        "watchdog",
        "A role that has work and does nothing is started again",
        "it is only watched",
        "no process is restarted by hand",
        [
            Edit(
                "orderflow/engine/watchdog.py",
                "if (seconds := loop.time() - since) >= limit:",
                "if (seconds := loop.time() - since) < 0:",
            )
        ],
        ["unit/test_watchdog.py::test_due_work_and_no_progress_end_the_run_and_say_so"],
    ),
    Mutant(
        "loop-watchdog",
        "A process whose event loop is blocked ends, and is started again",
        "it is only watched",
        "no process is restarted by hand",
        [Edit("orderflow/loop_watchdog.py", "(missed := missed + 1) >= LOOKS:", "(missed := missed + 1) < 0:")],
        ["unit/test_loop_watchdog.py::test_a_blocked_loop_ends_the_process_and_says_where"],
    ),
    Mutant(
        "one-auditor",
        "One process audits",
        "all of them do",
        "the audit costs as much as one",
        [Edit("orderflow/auditor.py", 'await connection.fetchval("SELECT pg_try_advisory_lock($1)", AUDITOR_LOCK)', "True")],
        ["integration/test_auditor.py::test_one_process_is_elected_and_another_takes_its_place"],
    ),
    Mutant(
        "readyz-is-open-to-anybody",
        "However often /readyz is asked, PostgreSQL is asked once in a few seconds",
        "each time",
        "a stranger's questions cost the database nothing",
        [Edit("orderflow/audit_result.py", " and now - self._since >= FRESH_SECONDS", "")],
        ["integration/test_audit_result.py::test_whoever_asks_again_at_once_is_told_the_same"],
    ),
    Mutant(
        "known-keys-only",
        "Only a known key is let in",
        "any key is",
        "who may use /orders",
        [
            Edit(
                API_KEYS,
                '            raise _unauthorized("This API key is not known here.", \', error="invalid_token"\')',
                "            holder = next(iter(self._holders.values()))",
            )
        ],
        ["unit/test_api_keys.py::test_everything_but_the_key_is_refused"],
    ),
    Mutant(
        "constant-time",
        "Digests are compared in constant time",
        "byte by byte",
        "no key is found out by its time",
        [Edit(API_KEYS, "not hmac.compare_digest(holder.digest, digest)", "holder.digest != digest")],
        ["unit/test_api_keys.py::test_digests_are_compared_in_constant_time"],
    ),
    Mutant(
        "rate-of-a-key",
        "A key that is used too often waits",
        "it does not wait",
        "one client does not crowd out the others",
        [Edit(API_KEYS, "        if holder.tokens < 1.0:", "        if False:")],
        ["integration/test_http_keys.py::test_a_key_that_is_used_too_often_waits_alone"],
    ),
    Mutant(
        "no-open-door",
        "An API that asks for no key listens on loopback only",
        "anywhere",
        "no stranger places an order",
        [
            Edit(
                "orderflow/listening.py",
                "if not keys and not settings.allow_anonymous and not is_loopback(settings.http_host):",
                "if False:",
            )
        ],
        ["unit/test_api_keys.py::test_beyond_loopback_needs_keys_or_a_word"],
    ),
)
