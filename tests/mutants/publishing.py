"""Safeguards between the outbox and Kafka: nothing is lost on the way, nothing is marked too early, order is kept."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Edit, Mutant

OUTBOX: Final = "orderflow/engine/outbox.py"
RELAY: Final = "orderflow/engine/relay.py"
PUBLISHING: Final = "orderflow/engine/publishing.py"
LOW_WATER: Final = "orderflow/engine/low_water.py"
SHARDS: Final = "orderflow/engine/shards.py"
KAFKA: Final = "orderflow/engine/kafka.py"
METADATA: Final = "orderflow/engine/metadata.py"
KILLED_BROKER: Final = "integration/test_relay.py::test_nothing_is_marked_before_kafka_has_it_and_nothing_is_lost_when_it_dies"
DIVIDED: Final = "integration/test_message_limit.py::test_a_batch_above_a_limit_that_was_lowered_is_divided_and_keeps_its_order"

MUTANTS: Final = (
    Mutant(
        "acknowledged-before-marked",
        "A row is marked after Kafka's acknowledgement",
        "marked before it is sent",
        "I4: published means that Kafka has it",
        [
            Edit(
                RELAY,
                "        results, stuck = await Publishing(",
                "        await outbox.mark_published_if_attempt(connection, due)\n        results, stuck = await Publishing(",
            )
        ],
        [KILLED_BROKER],
    ),
    Mutant(
        "silence-is-no-acknowledgement",
        "What was not acknowledged in time counts as lost",
        "counts as acknowledged",
        "I4: published means that Kafka has it",
        [Edit(PUBLISHING, '[TimeoutError("no acknowledgement in time")] * len(due)', "[None] * len(due)")],
        [KILLED_BROKER],
    ),
    Mutant(
        "sends-are-bounded",
        "A round waits for its acknowledgements for a bounded time",
        "without an end",
        "I4: a broker that dies stops no relay",
        [
            Edit(
                PUBLISHING,
                "            async with asyncio.timeout(self._kafka.timeout):\n                partitions =",
                "            async with asyncio.timeout(None):\n                partitions =",
            )
        ],
        [KILLED_BROKER],
    ),
    Mutant(
        "nothing-behind-a-lost-one",
        "Of an aggregate, nothing is marked behind an event that was lost",
        "what was acknowledged is marked",
        "order within an aggregate",
        [Edit(RELAY, "        elif message.aggregate_id not in held:", "        else:")],
        ["unit/test_rounds.py::test_what_follows_a_lost_event_of_its_aggregate_is_sent_again_with_it"],
    ),
    Mutant(
        "mark-of-the-attempt-sent",
        "A mark counts for the attempt that was sent",
        "for any attempt",
        "I4: a retry that is scheduled meanwhile is not lost",
        [
            Edit(
                OUTBOX,
                "WHERE event_id = ANY($1::uuid[]) AND attempt = $2 AND published_at IS NULL",
                "WHERE event_id = ANY($1::uuid[]) AND $2::integer > 0 AND published_at IS NULL",
            )
        ],
        ["integration/test_outbox.py::test_a_mark_clears_no_retry_that_was_scheduled_meanwhile"],
    ),
    Mutant(
        "mark-of-each-attempt-sent",
        "The same in a round of different attempts",
        "for any attempt",
        "I4: a retry that is scheduled meanwhile is not lost",
        [
            Edit(
                OUTBOX,
                "WHERE o.event_id = m.event_id AND o.attempt = m.attempt AND o.published_at IS NULL",
                "WHERE o.event_id = m.event_id AND o.published_at IS NULL",
            )
        ],
        ["integration/test_outbox.py::test_a_mark_of_different_attempts_clears_no_retry_either"],
    ),
    Mutant(
        "all-replicas-acknowledge",
        "A record is acknowledged when all in-sync replicas have it",
        "`acks=1`, and no idempotence",
        "I5: what Kafka has acknowledged survives a broker",
        [Edit(KAFKA, 'acks="all", enable_idempotence=True,', "acks=1, enable_idempotence=False,")],
        ["integration/test_relay.py::test_every_replica_in_sync_has_to_acknowledge"],
    ),
    Mutant(
        "idempotent-producer",
        "The broker tells a batch that is sent again from a new one",
        "idempotence off",
        "order within an aggregate, also when an acknowledgement is lost",
        [Edit(KAFKA, "enable_idempotence=True", "enable_idempotence=False")],
        ["integration/test_relay.py::test_every_batch_carries_its_producer_s_id"],
    ),
    Mutant(
        "one-aggregate-one-partition",
        "All events of an aggregate go to one partition",
        "they are dealt out in turn",
        "order within an aggregate",
        [Edit(PUBLISHING, "partition = _partition_of(key, partitions)", "partition = place % partitions")],
        ["integration/test_relay.py::test_order_within_each_aggregate_over_rounds_restarts_and_relays"],
    ),
    Mutant(
        "shard-lock",
        "A shard is published by the relay that holds its lock",
        "whoever wants it owns it",
        "order within an aggregate",
        [Edit(SHARDS, "WHERE pg_try_advisory_lock($1, shard) LIMIT $3", "WHERE $1::integer > 0 LIMIT $3")],
        ["integration/test_shards.py::test_never_owned_twice_while_many_balance_at_once"],
    ),
    Mutant(
        "shards-end-with-their-session",
        "A relay whose session has ended owns nothing",
        "it goes on with what it had",
        "order within an aggregate",
        [
            Edit(
                SHARDS,
                "        if self._connection is None or self._connection.is_closed():\n            return ()",
                "        if self._connection is None:\n            return ()",
            )
        ],
        ["integration/test_shards.py::test_a_killed_session_owns_nothing_from_that_moment_and_is_taken_over"],
    ),
    Mutant(
        "handed-over-to-the-owner",
        "What is handed over is published only by the owner of all shards",
        "by every relay that waits",
        "order within an aggregate",
        [Edit("orderflow/engine/handoff.py", "        self._wanted = everything", "        self._wanted = True")],
        ["integration/test_handoff.py::test_a_relay_of_some_shards_is_handed_nothing_and_is_woken"],
    ),
    Mutant(
        "owner-still-when-woken",
        "A relay asks again what it owns before it publishes what it was handed",
        "it does not ask",
        "order within an aggregate",
        [Edit(RELAY, "if handed and len(shards.owned) == outbox.SHARDS:", "if handed:")],
        ["integration/test_handoff.py::test_a_relay_that_lost_its_shards_in_its_sleep_publishes_nothing_that_it_is_handed"],
    ),
    Mutant(
        "handoff-bound",
        "What is handed over is bounded",
        "no limit",
        "memory flat",
        [Edit("orderflow/engine/handoff.py", "if self._wanted and len(self._messages) < MOST:", "if self._wanted:")],
        ["integration/test_handoff.py::test_a_relay_at_work_is_handed_nothing_and_no_list_grows_without_a_bound"],
    ),
    Mutant(
        "low-water-fence",
        "The low-water mark waits for the writers at work",
        "it does not wait",
        "I4: a row that commits late is published",
        [Edit(LOW_WATER, "        if not fence.writers & writers:", "        if True:")],
        ["integration/test_low_water.py::test_a_row_that_commits_after_its_successors_is_found_and_holds_the_saved_mark"],
    ),
    Mutant(
        "long-writers-watched",
        "When a writer ends that was not waited for, the round begins where the mark was before it",
        "its end is not noticed",
        "I4: a row that commits late is published",
        [Edit(LOW_WATER, "if self._apart and not self._apart <= await _writers(connection):", "if False:")],
        ["integration/test_low_water.py::test_one_of_two_that_are_set_apart_ends"],
    ),
    Mutant(
        "mark-behind-a-part",
        "Of a shard that may hold more, the mark passes what was fetched",
        "it passes the rest as well",
        "I4: every row is published",
        [
            Edit(
                LOW_WATER,
                "passed = min(self._settled, due.reached.get(shard, 0)) if shard in due.full else self._settled",
                "passed = self._settled",
            )
        ],
        ["integration/test_low_water.py::test_a_shard_of_which_only_a_part_was_fetched_keeps_its_mark_behind_the_rest"],
    ),
    Mutant(
        "numbers-begin-anew",
        "After a TRUNCATE the marks begin anew with the numbers",
        "they stay",
        "I4: every row is published",
        [Edit(LOW_WATER, "        if last < max(self._mark.values(), default=0):", "        if False:")],
        ["integration/test_low_water.py::test_numbers_that_begin_anew"],
    ),
    Mutant(
        "unpublishable-is-buried",
        "A row that no broker takes is buried, and the rest goes on",
        "it is tried again",
        "I4, I5: one row does not stop its shard",
        [Edit(RELAY, "        if isinstance(error, UNPUBLISHABLE):", "        if False:")],
        ["integration/test_relay.py::test_an_unpublishable_row_is_buried_and_the_rest_goes_on"],
        error="DependencyUnavailable",
    ),
    Mutant(
        "guilty-one-found",
        "Of a batch that the broker refuses, the guilty record is found",
        "the whole batch is tried again",
        "I4: one row does not stop its shard",
        [Edit(PUBLISHING, "            await self._find_guilty(due, refused, results)", "            pass")],
        ["integration/test_relay.py::test_a_limit_of_the_broker_s_own_finds_the_guilty_row_only"],
    ),
    Mutant(
        "nothing-behind-a-refused-batch",
        "Behind a batch that was refused, nothing is sent to its partition",
        "the next batch is sent",
        "order within an aggregate",
        [Edit(PUBLISHING, "if batch.partition in before and await _failed(before[batch.partition]):", "if False:")],
        [DIVIDED],
    ),
    Mutant(
        "topic-as-configured",
        "Whoever looks for a topic that has vanished does not make it",
        "it is made by being looked for, as the broker likes",
        "a lost topic comes back with its partitions, and every worker with its share",
        [Edit(METADATA, "MetadataRequest(topics, _may_create.get())", "MetadataRequest(topics, True)")],
        ["integration/test_vanished_topic.py::test_it_is_made_anew_with_all_its_partitions"],
    ),
    Mutant(
        "limit-of-the-topic",
        "Batches are no larger than the topic takes them",
        "they are as large as by default",
        "I4: a backlog is published without a refusal at each round",
        [Edit(RELAY, "self._kafka.producer(await self._kafka.largest_batch())", "self._kafka.producer()")],
        [DIVIDED],
    ),
    Mutant(
        "replay-that-cannot-be-published",
        "A processed event that cannot be published any more is withdrawn",
        "it stays due",
        "I4: one row does not keep a relay busy for ever",
        [Edit(RELAY, "                await outbox.withdraw_if_processed(connection, message)", "                pass")],
        ["integration/test_relay.py::test_a_replay_that_can_no_longer_be_published_does_not_spin"],
    ),
    Mutant(
        "replay-leaves-the-buried",
        "A replay leaves buried rows where they are",
        "it publishes them",
        "I5: a buried event comes back by a redrive only",
        [
            Edit(
                OUTBOX,
                "WHERE event_id = ANY($1::uuid[]) AND available_at IS DISTINCT FROM 'infinity'\nRETURNING event_id",
                "WHERE event_id = ANY($1::uuid[])\nRETURNING event_id",
            )
        ],
        ["integration/test_outbox.py::test_replay_makes_rows_due_as_the_attempt_they_are_at_and_leaves_buried_ones"],
    ),
)
