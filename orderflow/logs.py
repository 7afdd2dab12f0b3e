"""The log: one JSON object a line on stdout for programs, coloured lines for people.

Subscribes to telemetry. Python's own logging (what libraries warn of) comes the same way, as LIBRARY_WARNING.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from orderflow.console_log import ConsoleFormat
from orderflow.engine import telemetry
from orderflow.engine.telemetry import PROCESS, Facts, emit
from orderflow.log_writer import LIMIT_BYTES, LineWriter
from orderflow.settings import Settings, masked, masks_for

# The lines of some facts of one kind.
Format = Callable[[str, str, Facts], list[bytes]]

# Facts that are counted and never written: one line for each would say what other lines say already.
METRIC_ONLY: Final = frozenset({
    "EVENT_PROCESSED", "EVENT_POSTPONED", "PAYMENT_GIVEN_UP", "CIRCUIT_SEEN", "BACKLOG_SEEN", "AUDITED",
})  # fmt: skip

OPTIONS: Final = orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z

REPEAT_SECONDS: Final = 10.0
MOST_REMEMBERED: Final = 1000

# What aiokafka says whenever a group or a topic is young; it goes on by itself each time.
EXPECTED: Final = (
    ("aiokafka.consumer.group_coordinator", "Group Coordinator Request failed: [Error 15]"),
    ("aiokafka.consumer.group_coordinator", "GroupCoordinatorNotAvailableError"),
    ("aiokafka.consumer.group_coordinator", "GroupLoadInProgressError"),
    ("aiokafka.consumer.group_coordinator", "because it is rebalancing"),
    ("aiokafka.consumer.group_coordinator", "OffsetFetchRequest -- unknown topic"),
    ("aiokafka.cluster", "is not available during auto-create initialization"),
    ("aiokafka.cluster", "not found in cluster metadata"),
    ("aiokafka.conn", "Sending username and password in the clear"),
)


def install(settings: Settings, *, descriptor: int = 1, limit: int = LIMIT_BYTES, color: bool | None = None) -> LogWriter:
    """Write every fact from now on to the descriptor, and what libraries warn of.

    `limit`: bytes that may wait for the reader. `color`: of the console format; None: on a terminal.
    Call `close()` on the result at the end of the process.
    """
    terminal = os.isatty(descriptor)
    as_console = settings.log_format == "console" or (settings.log_format == "auto" and terminal)
    log = LogWriter(
        ConsoleFormat(terminal if color is None else color) if as_console else JsonFormat(),
        LineWriter(descriptor, limit=limit, on_dropped=_say_dropped, on_closed=_drain),
        masks_for(settings),
    )
    if settings.log_format != "off":
        telemetry.subscribe(log.take)
    handler = LibraryWarnings()
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    return log


def _say_dropped(lines: int) -> None:
    emit(PROCESS, "LOG_LINES_DROPPED", lines=lines)


def _drain() -> None:
    # Nobody reads us any more (`| head`): the same as being asked to stop, and nothing to complain about.
    os.kill(os.getpid(), signal.SIGTERM)


class LogWriter:
    """The telemetry subscriber that turns facts into lines."""

    def __init__(self, form: Format, lines: LineWriter, masks: Mapping[str, str] | None = None) -> None:
        self._format = form
        self._lines = lines
        self._write = lines.write
        self._masks = masks or {}

    def take(self, service: str, event: str, facts: Facts) -> None:
        """Write these facts, unless they are for the metrics only; never blocks, never raises."""
        if event in METRIC_ONLY:
            return
        if service == PROCESS or "error" in facts[0]:
            # The text of an error that nobody foresaw may quote an address with its password.
            facts = [{name: self._masked(value) for name, value in fields.items()} for fields in facts]
        self._write(self._format(service, event, facts))

    def _masked(self, value: Any) -> Any:
        if isinstance(value, BaseException):
            value = _as_text(value)
        if isinstance(value, str):
            for secret, mask in self._masks.items():
                value = value.replace(secret, mask)
            return masked(value)
        return value

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait until every line taken so far is written; False after `timeout` seconds."""
        return self._lines.flush(timeout)

    def close(self, timeout: float = 1.0) -> bool:
        """Write what is left and end; False when nobody reads and lines were lost after `timeout` seconds."""
        return self._lines.close(timeout)


class JsonFormat:
    """One compact JSON object a line: service, type, timestamp, then the fields."""

    def __init__(self) -> None:
        self._second = 0
        self._clock = ""

    def __call__(self, service: str, event: str, facts: Facts) -> list[bytes]:
        now = time.time_ns() // 1_000_000
        if now // 1000 != self._second:
            self._second = now // 1000
            self._clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self._second))
        begin = {"service": service, "type": event, "timestamp": f"{self._clock}.{now % 1000:03d}Z"}
        try:
            # What all of them begin with is made once, and each one's own object put behind it.
            head = orjson.dumps(begin)[:-1]
            return [head + b"," + orjson.dumps(fields, _as_text, OPTIONS)[1:] if fields else head + b"}\n" for fields in facts]
        except (TypeError, ValueError):
            # Integers over 64 bits, lone surrogates, keys that are no strings: rare, and no reason to lose the line.
            return [json.dumps(_plain(begin | fields)).encode() + b"\n" for fields in facts]


def _as_text(value: object) -> str:
    return str(value) or type(value).__name__


def _plain(value: object) -> object:
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return None
        case None | bool() | int() | float() | str():
            return value
        case _:
            return _as_text(value)


class LibraryWarnings(logging.Handler):
    """Records of Python's logging as LIBRARY_WARNING: each text once in REPEAT_SECONDS, with how often it came since."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Tell telemetry of the record, unless it is expected or was told a moment ago."""
        try:
            message = record.getMessage()
        except Exception:
            # A wrong format string in a library must not become a crash of ours.
            message = str(record.msg)
        if any(record.name == name and text in message for name, text in EXPECTED):
            return
        # By its pattern: "connection 17 failed", "connection 18 failed" is one thing said often.
        key = (record.name, str(record.msg))
        since, repeated = self._seen.get(key, (-REPEAT_SECONDS, 0))
        now = time.monotonic()
        if now - since < REPEAT_SECONDS:
            self._seen[key] = (since, repeated + 1)
            return
        if len(self._seen) >= MOST_REMEMBERED:
            self._seen.clear()
        self._seen[key] = (now, 0)
        fields: dict[str, Any] = {"logger": record.name, "level": record.levelname, "message": message[:1000]}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"[:500]
        if repeated:
            fields["repeated"] = repeated
        emit(PROCESS, "LIBRARY_WARNING", **fields)
