"""Safeguards of placing an order: durable before it is answered, once for its key, and nothing after an error."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Edit, Mutant

SERVICE: Final = "orderflow/orders/service.py"
STORE: Final = "orderflow/orders/store.py"
BATCHER: Final = "orderflow/engine/batcher.py"

MUTANTS: Final = (
    Mutant(
        "durable-before-201",
        "The answer comes after the commit",
        "the order is answered at once and committed in the background",
        "I7: every 201 is an order",
        [
            Edit(
                SERVICE,
                "                result = await self._limit.run(self._batcher.submit(attempt))",
                "                self.early = asyncio.ensure_future(self._batcher.submit(attempt))\n"
                '                now = (clock := __import__("datetime")).datetime.now(clock.UTC)\n'
                "                result = Placed(attempt.order.order_id, user_id, amount, now)",
            )
        ],
        ["integration/test_http_faults.py::test_no_answer_comes_before_the_commit"],
    ),
    Mutant(
        "order-with-its-event",
        "An order and its event are one statement",
        "two statements, the order's first",
        "I1: every order has its OrderCreated",
        [
            Edit(
                STORE,
                "            now = await connection.fetchval(_PLACE, *columns)",
                "            now = await connection.fetchval(\n"
                '                "INSERT INTO orders (id, user_id, amount)"\n'
                '                " SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::numeric[]) RETURNING now()",\n'
                "                *columns[:3])\n"
                "            await connection.fetch(\n"
                '                "INSERT INTO outbox (event_id, event_type, aggregate_id)"\n'
                "                \" SELECT e, 'OrderCreated', o FROM unnest($1::uuid[], $2::uuid[]) AS t(e, o)\",\n"
                "                columns[3], columns[0])",
            )
        ],
        ["integration/test_store.py::test_an_order_whose_event_cannot_be_written_is_not_placed"],
    ),
    Mutant(
        "same-ids-when-sent-again",
        "After a lost connection an order is sent again under the ids it had",
        "new ids at each try",
        "I7, and one order for one request",
        [
            Edit(
                SERVICE,
                "            orders = [attempt.order for attempt in group]",
                "            orders = [\n"
                "                NewOrder(new_id(), new_id(), o.user_id, o.amount, o.key, o.request_hash, o.headers)\n"
                "                for o in (attempt.order for attempt in group)\n"
                "            ]",
            )
        ],
        ["integration/test_http_faults.py::test_a_commit_whose_answer_was_lost_is_not_repeated"],
    ),
    Mutant(
        "placed-already-is-placed",
        "Rows that the first try has committed are no error of the second",
        "`ON CONFLICT (event_id) DO NOTHING` left out",
        "I7: an error means no order",
        [Edit(STORE, "    FROM accepted\n    ON CONFLICT (event_id) DO NOTHING)", "    FROM accepted)")],
        ["integration/test_http_faults.py::test_a_commit_whose_answer_was_lost_is_not_repeated"],
    ),
    Mutant(
        "unknown-commit-is-told",
        "A commit of unknown outcome is answered with the order's id",
        "answered as if nothing was placed",
        "an error means no order, or says that there may be one",
        [Edit(SERVICE, "attempt.order.order_id if attempt.sent or attempt.unknown else None", "None")],
        ["integration/test_http_faults.py::test_a_commit_of_unknown_outcome_says_so_and_names_the_order"],
    ),
    Mutant(
        "given-up-in-the-queue",
        "What still queues when its caller is told of an error is never written",
        "written all the same",
        "an error means no order",
        [
            Edit(
                BATCHER, "if not future.done():\n                    group.append", "if True:\n                    group.append"
            )
        ],
        ["integration/test_http_faults.py::test_an_order_that_only_queued_when_its_time_was_over_is_not_placed"],
    ),
    Mutant(
        "one-order-a-key",
        "Only the request that claims the Idempotency-Key places its order",
        "the claim is not asked for",
        "the same key and body give the first answer again",
        [Edit(STORE, "WHERE key IS NULL OR order_id IN (SELECT order_id FROM claimed)", "WHERE true")],
        ["integration/test_store.py::test_a_key_gives_the_first_order_again_and_refuses_another_body"],
    ),
    Mutant(
        "a-key-lives-a-day",
        "A claimed key is another's only after 24 hours",
        "it is anybody's at once",
        "keys live 24 h",
        [Edit(STORE, "WHERE k.created_at < now() - interval '24 hours'", "WHERE true")],
        ["integration/test_http_idempotency.py::test_a_key_lives_for_a_day"],
    ),
    Mutant(
        "key-with-its-body",
        "A key is compared with the body that it came with",
        "the hash is not compared",
        "the same key and another body is 422",
        [Edit(STORE, 'if row["request_hash"] is not None and row["request_hash"] != order.request_hash:', "if False:")],
        ["integration/test_http_idempotency.py::test_two_services_with_different_bodies_place_one_of_them"],
    ),
    Mutant(
        "key-in-work",
        "A key that is in work is refused at once",
        "it waits for its turn",
        "the same key still in work is 409",
        [
            Edit(
                SERVICE,
                "            return KeyInProgress()\n        self._keys_in_work.add(key)",
                "            pass\n        self._keys_in_work.add(key)",
            )
        ],
        ["integration/test_http_idempotency.py::test_a_key_in_work_is_refused_at_once"],
    ),
    Mutant(
        "queue-bound",
        "The queue for the commit is bounded",
        "no limit",
        "429 under overload, memory flat",
        [Edit(BATCHER, "if len(self._queue) >= self._limit:", "if False:")],
        ["unit/test_batcher.py::test_a_full_queue_refuses_and_keeps_what_it_has"],
    ),
    Mutant(
        "bad-row-alone",
        "A group that fails is halved until the guilty one is alone",
        "all of the group get its error",
        "nobody's order fails for another's",
        [Edit(BATCHER, "if len(group) == 1 or is_transient(error) or isinstance(error, WrongCount):", "if True:")],
        ["integration/test_store.py::test_a_bad_row_is_seen_by_its_own_caller_only"],
    ),
    Mutant(
        "request-under-way",
        "A stop waits for the requests under way",
        "they are cut off",
        "a drain loses no request",
        [
            Edit(
                "orderflow/orders/http.py",
                "drain_seconds = max(0.2, settings.grace_seconds - RESERVED_SECONDS)",
                "drain_seconds = 0.0002",
            )
        ],
        ["integration/test_http.py::test_a_stop_finishes_what_is_in_work_and_takes_no_more"],
    ),
    Mutant(
        "pool-after-failover",
        "A pool leaves its connections to what has become read-only",
        "it keeps them",
        "after a failover no process is restarted by hand",
        [
            Edit(
                "orderflow/engine/postgres.py",
                "                await self.pool.expire_connections()\n                raise",
                "                raise",
            )
        ],
        ["integration/test_pool.py::test_connections_that_were_made_to_a_standby_are_left"],
    ),
)
