"""The commands against a real database, run as a person runs them: what they print, what they change, how they end."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import asyncpg
import orjson
import pytest
from click.testing import CliRunner, Result

from orderflow.audit import audit
from orderflow.cli import cli
from orderflow.commands import demo
from orderflow.commands.checks import backlog
from orderflow.commands.checks import kafka as kafka_checks
from orderflow.commands.checks import postgres as postgres_checks
from orderflow.commands.walkthrough import Missed
from orderflow.commands.walkthrough.parts import Part
from orderflow.commands.walkthrough.programs import Log
from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine.kafka import Kafka
from orderflow.explain import Unknown, story
from orderflow.migrations import VERSION
from orderflow.settings import load
from tests.servers import Broker
from tests.terminals import Terminal

ROOT = Path(__file__).parents[2]
Command = Callable[..., Awaitable[Result]]


@pytest.fixture
def command(database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs `orderflow` with these arguments against the test's database."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.chdir(tmp_path)

    async def run(*arguments: object, **options: Any) -> Result:
        # A command has an event loop of its own, which is not allowed inside of the test's.
        return await asyncio.to_thread(CliRunner().invoke, cli, [str(word) for word in arguments], **options)

    return run


def json_of(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return orjson.loads(result.stdout)


async def placed(
    connection: asyncpg.Connection, state: str = "CREATED", version: int = 1, failure: str | None = None, age: float = 0
) -> tuple[UUID, UUID]:
    """An order with its published OrderCreated event, `age` seconds old: (order id, event id)."""
    order_id, event_id = uuid4(), uuid4()
    await connection.execute(
        """
        WITH times AS (SELECT now() - make_interval(secs => $5) AS t)
        INSERT INTO orders (id, user_id, state, version, amount, failure, created_at, updated_at, entered_at)
        SELECT $1, gen_random_uuid(), $2, $3, 299.99, $4, t, t + make_interval(secs => $3 - 1),
               ARRAY(SELECT t + make_interval(secs => v) FROM generate_series(0, $3 - 1) AS v) FROM times
        """,
        order_id, state, version, failure, age,
    )  # fmt: skip
    await connection.execute(
        """
        INSERT INTO outbox (event_id, event_type, aggregate_id, payload, created_at, published_at)
        SELECT $1, 'OrderCreated', id, jsonb_build_object('orderId', id, 'userId', user_id, 'amount', amount::text),
               created_at, created_at + interval '10 ms' FROM orders WHERE id = $2
        """,
        event_id, order_id,
    )  # fmt: skip
    return order_id, event_id


async def buried(connection: asyncpg.Connection, failure: str = "error") -> tuple[UUID, UUID]:
    """A FAILED order whose event is a dead letter after three attempts: (order id, event id)."""
    order_id, event_id = await placed(connection, "FAILED", 3, failure, age=60)
    attempts = [
        {"attempt": n, "at": f"2026-05-01T12:00:0{n}Z", "error": "ChargeFailed", "message": "no \x1b[31mmoney"}
        for n in (1, 2, 3)
    ]
    text = orjson.dumps(attempts).decode()
    await connection.execute(
        "UPDATE outbox SET available_at = 'infinity', attempt = 3, failures = $2 WHERE event_id = $1", event_id, text
    )
    await connection.execute(
        """
        INSERT INTO dead_letter_events (event_id, event_type, aggregate_id, payload, reason, error_class, error_message,
                                        attempts, worker_id, topic, partition, "offset")
        SELECT event_id, event_type, aggregate_id, payload, 'Max retries exceeded (3)', 'ChargeFailed', 'no money', failures,
               'payment-worker-1', 'order-events', 2, 17
        FROM outbox WHERE event_id = $1
        """,
        event_id,
    )
    return order_id, event_id


async def buried_foreign(connection: asyncpg.Connection) -> UUID:
    """A dead letter of a record that is no event of ours."""
    event_id = uuid4()
    await connection.execute(
        "INSERT INTO dead_letter_events (event_id, reason, raw) VALUES ($1, 'not JSON: \x1b[2J', $2)",
        event_id,
        b"\xff\x00{" * 300,
    )
    return event_id


# ------------------------------------------------------------------------------------------------------- migrate


async def test_migrate_says_from_where_to_where(command: Command, connection: asyncpg.Connection) -> None:
    assert f"at version {VERSION} already" in (await command("migrate")).stdout
    assert json_of(await command("migrate", "--json")) == {"before": VERSION, "after": VERSION}
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    assert json_of(await command("migrate", "--json")) == {"before": 0, "after": VERSION}


@pytest.mark.parametrize("arguments", [["orders", "list"], ["audit"], ["dead-letters", "list"], ["gateway", "mode"]])
async def test_a_database_without_the_schema(command: Command, connection: asyncpg.Connection, arguments: list[str]) -> None:
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    result = await command(*arguments)
    assert result.exit_code == 1
    assert result.stderr == "orderflow: the database has no orderflow schema: run `orderflow migrate`\n"


async def test_a_newer_schema_is_refused(command: Command, connection: asyncpg.Connection) -> None:
    await connection.execute("INSERT INTO schema_version VALUES (99)")
    for arguments in (["migrate"], ["orders", "list"]):
        result = await command(*arguments)
        assert result.exit_code == 1
        assert "schema version 99" in result.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("/app_db_that_is_not", "has no database"), ("@127.0.0.1:1/", "cannot be reached")],
)
async def test_a_wrong_address(command: Command, database_url: str, wrong: str, said: str) -> None:
    base = database_url.rpartition("/")[0]
    url = base + wrong if wrong.startswith("/") else f"postgresql://app_user:hunter2{wrong}app_db"
    result = await command("audit", "--database-url", url)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "hunter2" not in result.stderr


# -------------------------------------------------------------------------------------------------------- orders


async def test_orders_are_listed_newest_first_by_state_and_page(command: Command, connection: asyncpg.Connection) -> None:
    ids = [(await placed(connection, age=age))[0] for age in (3, 2, 1)]
    failed, _ = await placed(connection, "FAILED", 3, "declined", age=10)
    found = json_of(await command("orders", "list", "--json"))
    assert [order["id"] for order in found] == [str(i) for i in reversed(ids)] + [str(failed)]
    assert found[0]["amount"] == "299.99"
    assert (found[-1]["state"], found[-1]["failure"]) == ("FAILED", "declined")
    assert [o["id"] for o in json_of(await command("orders", "list", "--json", "--state", "failed"))] == [str(failed)]
    page = json_of(await command("orders", "list", "--json", "--limit", 1, "--after", ids[2]))
    assert [order["id"] for order in page] == [str(ids[1])]
    text = (await command("orders", "list")).stdout
    assert text.splitlines()[0].split()[:4] == ["id", "state", "version", "amount"]
    assert len(text.splitlines()) == 5


async def test_no_orders(command: Command) -> None:
    result = await command("orders", "list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no orders\n")
    assert json_of(await command("orders", "list", "--json")) == []


async def test_an_order_with_its_events(command: Command, connection: asyncpg.Connection) -> None:
    order_id, event_id = await placed(connection)
    found = json_of(await command("orders", "show", order_id, "--json"))
    assert found["id"] == str(order_id)
    assert [event["eventId"] for event in found["events"]] == [str(event_id)]
    assert found["events"][0]["payload"]["orderId"] == str(order_id)
    text = (await command("orders", "show", order_id)).stdout
    assert "state    CREATED" in text
    assert str(event_id) in text


@pytest.mark.parametrize("arguments", [["orders", "show"], ["dead-letters", "show"], ["explain"]])
async def test_an_unknown_id_is_a_failure_in_one_line(command: Command, arguments: list[str]) -> None:
    unknown = uuid4()
    result = await command(*arguments, unknown)
    assert result.exit_code == 1
    assert str(unknown) in result.stderr
    assert result.stderr.count("\n") == 1


async def test_what_comes_from_the_database_cannot_drive_the_terminal(command: Command, connection: asyncpg.Connection) -> None:
    order_id, event_id = await buried(connection)
    foreign = await buried_foreign(connection)
    for arguments in (["dead-letters", "list"], ["dead-letters", "show", foreign], ["dead-letters", "show", event_id],
                      ["explain", order_id], ["orders", "show", order_id]):  # fmt: skip
        result = await command(*arguments)
        assert result.exit_code == 0, result.stderr
        assert "\x1b" not in result.stdout, arguments


# -------------------------------------------------------------------------------------------------- dead letters


async def test_dead_letters_are_listed_and_shown(command: Command, connection: asyncpg.Connection) -> None:
    order_id, event_id = await buried(connection)
    found = json_of(await command("dead-letters", "list", "--json"))
    assert [(letter["eventId"], letter["aggregateId"], letter["reason"]) for letter in found] == [
        (str(event_id), str(order_id), "Max retries exceeded (3)")
    ]
    shown = json_of(await command("dead-letters", "show", event_id, "--json"))
    assert [attempt["attempt"] for attempt in shown["attempts"]] == [1, 2, 3]
    assert (shown["topic"], shown["partition"], shown["offset"]) == ("order-events", 2, 17)
    text = (await command("dead-letters", "show", event_id)).stdout
    assert "order-events, partition 2, offset 17" in text
    assert "ChargeFailed: no money" in text


async def test_a_foreign_record_is_shown_by_its_bytes(command: Command, connection: asyncpg.Connection) -> None:
    foreign = await buried_foreign(connection)
    text = (await command("dead-letters", "show", foreign)).stdout
    assert "... (900 bytes)" in text
    assert orjson.loads((await command("dead-letters", "show", foreign, "--json")).stdout)["raw"].startswith("/wB7")


async def test_a_redrive_brings_event_and_order_back(command: Command, connection: asyncpg.Connection) -> None:
    order_id, event_id = await buried(connection)
    result = await command("dead-letters", "redrive", event_id, event_id)
    assert (result.exit_code, result.stdout) == (0, "1 redriven, 1 orders back to PAYMENT_PENDING\n")
    row = await connection.fetchrow(
        "SELECT published_at, available_at <= now(), attempt FROM outbox WHERE event_id = $1", event_id
    )
    assert tuple(row) == (None, True, 4)
    order = await connection.fetchrow("SELECT state, version FROM orders WHERE id = $1", order_id)
    assert tuple(order) == ("PAYMENT_PENDING", 4)


async def test_what_cannot_be_redriven_does_not_hold_up_the_rest(command: Command, connection: asyncpg.Connection) -> None:
    _, event_id = await buried(connection)
    foreign, unknown = await buried_foreign(connection), uuid4()
    result = await command("dead-letters", "redrive", unknown, foreign, event_id, "--json")
    assert result.exit_code == 1
    found = {entry["eventId"]: entry["done"] for entry in orjson.loads(result.stdout)}
    assert found == {str(unknown): False, str(foreign): False, str(event_id): True}
    assert result.stderr.count("\n") == 2
    assert "discard it" in result.stderr


async def test_redriving_all_leaves_out_what_has_no_outbox_row(command: Command, connection: asyncpg.Connection) -> None:
    for _ in range(3):
        await buried(connection)
    await buried_foreign(connection)
    result = await command("dead-letters", "redrive", "--all")
    assert result.exit_code == 0
    assert result.stdout == "3 redriven, 3 orders back to PAYMENT_PENDING\n"
    assert "1 left out" in result.stderr
    assert await connection.fetchval("SELECT count(*) FROM dead_letter_events") == 1


async def test_a_discarded_dead_letter_is_kept_with_the_reason(command: Command, connection: asyncpg.Connection) -> None:
    _, event_id = await buried(connection)
    result = await command("dead-letters", "discard", event_id, "--reason", " paid by hand ")
    assert (result.exit_code, result.stdout) == (0, "1 discarded\n")
    assert json_of(await command("dead-letters", "list", "--json")) == []
    (kept,) = json_of(await command("dead-letters", "list", "--json", "--discarded"))
    assert kept["discardReason"] == "paid by hand"
    _, another = await buried(connection)
    assert (await command("dead-letters", "discard", another)).exit_code == 0  # nobody at a terminal to be asked
    (kept,) = [
        d for d in json_of(await command("dead-letters", "list", "--json", "--discarded")) if d["eventId"] == str(another)
    ]
    assert kept["discardReason"] == "no reason given"
    for arguments in (["discard", event_id, "--reason", "again"], ["redrive", event_id]):
        result = await command("dead-letters", *arguments)
        assert result.exit_code == 1
        assert str(event_id) in result.stderr


def on_a_terminal(url: str, answer: bytes, *arguments: str) -> tuple[int, str]:
    """Run the program on a pseudo-terminal, type `answer` at its question; its exit code and what it wrote."""
    master, slave = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "orderflow", *arguments], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave,
        env={**os.environ, "DATABASE_URL": url, "COLUMNS": "80", "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    os.write(master, answer)
    written = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        written += chunk
    code = program.wait(30)
    os.close(master)
    return code, written.decode()


@pytest.mark.parametrize(("answer", "code", "left"), [(b"n\n", 1, 2), (b"y\n", 0, 0), (b"\x04", 1, 2)])
async def test_changing_many_asks_on_a_terminal(
    database_url: str, connection: asyncpg.Connection, answer: bytes, code: int, left: int
) -> None:
    for _ in range(2):
        await buried(connection)
    found, text = await asyncio.to_thread(on_a_terminal, database_url, answer, "dead-letters", "redrive", "--all")
    assert "2 dead letters will be redriven. Go ahead?" in text
    assert found == code
    assert ("nothing was changed" in text) == (code == 1)
    assert await connection.fetchval("SELECT count(*) FROM dead_letter_events") == left


async def test_yes_does_not_ask(database_url: str, connection: asyncpg.Connection) -> None:
    for _ in range(2):
        await buried(connection)
    code, text = await asyncio.to_thread(on_a_terminal, database_url, b"", "dead-letters", "redrive", "--all", "--yes")
    assert (code, "Go ahead?" in text) == (0, False)
    assert "2 redriven" in text


async def test_a_terminal_narrower_than_an_id_cuts_nothing_off(database_url: str, connection: asyncpg.Connection) -> None:
    order_id, _ = await placed(connection)
    _, text = await asyncio.to_thread(on_a_terminal, database_url, b"", "orders", "list")
    assert str(order_id) in text
    user = await connection.fetchval("SELECT user_id FROM orders")
    assert str(user) in text


# --------------------------------------------------------------------------------------------------------- replay


async def test_a_replay_makes_rows_due_and_wakes_the_relay(
    command: Command, connection: asyncpg.Connection, database_url: str
) -> None:
    order_id, event_id = await placed(connection)
    await placed(connection)
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener = await asyncpg.connect(database_url)
    try:
        await listener.add_listener("orderflow_outbox", lambda *_: heard.put_nowait("woken"))
        result = await command("events", "replay", "--order", order_id, "--json")
        assert json_of(result) == {"matched": 1, "replayed": 1, "dryRun": False, "types": {"OrderCreated": 1}}
        await asyncio.wait_for(heard.get(), 10)
    finally:
        await listener.close()
    due = await connection.fetch("SELECT event_id, attempt FROM outbox WHERE published_at IS NULL")
    assert [tuple(row) for row in due] == [(event_id, 1)]


async def test_a_dry_run_changes_nothing(command: Command, connection: asyncpg.Connection) -> None:
    await placed(connection)
    await placed(connection, age=7200)
    result = await command("events", "replay", "--since", "1h", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "1 events match; nothing was changed"
    assert await connection.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NULL") == 0


@pytest.mark.parametrize(
    ("filters", "matched"),
    [(["--since", "3h"], 2), (["--since", "3h", "--until", "1h"], 1), (["--type", "OrderPaid"], 0), (["--until", "1d"], 0)],
)
async def test_filters(command: Command, connection: asyncpg.Connection, filters: list[str], matched: int) -> None:
    await placed(connection)
    await placed(connection, age=7200)
    await buried(connection)
    await connection.execute("UPDATE outbox SET created_at = now() - interval '5 h' WHERE available_at = 'infinity'")
    assert json_of(await command("events", "replay", *filters, "--dry-run", "--json"))["matched"] == matched


async def test_dead_letters_are_not_replayed(command: Command, connection: asyncpg.Connection) -> None:
    order_id, _ = await buried(connection)
    assert (await command("events", "replay", "--order", order_id)).stdout == "no event matches\n"


async def test_a_long_replay_goes_in_chunks(
    command: Command, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orderflow.commands.events.CHUNK", 10)
    await connection.execute(
        "INSERT INTO outbox (event_type, aggregate_id, published_at) SELECT 'T', gen_random_uuid(), now()"
        " FROM generate_series(1, 25)"
    )
    assert json_of(await command("events", "replay", "--type", "T", "--json"))["replayed"] == 25


# -------------------------------------------------------------------------------------------------------- gateway


async def test_the_gateways_mode_is_shown_and_switched(command: Command, connection: asyncpg.Connection) -> None:
    assert (await command("gateway", "mode")).stdout.startswith("random: ")
    for mode in ("succeed", "decline", "error", "timeout", "hang", "unavailable", "random"):
        assert (await command("gateway", "mode", mode)).stdout.startswith(f"{mode}: ")
        assert await connection.fetchval("SELECT mode FROM gateway_control") == mode
        assert json_of(await command("gateway", "mode", "--json"))["mode"] == mode


# -------------------------------------------------------------------------------------------------------- explain


async def test_a_story_has_everything_in_its_order(connection: asyncpg.Connection) -> None:
    order_id, event_id = await placed(connection, "PAID", 3, age=60)
    await connection.execute(
        """
        INSERT INTO gateway_charges
        SELECT gen_random_uuid(), 'k', id, amount, 'settled', updated_at - interval '5 ms' FROM orders;
        INSERT INTO outbox (event_type, aggregate_id, payload, created_at, published_at)
        SELECT 'OrderPaid', id, '{}', updated_at, updated_at + interval '5 ms' FROM orders;
        INSERT INTO processed_events SELECT o.event_id, 'payment-worker-1', u.updated_at FROM outbox o, orders u
        WHERE o.event_type = 'OrderCreated';
        """
    )
    told = await story(connection, order_id)
    assert [(entry.kind, entry.what) for entry in told.entries] == [
        ("transition", "CREATED"),
        ("event", "OrderCreated written"),
        ("publish", "OrderCreated published"),
        ("transition", "CREATED -> PAYMENT_PENDING"),
        ("charge", "gateway charge settled"),
        ("delivery", "OrderCreated processed"),
        ("transition", "PAYMENT_PENDING -> PAID"),
        ("event", "OrderPaid written"),
        ("publish", "OrderPaid published"),
    ]
    assert told.entries[0].since_previous is None
    assert sum(e.since_previous.total_seconds() for e in told.entries if e.since_previous) == pytest.approx(2.005)
    assert (told.state, told.version, told.took) == ("PAID", 3, told.entries[-2].at - told.entries[0].at)
    assert await story(connection, event_id) == told


async def test_a_story_of_failure_and_redrive(connection: asyncpg.Connection, command: Command) -> None:
    order_id, event_id = await buried(connection)
    told = await story(connection, order_id)
    attempts = [entry for entry in told.entries if entry.kind == "attempt"]
    assert [entry.what for entry in attempts] == [f"OrderCreated attempt {n} failed" for n in (1, 2, 3)]
    assert attempts[0].at == datetime.fromisoformat("2026-05-01T12:00:01Z")
    assert any(entry.kind == "dead letter" and "Max retries exceeded (3)" in entry.detail for entry in told.entries)
    await command("dead-letters", "redrive", event_id)
    again = [entry.what for entry in (await story(connection, order_id)).entries]
    assert "FAILED -> PAYMENT_PENDING" in again
    assert "OrderCreated buried" not in again


async def test_a_story_tells_when_a_retry_is_due(connection: asyncpg.Connection) -> None:
    order_id, event_id = await placed(connection)
    await connection.execute(
        "UPDATE outbox SET published_at = NULL, attempt = 2, available_at = now() + interval '9 s' WHERE event_id = $1",
        event_id,
    )
    last = (await story(connection, order_id)).entries[-1]
    assert (last.kind, last.detail) == ("due", "attempt 2")


async def test_a_story_without_an_order(connection: asyncpg.Connection, command: Command) -> None:
    aggregate = uuid4()
    await connection.execute("INSERT INTO outbox (event_type, aggregate_id) VALUES ('Shipped', $1)", aggregate)
    told = await story(connection, aggregate)
    assert (told.state, [entry.what for entry in told.entries]) == (None, ["Shipped written"])
    assert "does not exist" in (await command("explain", aggregate)).stdout
    with pytest.raises(Unknown):
        await story(connection, uuid4())


async def test_explain_as_table_and_as_json(connection: asyncpg.Connection, command: Command) -> None:
    order_id, _ = await buried(connection)
    text = (await command("explain", order_id)).stdout
    assert f"order {order_id}: FAILED (error), version 3, 299.99, 2.0 s" in text
    found = json_of(await command("explain", order_id, "--json"))
    assert found["state"] == "FAILED"
    assert found["entries"][0]["sincePrevious"] is None
    assert {entry["kind"] for entry in found["entries"]} >= {"transition", "event", "attempt", "dead letter"}


# ---------------------------------------------------------------------------------------------------------- audit


async def test_the_audit_ends_with_0_or_1_and_says_why(
    connection: asyncpg.Connection, command: Command, tmp_path: Path
) -> None:
    order_id, event_id = await placed(connection)
    await connection.execute("INSERT INTO processed_events VALUES ($1, 'w')", event_id)
    record = tmp_path / "accepted"
    record.write_text(f"{order_id}\n\n")
    result = await command("audit", "--accepted", record)
    assert result.exit_code == 0, result.stdout
    assert "not checked" not in result.stdout
    assert "not checked" in (await command("audit")).stdout
    lost = uuid4()
    result = await command("audit", "--accepted", "-", input=f"{lost}\n")
    assert result.exit_code == 1
    assert f"order {lost}: was accepted and does not exist" in result.stdout
    result = await command("audit", "--json", "--accepted", "-", input=f"{lost}\n")
    assert result.exit_code == 1
    found = {finding["invariant"]: finding for finding in orjson.loads(result.stdout)}
    assert [found[f"I{n}"]["verdict"] for n in range(1, 8)] == ["ok"] * 6 + ["VIOLATED"]
    assert (found["I1"]["checked"], found["I1"]["violations"], found["I1"]["examples"]) == (1, 0, [])


# --------------------------------------------------------------------------------------------------------- doctor


async def levels(url: str, connection: asyncpg.Connection) -> dict[str, str]:
    """Every check of the database and of the backlog that is not ok: what was seen -> its level."""
    checks = await postgres_checks.check(load(database_url=url), connection) + await backlog.check(connection)
    return {check.seen: check.level for check in checks if check.level != "ok"}


async def test_the_doctor_finds_nothing_wrong_with_a_fresh_database(database_url: str, connection: asyncpg.Connection) -> None:
    found = await levels(database_url, connection)
    # The test's server may run without fsync, which is its own affair.
    assert {seen for seen in found if "is off: a loss of power" not in seen} == set()


@pytest.mark.parametrize(
    ("sql", "level", "said"),
    [
        ("UPDATE gateway_control SET mode = 'error'", "warning", "mode error"),
        ("INSERT INTO dead_letter_events (event_id, reason) VALUES (gen_random_uuid(), 'x')",
         "warning", "1 dead letters are open"),
        ("INSERT INTO outbox (event_type, aggregate_id, created_at) VALUES ('T', gen_random_uuid(), now() - interval '1 min')",
         "problem", "1 events due, the oldest for 6"),
        ("INSERT INTO orders (id, user_id, amount, created_at, updated_at)"
         " VALUES (gen_random_uuid(), gen_random_uuid(), 1, now() - interval '1 h', now() - interval '1 h')",
         "problem", "1 of 1 orders in flight have not moved for 120 s (0 PAYMENT_PENDING"),
        ("INSERT INTO orders (id, user_id, amount, state, version, updated_at)"
         " VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'PAYMENT_PENDING', 2, now() - interval '1 h')",
         "problem", "(1 PAYMENT_PENDING: what became of their charges is not known)"),
        ("INSERT INTO circuits VALUES ('gateway', 'open', now() - interval '3 min', now() - interval '1 s')",
         "problem", "has been open for 3 min, the next probe comes with the next order"),
        ("SET synchronous_commit = off", "problem", "synchronous_commit is off"),
        ("REVOKE INSERT ON outbox FROM app_user", "problem", "lacks 1 rights"),
    ],
)  # fmt: skip
async def test_what_the_doctor_sees(database_url: str, connection: asyncpg.Connection, sql: str, level: str, said: str) -> None:
    await connection.execute(sql)
    found = {seen: found for seen, found in (await levels(database_url, connection)).items() if said in seen}
    assert list(found.values()) == [level], await levels(database_url, connection)


async def test_the_doctor_on_a_database_without_the_schema(command: Command, connection: asyncpg.Connection) -> None:
    await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    result = await command("doctor", "--json", "--kafka", "127.0.0.1:1")
    assert result.exit_code == 1
    problems = {
        check["seen"]: check["advice"] for check in orjson.loads(result.stdout)["checks"] if check["level"] == "problem"
    }
    assert problems["no orderflow schema"] == "run `orderflow migrate`"
    assert len(problems) == 2


async def test_a_refused_password_is_not_shown(command: Command, database_url: str) -> None:
    wrong = database_url.replace("app_password", "hunter2")
    result = await command("audit", "--database-url", wrong)
    if result.exit_code:
        assert "refuses user 'app_user'" in result.stderr
        assert "hunter2" not in result.stderr


def kafka_at(bootstrap: str, topic: str) -> Kafka:
    """The cluster, with a topic and a group of the test's own, and short limits."""
    return Kafka(bootstrap, topic=topic, group=f"group-of-{topic}", timeout=5.0)


async def test_the_doctor_reads_the_topic_and_the_lag(kafka: Broker, topic: str) -> None:
    found = [(check.level, check.seen) for check in await kafka_checks.check(kafka_at(kafka.bootstrap, topic), 30)]
    assert [found[1], found[-1]] == [
        ("ok", f"topic {topic}: 4 partitions, 1 replicas"),
        ("ok", f"group group-of-{topic} is 0 events behind"),
    ]
    producer = await kafka_at(kafka.bootstrap, topic).producer()
    try:
        await producer.send_and_wait(topic, b"1")
    finally:
        await producer.stop()
    last = (await kafka_checks.check(kafka_at(kafka.bootstrap, topic), 30))[-1]
    assert (last.level, last.seen) == ("warning", f"group group-of-{topic} has committed nothing, 1 events wait")


async def test_the_doctor_creates_no_topic(kafka: Broker) -> None:
    missing = f"missing-{uuid4()}"
    for _ in range(2):
        last = (await kafka_checks.check(kafka_at(kafka.bootstrap, missing), 30))[-1]
        assert (last.level, last.seen) == ("warning", f"topic {missing} does not exist yet")


# ----------------------------------------------------------------------------------------------------------- demo


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_the_demo_passes(tmp_path: Path) -> None:
    # Settings and a .env of somebody else's servers: the demo's own processes must not be led astray by them.
    (tmp_path / ".env").write_text("ORDERFLOW_DATABASE_DIRECT_URL=postgresql://nobody@127.0.0.1:1/x\n")
    environment = {
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/x",
        "ORDERFLOW_GATEWAY_SEED": "7",
        "PYTHONPATH": str(ROOT),
    }
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orderflow", "demo", "--json",
        cwd=tmp_path, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, errors = await asyncio.wait_for(program.communicate(), 200)
    results = orjson.loads(out)
    assert [(result["part"], result["seen"]) for result in results if not result["ok"]] == []
    assert [result["part"] for result in results] == list(range(1, 10))
    assert (program.returncode, errors) == (0, b"")


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_the_demo_passes_on_servers_that_are_named(
    connection: asyncpg.Connection, database_url: str, kafka: Broker, topic: str, tmp_path: Path
) -> None:
    # The session's own: CI runs this on Apache Kafka with each PostgreSQL that is supported.
    environment = {
        "ORDERFLOW_TOPIC": topic, "ORDERFLOW_CONSUMER_GROUP": topic, "PYTHONPATH": str(ROOT),
        "ORDERFLOW_KAFKA_EMBEDDED": str(not isinstance(kafka, ApacheKafka)),
    }  # fmt: skip
    with Terminal() as terminal:
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orderflow", "demo", "--json", "--database-url", database_url, "--kafka", kafka.bootstrap,
            cwd=tmp_path, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=terminal.descriptor,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(program.communicate(), 200)
    results = orjson.loads(out)
    assert [(result["part"], result["seen"]) for result in results if not result["ok"]] == []
    assert [result["part"] for result in results] == list(range(1, 9))
    assert program.returncode == 0
    shown = [line.partition("%  ")[2] for line in terminal.lines]
    assert shown[0] == "starting the servers"
    assert [line.split()[1] for line in shown[1:]] == [f"{number}," for number in range(1, 9)]
    # The ninth part, which the demo plays on a database of its own only. Its program ended with it, perhaps before the last
    # event was published: the next start does that, and until the horizon it is no violation.
    assert [finding for finding in await audit(connection) if finding.violations] == []


async def test_a_part_that_is_missed_says_what_was_seen() -> None:
    async def missed(stage: object) -> str:
        raise Missed("FAILED, version 3")

    async def broken(stage: object) -> str:
        raise ConnectionResetError("gone")

    for play, seen in ((missed, "FAILED, version 3"), (broken, "ConnectionResetError: gone")):
        result = await demo._played(Part(2, "one order", "PAID", play), cast(Any, None))
        assert (result.ok, result.expected, result.seen) == (False, "PAID", seen)


async def test_the_log_of_a_program_that_ended_is_not_waited_for() -> None:
    log = Log()
    await log.add({"service": "payment-worker", "type": "STARTUP", "workerId": "w"})
    assert (await log.line("payment-worker", "STARTUP"))["workerId"] == "w"
    waiting = asyncio.create_task(log.line("payment-worker", "METRICS", timeout=30))
    await log.end("it ended with 1")
    with pytest.raises(Missed, match="it ended with 1"):
        await asyncio.wait_for(waiting, 5)
    with pytest.raises(Missed, match="no DLQ_EVENT of payment-worker within 0 s"):
        await Log().line("payment-worker", "DLQ_EVENT", timeout=0.01)
