"""The log as people read it on a terminal: time, service, type, fields; colours where they are wanted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import orjson

RESET: Final = "\x1b[0m"
DIM: Final = "\x1b[2m"
BOLD: Final = "\x1b[1m"
RED: Final = "\x1b[31m"
GREEN: Final = "\x1b[32m"
YELLOW: Final = "\x1b[33m"
BLUE: Final = "\x1b[34m"
MAGENTA: Final = "\x1b[35m"
CYAN: Final = "\x1b[36m"

SERVICES: Final = {"order-api": BLUE, "outbox-publisher": MAGENTA, "payment-worker": CYAN}
EVENTS: Final = {
    "STARTUP": BOLD,
    "PROCESSING_ERROR": YELLOW,
    "RETRY_SCHEDULED": YELLOW,
    "DUPLICATE_EVENT": YELLOW,
    "ROLE_WAITING": YELLOW,
    "LIBRARY_WARNING": YELLOW,
    "DRAIN_INCOMPLETE": YELLOW,
    "LOG_LINES_DROPPED": YELLOW,
    "RETENTION_REFUSED": YELLOW,
    "DLQ_EVENT": RED,
    "AUDIT_VIOLATION": RED,
    "AUDIT_FAILED": RED,
    "STALLED": RED,
    "LOOP_BLOCKED": RED,
    "ROLE_CRASHED": RED,
    "TASK_CRASHED": RED,
    "PROCESS_CRASHED": RED,
    "FAILED": RED,
}
VALUES: Final = {"PAID": GREEN, "SUCCESS": GREEN, "FAILED": RED, "DECLINED": RED}


class ConsoleFormat:
    """`12:34:56.789 payment-worker   STATE_CHANGE     orderId=... CREATED -> PAYMENT_PENDING`, in local time."""

    def __init__(self, color: bool) -> None:
        self._color = color
        self._second = 0
        self._clock = ""

    def __call__(self, service: str, event: str, facts: Sequence[dict[str, Any]]) -> list[bytes]:
        return [self._line(service, event, fields) for fields in facts]

    def _line(self, service: str, event: str, fields: dict[str, Any]) -> bytes:
        words = [
            self._painted(self._time(), DIM),
            self._painted(escaped(service).ljust(16), SERVICES.get(service, "")),
            self._painted(escaped(event).ljust(16), EVENTS.get(event, "")),
        ]
        if "oldState" in fields and "newState" in fields:
            change = fields["oldState"], fields["newState"]
            fields = {name: value for name, value in fields.items() if name not in ("oldState", "newState")}
            words += [self._field(name, value) for name, value in fields.items()]
            words.append(f"{self._value(change[0])} -> {self._value(change[1])}")
        else:
            words += [self._field(name, value) for name, value in fields.items()]
        return (" ".join(words).rstrip() + "\n").encode("utf-8", "backslashreplace")

    def _time(self) -> str:
        now = time.time_ns() // 1_000_000
        if now // 1000 != self._second:
            self._second = now // 1000
            self._clock = time.strftime("%H:%M:%S", time.localtime(self._second))
        return f"{self._clock}.{now % 1000:03d}"

    def _field(self, name: str, value: Any) -> str:
        if name == "message" and isinstance(value, str):
            return escaped(value)
        return self._painted(f"{escaped(name)}=", DIM) + self._value(value)

    def _value(self, value: Any) -> str:
        text = escaped(_shown(value))
        if " " in text or not text:
            text = f'"{text}"'
        return self._painted(text, VALUES.get(text, ""))

    def _painted(self, text: str, code: str) -> str:
        return f"{code}{text}{RESET}" if self._color and code else text


def escaped(text: str) -> str:
    """The text with whatever a terminal could take for a command, and every line break, shown as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        try:
            return orjson.dumps(value, str, orjson.OPT_NON_STR_KEYS).decode()
        except (TypeError, ValueError):
            return repr(value)
    return str(value) if str(value) or isinstance(value, str) else type(value).__name__
