"""Safeguards between Kafka and a handler: what is settled once, in order, committed after it, and what poison cannot do."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Edit, Mutant

CONSUMER: Final = "orderflow/engine/consumer.py"
EXECUTOR: Final = "orderflow/engine/executor.py"
PROCESSED: Final = "orderflow/engine/processed.py"
WATERMARK: Final = "orderflow/engine/watermark.py"
OUTBOX: Final = "orderflow/engine/outbox.py"
DEAD_LETTERS: Final = "orderflow/engine/dead_letters.py"
RETRY: Final = "orderflow/engine/retry.py"
KAFKA: Final = "orderflow/engine/kafka.py"
FORGED_ID: Final = (
    "integration/test_executor.py::test_a_record_that_borrows_the_id_of_an_order_s_event_does_not_have_it_skipped"
)
STILL_AT_WORK: Final = "integration/test_consumer.py::test_what_does_not_end_in_time_is_delivered_again"
SETTLED_OR_MOVED: Final = "integration/test_dead_letters.py::test_never_what_has_been_processed_nor_moved_to_another_attempt"
TWO_OF_ONE_ATTEMPT: Final = "integration/test_outbox.py::test_of_two_deliveries_of_one_attempt_one_counts"

MUTANTS: Final = (
    Mutant(
        "contiguous-watermark",
        "The watermark passes no delivery that is not finished",
        "it follows the highest finished one",
        "I5: every published event is processed",
        [
            Edit(
                WATERMARK,
                "        self._finished.add(offset)",
                "        self._finished.add(offset)\n        self._next = max(self._next or 0, offset + 1)",
            )
        ],
        ["unit/test_watermark.py::test_a_slow_head_holds_the_watermark_and_lets_go_of_all_at_once"],
    ),
    Mutant(
        "settled-before-committed",
        "An offset counts when its delivery is settled",
        "when it has begun",
        "I5: every published event is processed",
        [
            Edit(CONSUMER, "            watermark.finish(record.offset)\n", ""),
            Edit(
                CONSUMER,
                "        self._start(record, finished)",
                "        watermark.finish(record.offset)\n        self._start(record, finished)",
            ),
        ],
        [STILL_AT_WORK],
    ),
    Mutant(
        "explicit-offsets",
        "The watermark is committed, not what was fetched",
        "`commit()` without offsets",
        "I5: every published event is processed",
        [Edit(CONSUMER, "consumer.commit(offsets)", "consumer.commit()")],
        [STILL_AT_WORK],
    ),
    Mutant(
        "no-automatic-commit",
        "The client commits nothing by itself",
        "automatic commits",
        "I5: every published event is processed",
        [Edit(KAFKA, "enable_auto_commit=False", "enable_auto_commit=True")],
        [STILL_AT_WORK],
    ),
    Mutant(
        "from-the-earliest",
        "A group without an offset begins at the earliest record",
        "at the latest",
        "I5: every published event is processed",
        [Edit(KAFKA, 'auto_offset_reset="earliest"', 'auto_offset_reset="latest"')],
        ["integration/test_consumer.py::test_records_without_a_key_keep_their_partition_s_order"],
    ),
    Mutant(
        "failed-delivery-is-not-finished",
        "A delivery that fails for a reason of ours ends the run, and nothing behind it is committed",
        "it counts as finished",
        "I5: every published event is processed",
        [Edit(CONSUMER, "            if error is not None:", "            if False:")],
        ["integration/test_consumer.py::test_an_error_of_ours_ends_the_run_and_commits_nothing_behind_it"],
    ),
    Mutant(
        "order-of-a-key",
        "Deliveries of one key wait for each other",
        "they run side by side",
        "order within an aggregate",
        [Edit("orderflow/engine/scheduler.py", "        if key not in self._waiting:", "        if True:")],
        ["integration/test_consumer.py::test_order_within_a_key_and_no_waiting_for_other_keys"],
    ),
    Mutant(
        "backpressure",
        "A partition that has its part of what may be in flight is paused",
        "it is read on",
        "memory flat",
        [Edit(CONSUMER, "        if watermark.in_flight >= room:", "        if False:")],
        ["integration/test_consumer.py::test_a_full_partition_is_paused_and_the_others_are_not"],
    ),
    Mutant(
        "backpressure-of-offsets",
        "A partition with many offsets behind an unfinished one is paused",
        "they are not counted",
        "memory flat",
        [Edit(CONSUMER, ", HELD * self._share - watermark.held)", ", HELD * self._share)")],
        ["integration/test_consumer.py::test_what_is_finished_behind_a_slow_head_holds_up_nobody_until_there_is_much_of_it"],
    ),
    Mutant(
        "drain",
        "A stop waits for the payments in flight",
        "it does not wait",
        "SIGTERM loses no payment, and repeats none",
        [Edit(CONSUMER, "            await self._scheduler.drain(self._drain_timeout)", "            pass")],
        ["e2e/test_roles.py::test_a_stop_finishes_the_payments_in_flight"],
    ),
    Mutant(
        "poison-is-buried",
        "A record that cannot be read is buried",
        "it ends the run",
        "I5: poison stops no partition",
        [
            Edit(
                EXECUTOR,
                "            self._run(self._bury_undecodable(record, error), finished)",
                "            asyncio.get_running_loop().call_soon(finished, error)",
            )
        ],
        ["integration/test_consumer.py::test_poison_is_buried_and_its_partition_goes_on"],
        error="Undecodable",
    ),
    Mutant(
        "unreadable-row-is-its-own",
        "A row of the outbox that no worker can read is buried as that event",
        "as a stranger's",
        "I5: nothing is published again by every turn of the janitor",
        [
            Edit(
                EXECUTOR,
                "own = await ENDLESS.run(lambda: processed.source_of(self._database, record.value, record.headers))",
                "own = None",
            )
        ],
        ["integration/test_executor.py::test_an_outbox_row_that_no_worker_can_read_is_buried_as_that_event"],
    ),
    Mutant(
        "broken-copy",
        "A broken copy of an event does not bury the event",
        "the bytes are not compared",
        "I5: every event is processed",
        [Edit(PROCESSED, "message is not None and message.encode()[1] == value else", "message is not None else")],
        ["integration/test_executor.py::test_a_broken_copy_of_a_good_event_does_not_bury_the_event"],
    ),
    Mutant(
        "forged-type",
        "A record that borrows another event's id is buried as a stranger's",
        "it passes for that event",
        "I5: every event is processed",
        [
            Edit(
                EXECUTOR,
                "elif known.event_type != message.type or known.aggregate_id != message.aggregate_id:",
                "elif False:",
            )
        ],
        [FORGED_ID],
    ),
    Mutant(
        "recorded-as-what-it-is",
        "An event is recorded as processed only as what its row tells of",
        "the type is not compared",
        "I5: every event is processed",
        [
            Edit(
                PROCESSED,
                "ON o.event_id = t.event_id AND o.event_type = t.event_type AND o.aggregate_id = t.aggregate_id",
                "ON o.event_id = t.event_id AND o.aggregate_id = t.aggregate_id",
            )
        ],
        [FORGED_ID],
    ),
    Mutant(
        "processed-or-buried",
        "What lies buried is not recorded as processed",
        "dead letters are not looked at",
        "I5: processed or dead-lettered, not both",
        [Edit(PROCESSED, "WHERE d.event_id IS NULL{exists}", "WHERE true{exists}")],
        ["integration/test_executor.py::test_a_buried_event_that_nobody_handles_stays_buried_too"],
    ),
    Mutant(
        "processed-row",
        "An event that is processed is not handled again",
        "the row is not asked",
        "I5: every event is processed once",
        [Edit(PROCESSED, "return not self.processed and not self.buried and", "return not self.buried and")],
        ["integration/test_executor.py::test_a_handled_event_that_is_delivered_again_is_not_handled_again"],
    ),
    Mutant(
        "buried-row",
        "An event that lies buried is not handled",
        "the dead letter is not asked",
        "I5: a buried event comes back by a redrive only",
        [Edit(PROCESSED, "return not self.processed and not self.buried and", "return not self.processed and")],
        ["integration/test_executor.py::test_a_buried_event_that_is_delivered_again_stays_buried"],
    ),
    Mutant(
        "attempt-guard",
        "A delivery of an older attempt than the row's is a duplicate",
        "attempts are not compared",
        "a retry is counted once; what is on its way from before a redrive decides nothing",
        [Edit(PROCESSED, "not self.buried and attempt >= self.attempt", "not self.buried")],
        ["integration/test_redrive.py::test_a_technically_failed_order_is_taken_back_and_paid"],
    ),
    Mutant(
        "retry-counted-once",
        "Of two deliveries of one attempt that fail, one counts",
        "both count",
        "three attempts",
        [Edit(OUTBOX, "o.event_id = r.event_id AND o.attempt = r.attempt AND", "o.event_id = r.event_id AND")],
        [TWO_OF_ONE_ATTEMPT],
    ),
    Mutant(
        "retry-counted-durably",
        "A failed attempt is counted on the row",
        "the row stays at its attempt",
        "a crash loses no attempt: the third failure is the last",
        [Edit(OUTBOX, "attempt = o.attempt + 1,", "attempt = o.attempt,")],
        [TWO_OF_ONE_ATTEMPT],
    ),
    Mutant(
        "late-failure",
        "A failure that comes late digs up nothing that lies buried",
        "it makes the row due",
        "I5: processed or dead-lettered, not both",
        [Edit(OUTBOX, "AND o.attempt = r.attempt AND o.available_at IS DISTINCT FROM 'infinity'", "AND o.attempt = r.attempt")],
        ["integration/test_outbox.py::test_a_late_failure_does_not_dig_up_what_lies_buried"],
    ),
    Mutant(
        "bury-the-attempt-that-failed",
        "A burial counts for the attempt that failed",
        "for any attempt",
        "I5: what another delivery tries again is not buried",
        [Edit(DEAD_LETTERS, "WHERE event_id = $1 AND attempt = $2 AND", "WHERE event_id = $1 AND $2::integer > 0 AND")],
        [SETTLED_OR_MOVED],
    ),
    Mutant(
        "bury-nothing-processed",
        "What is processed is not buried",
        "processed_events is not asked",
        "I5: processed or dead-lettered, not both",
        [Edit(DEAD_LETTERS, "  AND NOT EXISTS (SELECT FROM processed_events p WHERE p.event_id = $1)\n", "")],
        [SETTLED_OR_MOVED],
    ),
    Mutant(
        "third-failure-is-the-last",
        "The third failure is the last",
        "it is tried without an end",
        "after the third failure the event is dead-lettered",
        [Edit(RETRY, "if failures >= self.max_attempts and not isinstance(error, OutcomeUnknown):", "if False:")],
        ["integration/test_payments.py::test_three_errors"],
    ),
    Mutant(
        "unknown-is-never-given-up",
        "An outcome that is unknown is never given up",
        "given up after three attempts",
        "never FAILED with a charge behind it",
        [Edit(RETRY, " and not isinstance(error, OutcomeUnknown):", ":")],
        ["unit/test_retry.py::test_decisions"],
    ),
    Mutant(
        "outages-are-waited-out",
        "A settlement waits for a database that is away",
        "it fails at once",
        "an outage uses up no attempt",
        [
            Edit(
                "orderflow/payments/handlers.py",
                "self._settle_group, size=batch, in_flight=in_flight, patience=ENDLESS",
                "self._settle_group, size=batch, in_flight=in_flight",
            )
        ],
        ["integration/test_executor.py::test_the_server_is_killed_while_a_charge_is_under_way"],
    ),
)
