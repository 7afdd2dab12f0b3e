"""The log: its two formats, its writer under every kind of reader, what libraries warn of, and no secret in it."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from threading import Event, Thread
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow import logs
from orderflow.console_log import ConsoleFormat
from orderflow.engine import telemetry
from orderflow.engine.telemetry import PROCESS, WORKER, emit
from orderflow.log_writer import LineWriter
from orderflow.logs import JsonFormat, LibraryWarnings, LogWriter
from orderflow.settings import Settings, masks_for
from tests.programs import FACTS, ROOT, Program

LIMIT = 10.0
IDENTIFIER = UUID("0198f3a2-7c41-7b6e-9d0f-3a5c8e1b2d47")
ANSI = re.compile(r"\x1b\[\d+m")


class Pipe:
    """A pipe that a writer under test writes into."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def read(self, size: int = 1 << 20) -> bytes:
        return os.read(self.reading, size)

    def read_all(self) -> bytes:
        os.close(self.writing)
        self.writing = -1
        parts = []
        while part := self.read():
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        for descriptor in (self.reading, self.writing):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def never(*_: object) -> None:
    raise AssertionError("must not be called")


def line_writer(descriptor: int, **options: Any) -> LineWriter:
    return LineWriter(descriptor, **{"on_dropped": never, "on_closed": never, **options})


def as_json(fields: dict[str, Any]) -> dict[str, Any]:
    [line] = JsonFormat()("payment-worker", "SOMETHING", [fields])
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return json.loads(line)  # type: ignore[no-any-return]


def on_console(color: bool = False, **fields: Any) -> str:
    line = ConsoleFormat(color)("payment-worker", "STATE_CHANGE", [fields])[0].decode()
    assert line.endswith("\n")
    assert line.count("\n") == 1
    return line


# The formats.


def test_a_line_begins_with_service_type_and_time() -> None:
    before = datetime.now(UTC)
    line = as_json({"eventId": IDENTIFIER, "retryCount": 2})
    assert list(line) == ["service", "type", "timestamp", "eventId", "retryCount"]
    assert line["service"] == "payment-worker"
    assert line["eventId"] == str(IDENTIFIER)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    assert abs(datetime.fromisoformat(line["timestamp"]) - before) < timedelta(seconds=LIMIT)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Decimal("299.90"), "299.90"),
        (ValueError("wrong"), "wrong"),
        (TimeoutError(), "TimeoutError"),
        (b"\xff", "b'\\xff'"),
        (2**70, 2**70),
        (float("nan"), None),
        ("a\nb\r\x1b[31m", "a\nb\r\x1b[31m"),
        ({1: {IDENTIFIER: 2**70}}, {"1": {str(IDENTIFIER): 2**70}}),
        ((1, 2), [1, 2]),
        (None, None),
    ],
    ids=repr,
)
def test_every_value_has_a_form(value: object, shown: object) -> None:
    assert as_json({"field": value})["field"] == shown


def test_a_lone_surrogate_does_not_lose_the_line() -> None:
    assert as_json({"field": "\ud800", "eventId": IDENTIFIER})["eventId"] == str(IDENTIFIER)
    assert "\\ud800" in on_console(field="\ud800")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.uuids() | st.decimals()
    | st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Cs"])) | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.text(), anything, max_size=4))
def test_no_field_can_break_a_line(fields: dict[str, Any]) -> None:
    as_json(fields)
    on_console(**fields)


@given(st.dictionaries(st.text(), anything, max_size=4))
def test_no_field_can_command_a_terminal(fields: dict[str, Any]) -> None:
    [line] = ConsoleFormat(False)("payment-worker", "TYPE", [fields])
    shown = line.decode("utf-8", "surrogateescape")
    assert shown[:-1].isprintable()


def test_the_console_line() -> None:
    line = on_console(orderId=IDENTIFIER, oldState="CREATED", newState="PAYMENT_PENDING")
    assert re.match(rf"\d\d:\d\d:\d\d\.\d{{3}} payment-worker +STATE_CHANGE +orderId={IDENTIFIER} CREATED -> PAY", line)
    assert on_console(message="two words", error="two words").endswith(' two words error="two words"\n')


def test_colours_are_added_and_nothing_else() -> None:
    painted = on_console(color=True, status="SUCCESS", message="done")
    assert "\x1b[32mSUCCESS\x1b[0m" in painted
    assert ANSI.sub("", painted)[13:] == on_console(status="SUCCESS", message="done")[13:]


# The writer.


def test_lines_arrive_soon_and_in_order(pipe: Pipe) -> None:
    writer = line_writer(pipe.writing)
    writer.write([b"one\n"])
    writer.write([b"two\n"])
    assert pipe.read() == b"one\ntwo\n"
    assert writer.close()


def test_flush_and_close_write_what_is_left(pipe: Pipe) -> None:
    writer = line_writer(pipe.writing, latency=LIMIT)
    writer.write([b"one\n"])
    assert writer.flush()
    assert pipe.read() == b"one\n"
    assert writer.flush()
    writer.write([b"two\n"])
    assert writer.close()
    assert pipe.read_all() == b"two\n"


def test_a_full_pipe_stops_nobody_and_lost_lines_are_counted(pipe: Pipe) -> None:
    told: list[int] = []
    reported = Event()

    def on_dropped(lines: int) -> None:
        told.append(lines)
        reported.set()

    writer = line_writer(pipe.writing, limit=200_000, on_dropped=on_dropped)
    line = b"x" * 999 + b"\n"
    for _ in range(1000):
        writer.write([line])
    assert not writer.flush(0.1)
    assert not told

    received = []

    def drain() -> None:
        while part := pipe.read():
            received.append(part)

    reader = Thread(target=drain)
    reader.start()
    assert reported.wait(LIMIT)
    assert writer.flush(LIMIT)
    assert writer.close(LIMIT)
    os.close(pipe.writing)
    pipe.writing = -1
    reader.join(LIMIT)
    lines = b"".join(received).splitlines(keepends=True)
    assert set(lines) == {line}
    assert len(lines) + sum(told) == 1000
    assert len(lines) >= 200


def test_close_does_not_wait_for_a_reader_that_does_not_read(pipe: Pipe) -> None:
    writer = line_writer(pipe.writing)
    for _ in range(1000):
        writer.write([b"x" * 999 + b"\n"])
    assert not writer.close(0.1)
    while writer.close(0.01) is False:
        pipe.read()


def test_a_closed_reader_is_told_once_and_the_rest_let_go(pipe: Pipe) -> None:
    told: list[bool] = []
    writer = line_writer(pipe.writing, on_closed=lambda: told.append(True))
    os.close(pipe.reading)
    pipe.reading = -1
    for _ in range(3):
        writer.write([b"line\n"])
        assert writer.flush(LIMIT)
    assert told == [True]
    assert writer.close()
    # What else may still be written there must not fail either.
    assert os.write(pipe.writing, b"the interpreter's last words\n")


def test_a_full_disk_loses_lines_and_nothing_else() -> None:
    told: list[int] = []
    descriptor = os.open("/dev/full", os.O_WRONLY)
    writer = line_writer(descriptor, on_dropped=told.append)
    for _ in range(5):
        writer.write([b"line\n"])
        assert writer.flush(LIMIT)
    # A report would be lost as well, and be reported, and so on.
    assert told == []
    assert writer.close()
    os.close(descriptor)


def test_a_non_blocking_descriptor_is_waited_for(pipe: Pipe) -> None:
    os.set_blocking(pipe.writing, False)
    writer = line_writer(pipe.writing)
    total = 300 * 1000
    for _ in range(300):
        writer.write([b"x" * 999 + b"\n"])
    received = b""
    while len(received) < total:
        received += pipe.read()
    assert received == (b"x" * 999 + b"\n") * 300
    assert writer.close()


def test_a_line_that_is_logged_by_the_garbage_collector_inside_write(pipe: Pipe) -> None:
    writer = line_writer(pipe.writing, latency=LIMIT)

    class Logs(list[bytes]):
        def extend(self, lines: Iterable[bytes]) -> None:
            lines = list(lines)
            if not lines[0].startswith(b"again"):
                writer.write([b"again " + lines[0]])
            super().extend(lines)

    writer._lines = Logs()
    writing = Thread(target=writer.write, args=([b"line\n"],), daemon=True)
    writing.start()
    writing.join(LIMIT)
    assert not writing.is_alive()
    assert writer.close(LIMIT)
    assert sorted(pipe.read_all().splitlines()) == [b"again line", b"line"]


def test_lines_of_processes_that_share_a_pipe_do_not_mix() -> None:
    source = """
    from orderflow.log_writer import LineWriter
    writer = LineWriter(1, on_dropped=print, on_closed=print)
    for number in range(3000):
        line = {"type": "LINE", "who": sys.argv[1], "number": number, "x": "x" * (number % 900)}
        writer.write([json.dumps(line).encode() + b"\\n"])
        if number % 100 == 0:
            writer.flush(20)
    assert writer.close(20)
    """
    command = (sys.executable, "-c", FACTS + textwrap.dedent(source))
    reading, writing = os.pipe()
    writers = [subprocess.Popen((*command, str(who)), cwd=ROOT, stdout=writing, stdin=subprocess.DEVNULL) for who in range(3)]
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        lines = [json.loads(line) for line in stream]
    assert [writer.wait(LIMIT) for writer in writers] == [0, 0, 0]
    for who in range(3):
        assert [line["number"] for line in lines if line["who"] == str(who)] == list(range(3000))


# Telemetry, settings, libraries.


@pytest.fixture
def facts() -> Iterator[list[tuple[str, str, dict[str, Any]]]]:
    seen: list[tuple[str, str, dict[str, Any]]] = []
    with telemetry.subscribed(lambda service, event, facts: seen.extend((service, event, fields) for fields in facts)):
        yield seen


@pytest.fixture
def warnings() -> Iterator[logging.Logger]:
    logger = logging.getLogger("aiokafka.consumer.group_coordinator")
    handler = LibraryWarnings()
    logger.addHandler(handler)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)
    logger.propagate = True


def test_facts_for_the_metrics_are_not_written(pipe: Pipe) -> None:
    log = LogWriter(JsonFormat(), line_writer(pipe.writing))
    with telemetry.subscribed(log.take):
        emit(WORKER, "EVENT_PROCESSED", eventId=IDENTIFIER)
        emit(WORKER, "EVENT_RECEIVED", eventId=IDENTIFIER)
    assert log.close()
    assert [json.loads(line)["type"] for line in pipe.read_all().splitlines()] == ["EVENT_RECEIVED"]


def test_no_password_reaches_the_log(pipe: Pipe) -> None:
    settings = Settings(
        database_url="postgresql://me:s%20ecret@db/x", database_direct_url="postgresql://me:b@db/x", kafka_password="k4fka-pw"
    )  # fmt: skip
    log = LogWriter(JsonFormat(), line_writer(pipe.writing), masks_for(settings))
    log.take(PROCESS, "ROLE_CRASHED", ({"error": "bad DSN postgresql://me:s%20ecret@db/x (s ecret, k4fka-pw)"},))
    log.take(PROCESS, "ROLE_WAITING", ({"reason": "cannot be reached: me:b@db"},))
    log.take(WORKER, "PROCESSING_ERROR", ({"error": ConnectionError("k4fka-pw")},))
    assert log.close()
    lines = [json.loads(line) for line in pipe.read_all().splitlines()]
    assert lines[0]["error"] == "bad DSN postgresql://me:***@db/x (***, ***)"
    # A short password stays out of an address, and the other words stay as they are.
    assert lines[1]["reason"] == "cannot be reached: me:***@db"
    assert lines[2]["error"] == "***"


def test_a_library_s_warning_is_a_fact(warnings: logging.Logger, facts: list[tuple[str, str, dict[str, Any]]]) -> None:
    warnings.info("not shown")
    try:
        raise ValueError("cause")
    except ValueError:
        warnings.exception("failed for %s", "group")
    assert facts == [
        (PROCESS, "LIBRARY_WARNING", {
            "logger": warnings.name, "level": "ERROR", "message": "failed for group", "error": "ValueError: cause",
        }),
    ]  # fmt: skip


def test_a_repeated_warning_is_told_once_and_counted(
    warnings: logging.Logger, facts: list[tuple[str, str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        warnings.warning("connection %s failed", number)
    assert [fields["message"] for _, _, fields in facts] == ["connection 0 failed"]
    monkeypatch.setattr(logs, "REPEAT_SECONDS", 0.0)
    warnings.warning("connection %s failed", 50)
    assert facts[1][2]["repeated"] == 49


def test_a_warning_with_a_wrong_format_is_told_all_the_same(
    facts: list[tuple[str, str, dict[str, Any]]],
) -> None:
    LibraryWarnings().emit(logging.LogRecord("aiohttp", logging.ERROR, "", 1, "%s and %s", ("one",), None))
    assert facts[0][2]["message"] == "%s and %s"


@pytest.mark.parametrize(
    "message",
    [
        "Group Coordinator Request failed: [Error 15] GroupCoordinatorNotAvailableError",
        "Heartbeat failed for group payment-worker because it is rebalancing",
    ],
)
def test_what_a_young_group_says_is_expected(
    message: str, warnings: logging.Logger, facts: list[tuple[str, str, dict[str, Any]]]
) -> None:
    warnings.warning(message)
    assert facts == []


# The whole, as a program.

LOGGING = """
    from orderflow import logs
    from orderflow.engine.telemetry import PROCESS, WORKER, emit
    from orderflow.settings import load
    from orderflow.supervisor import supervise

    log = logs.install(load())

    class Talker:
        name = "worker"
        async def run(self, stopping):
            number = 0
            while not stopping.is_set():
                emit(WORKER, "LINE", number=number)
                number += 1
                await asyncio.sleep(0)

    code = asyncio.run(supervise([Talker()], grace=5, crash_budget=0, crash_window=1, on_drain=lambda: None))
    log.close()
    sys.exit(code)
    """


def test_head_ends_the_program_quietly() -> None:
    with Program(LOGGING, environment={"ORDERFLOW_LOG_FORMAT": "auto"}) as program:
        assert program.until("LINE")["number"] == 0
    reading, writing = os.pipe()
    talker = subprocess.Popen(
        (sys.executable, "-c", FACTS + textwrap.dedent(LOGGING)), cwd=ROOT, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    head = subprocess.run(("head", "-1"), stdin=reading, capture_output=True, timeout=20, check=True)
    os.close(reading)
    _, errors = talker.communicate(timeout=20)
    assert json.loads(head.stdout)["type"] == "LINE"
    assert (talker.returncode, errors) == (0, b"")


def test_a_terminal_gets_colours_and_a_pipe_gets_json() -> None:
    source = """
    from orderflow import logs
    from orderflow.engine.telemetry import PROCESS, emit
    from orderflow.settings import load
    log = logs.install(load(log_format=sys.argv[1]))
    emit(PROCESS, "STARTUP", message="ready")
    log.close()
    """

    def output(log_format: str, descriptor: int) -> None:
        command = (sys.executable, "-c", FACTS + textwrap.dedent(source), log_format)
        subprocess.run(command, cwd=ROOT, stdout=descriptor, timeout=20, check=True)

    ours, terminal = os.openpty()
    reading, writing = os.pipe()
    try:
        output("auto", terminal)
        assert b"\x1b[1mSTARTUP" in os.read(ours, 4096)
        output("json", terminal)
        assert json.loads(os.read(ours, 4096))["type"] == "STARTUP"
        output("auto", writing)
        assert json.loads(os.read(reading, 4096))["message"] == "ready"
        output("console", writing)
        plain = os.read(reading, 4096)
        assert b"STARTUP" in plain
        assert b"\x1b" not in plain
    finally:
        for descriptor in (ours, terminal, reading, writing):
            os.close(descriptor)


def test_a_reader_that_stalls_costs_lines_and_the_log_says_how_many(pipe: Pipe) -> None:
    source = """
    from orderflow import logs
    from orderflow.engine.telemetry import WORKER, emit
    from orderflow.settings import load
    log = logs.install(load(log_format="json"), descriptor=int(sys.argv[1]), limit=100_000)
    for number in range(5000):
        emit(WORKER, "LINE", number=number, filler="x" * 200)
    tell("EMITTED")
    assert log.flush(20)
    log.close()
    """
    os.set_inheritable(pipe.writing, True)
    process = subprocess.Popen(
        (sys.executable, "-c", FACTS + textwrap.dedent(source), str(pipe.writing)),
        cwd=ROOT, pass_fds=(pipe.writing,), stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["type"] == "EMITTED"
    lines = [json.loads(line) for line in pipe.read_all().splitlines()]
    assert process.wait(20) == 0
    process.stdout.close()
    dropped = sum(line["lines"] for line in lines if line["type"] == "LOG_LINES_DROPPED")
    assert dropped > 0
    assert dropped + sum(line["type"] == "LINE" for line in lines) == 5000
