"""Safeguards that stand in schema.sql: they hold against every program that writes these tables."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Edit, Mutant

SCHEMA: Final = "schema.sql"

MUTANTS: Final = (
    Mutant(
        "legal-transition",
        "The database refuses a transition that is none",
        "the trigger never fires",
        "I2; no jump from CREATED to PAID",
        [Edit(SCHEMA, "WHEN (NOT (\n", "WHEN (false AND NOT (\n")],
        ["integration/test_schema.py::test_the_jump_to_paid_is_refused_with_a_hint"],
    ),
    Mutant(
        "version-by-one",
        "The database lets a version rise by one with each transition",
        "by any number",
        "I2: state, version and events fit together",
        [Edit(SCHEMA, "OR (NEW.version = OLD.version + 1 AND (", "OR (NEW.version > OLD.version AND (")],
        ["integration/test_schema.py::test_every_transition_is_legal_here_and_in_the_model_or_in_neither"],
    ),
    Mutant(
        "declined-is-final",
        "The database takes no declined order back",
        "any FAILED order may go back",
        "a declined order is never redriven",
        [Edit(SCHEMA, "OLD.failure IS NOT DISTINCT FROM 'error' AND ", "")],
        ["integration/test_schema.py::test_a_declined_order_never_goes_back"],
    ),
    Mutant(
        "schedule-what-is-due-again",
        "Whoever makes a row unpublished again, schedules it",
        "the trigger never fires",
        "I4: every row is published, also behind the low-water mark",
        [Edit(SCHEMA, "WHEN (NEW.published_at IS NULL AND NEW.available_at IS NULL AND (", "WHEN (false AND (")],
        ["integration/test_low_water.py::test_whatever_plain_sql_makes_due_again_is_found_behind_the_mark"],
    ),
    Mutant(
        "numbers-without-a-cache",
        "A number is handed out while its writer holds the table, and never before",
        "sessions keep 50 numbers for themselves",
        "I4: no row comes to lie behind the low-water mark",
        [Edit(SCHEMA, "bigint      GENERATED ALWAYS AS IDENTITY,", "bigint GENERATED ALWAYS AS IDENTITY (CACHE 50),")],
        ["integration/test_low_water.py::test_a_session_that_wrote_before_writes_behind_no_mark"],
    ),
    Mutant(
        "a-time-everybody-has",
        "A row's time is one that Python and JSON have",
        "any time of PostgreSQL's calendar",
        "I4: one row does not stop every relay",
        [Edit(SCHEMA, "CHECK (created_at >= '0001-01-02' AND created_at < '9999-12-31')", "CHECK (true)")],
        ["integration/test_relay.py::test_times_beyond_the_calendar_do_not_stop_the_relay"],
    ),
    Mutant(
        "notify-after-commit",
        "Every commit of an event notifies, whoever writes it",
        "the trigger says nothing",
        "a row of another program is published within 50 ms",
        [Edit(SCHEMA, "    PERFORM pg_notify('orderflow_outbox', '');", "    PERFORM 1;")],
        ["integration/test_schema.py::test_a_statement_of_many_rows_notifies_once"],
    ),
)
