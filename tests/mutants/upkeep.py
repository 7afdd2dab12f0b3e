"""Safeguards that bring back what was lost all the same: the janitor, and whoever starts again what has crashed."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Edit, Mutant

JANITOR: Final = "orderflow/engine/janitor.py"

MUTANTS: Final = (
    Mutant(
        "lost-is-published-again",
        "The janitor publishes again what Kafka or a worker has lost",
        "it only looks",
        "I5, I6: every event is processed, every order ends",
        [
            Edit(
                JANITOR,
                "return len(await connection.fetch(_REPUBLISH, lost, self._horizon, self._consumed))",
                "return 0",
            )
        ],
        ["integration/test_janitor.py::test_only_what_is_lost_and_only_once_a_horizon"],
    ),
    Mutant(
        "time-to-settle",
        "The janitor leaves an event a horizon's time after each publication",
        "it publishes it again at every turn",
        "what is merely under way is not published again",
        [
            Edit(JANITOR, "AND published_at < now() - $2::interval AND", "AND published_at < now() + $2::interval AND"),
            Edit(JANITOR, "least(now(), $3) - $2::interval AND", "least(now(), $3) + $2::interval AND"),
        ],
        ["integration/test_janitor.py::test_only_what_is_lost_and_only_once_a_horizon"],
    ),
    Mutant(
        "waiting-is-not-lost",
        "The janitor leaves alone what still waits in Kafka for its consumer",
        "it publishes all of it again",
        "a backlog does not grow by itself",
        [Edit(JANITOR, "least(now(), $3) - $2::interval AND", "greatest(now(), $3) - $2::interval AND")],
        ["integration/test_janitor.py::test_what_still_waits_in_kafka_is_not_lost"],
    ),
    Mutant(
        "unsettled-is-watched",
        "What is not settled when its time comes is watched until it is",
        "it is looked at once",
        "I6: a retry that is lost is found",
        [Edit(JANITOR, "        self._watched.update(unsettled[: MOST_WATCHED - len(self._watched)])\n", "")],
        ["integration/test_janitor.py::test_what_waited_for_a_retry_when_its_time_came_is_watched"],
    ),
    Mutant(
        "patrol",
        "A patrol goes round the whole table",
        "it does not",
        "I6: an old event that came back by a redrive is looked after",
        [Edit(JANITOR, "            found += await self._patrol(database)\n", "")],
        ["integration/test_janitor.py::test_an_old_event_that_comes_back_by_a_redrive_is_still_looked_after"],
    ),
    Mutant(
        "position-behind-the-commit",
        "The janitor moves on once a page is committed",
        "it moves on before",
        "I6: what a lost connection has undone is found again",
        [
            Edit(
                JANITOR,
                "            count = await self._publish_again(connection, unsettled)\n        # Behind",
                '            positions.update({row["shard"]: row["reached"] for row in rows})\n'
                "            count = await self._publish_again(connection, unsettled)\n        # Behind",
            )
        ],
        ["integration/test_janitor.py::test_a_turn_that_fails_has_not_worked_in_vain_and_skips_nothing"],
    ),
    Mutant(
        "one-janitor",
        "One janitor works at a time",
        "all of them do",
        "an event is published again once",
        [Edit(JANITOR, "        if not await connection.fetchval(", "        if None is await connection.fetchval(")],
        ["integration/test_janitor.py::test_one_janitor_at_a_time"],
    ),
    Mutant(
        "crashed-role-starts-again",
        "A role that crashes is started again, and no other with it",
        "it ends",
        "no process is restarted by hand",
        [
            Edit(
                "orderflow/supervisor.py",
                "            if await self._stopped_within(restart_delay(failures)):\n                return\n",
                "            return\n",
            )
        ],
        ["unit/test_supervisor.py::test_a_crash_restarts_its_own_role_only"],
    ),
    Mutant(
        "killed-process-starts-again",
        "A process that is killed is started again",
        "it stays away",
        "no process is restarted by hand",
        [
            Edit(
                "orderflow/processes.py",
                "                await within(self._stopping.wait(), restart_delay(failures))",
                "                await self._stopping.wait()",
            )
        ],
        ["e2e/test_processes.py::test_a_killed_child_is_started_again_and_the_others_stay"],
    ),
)
