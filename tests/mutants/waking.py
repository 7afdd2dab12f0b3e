"""Safeguards of the wake-up: no commit is slept over, and the connection that hears of them is replaced when it is lost."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Edit, Mutant

RELAY: Final = "orderflow/engine/relay.py"
WAKE: Final = "orderflow/engine/wake.py"

MUTANTS: Final = (
    Mutant(
        "poll",
        "A poll finds what no notification told of",
        "none for an hour",
        "a lost NOTIFY costs a second",
        [Edit(RELAY, "seconds = self._poll if due_in is None", "seconds = 3600.0 if due_in is None")],
        ["integration/test_relay.py::test_a_lost_notification_is_found_by_the_poll"],
    ),
    Mutant(
        "commit-during-a-round",
        "What is committed while a relay looks is not slept over",
        "the wake-up is cleared after the look",
        "a row is published within 50 ms",
        [
            Edit(RELAY, "            self._woken.clear()\n", ""),
            Edit(
                RELAY,
                "            published = await self.run_once(database, shards.owned, producer)\n",
                "            published = await self.run_once(database, shards.owned, producer)\n"
                "            self._woken.clear()\n",
            ),
        ],
        ["integration/test_handoff.py::test_what_is_committed_during_a_round_is_not_slept_over"],
    ),
    Mutant(
        "heartbeat",
        "The LISTEN connection is asked for a sign of life",
        "it is trusted",
        "a half-open LISTEN connection is replaced within 5 s",
        [Edit(WAKE, 'await connection.execute("SELECT 1", timeout=self._heartbeat)', "pass")],
        ["integration/test_wake.py::test_the_server_is_frozen_and_the_heartbeat_finds_out"],
    ),
    Mutant(
        "look-after-a-reconnect",
        "After the LISTEN connection was lost, the relay looks",
        "it waits for the next notification",
        "what was notified while nobody listened is not waited for",
        [
            Edit(
                WAKE,
                "found by looking.\n            self._event.set()",
                "found by looking.",
            ),
            Edit(WAKE, "            self.listening.set()\n            self._event.set()", "            self.listening.set()"),
        ],
        ["integration/test_wake.py::test_its_connection_is_ended_and_it_comes_back_and_says_look"],
    ),
    Mutant(
        "pause-begins-anew",
        "A LISTEN connection that listened has made up for the failures before it",
        "the pause before the next grows with every loss",
        "a half-open LISTEN connection is replaced within 5 s",
        [Edit(WAKE, "            self._pause = self._first_pause\n", "")],
        ["integration/test_wake.py::test_lost_again_and_again_it_comes_back_as_fast_as_after_the_first_time"],
    ),
)
