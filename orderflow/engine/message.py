"""One event on its way, and its one encoding: the Kafka record of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import orjson

from orderflow.engine.ids import parse_id

Headers = Sequence[tuple[str, bytes]]
MAX_ATTEMPT = 2**31 - 1


class Undecodable(ValueError):
    """The record is not an event; the text says what is wrong with it."""


# Not frozen, and never changed all the same: a frozen one takes five times as long to make, twice for every event.
@dataclass(slots=True)
class Message:
    """An event. `payload` is JSON: text as it stands in the outbox on the way out, parsed on the way in."""

    id: UUID
    type: str
    aggregate_type: str
    aggregate_id: UUID
    payload: str | dict[str, Any]
    created_at: datetime
    attempt: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> tuple[bytes, bytes, list[tuple[str, bytes]]]:
        """Key, value and headers of the Kafka record."""
        event_id, kind, aggregate_id, payload = str(self.id), self.type, str(self.aggregate_id), self.payload
        # A payload that comes from PostgreSQL is valid JSON already: it is copied, never parsed.
        value = (
            f'{{"eventId":"{event_id}","eventType":{_quoted(kind)},"aggregateId":"{aggregate_id}",'
            f'"aggregateType":{_quoted(self.aggregate_type)},'
            f'"payload":{payload if isinstance(payload, str) else orjson.dumps(payload).decode()},'
            f'"createdAt":"{self.created_at.isoformat()}"}}'
        )
        headers = [("event-id", event_id.encode()), ("event-type", kind.encode()), ("attempt", b"%d" % self.attempt)]
        if self.headers:
            headers.extend((name, text.encode()) for name, text in self.headers.items())
        return aggregate_id.encode(), value.encode(), headers

    def trace(self) -> dict[str, str]:
        """The headers that an event caused by this one carries on."""
        return {name: text for name, text in self.headers.items() if name in ("traceparent", "tracestate")}

    @classmethod
    def decode(cls, value: bytes | None, headers: Headers) -> Message:
        """The event in a Kafka record.

        Raises Undecodable, whose text names the field that is wrong.
        """
        if value is None:
            raise Undecodable("the record has no value (a tombstone)")
        try:
            document = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise Undecodable(f"the value is not JSON: {error}") from None
        if not isinstance(document, dict):
            raise Undecodable(f"the value is a JSON {type(document).__name__}, not an object")
        attempt, carried = _carried(headers)
        payload = document.get("payload")
        if not isinstance(payload, dict):
            raise Undecodable("payload: missing or not an object")
        return cls(
            _uuid(document, "eventId"),
            _text(document, "eventType"),
            _text(document, "aggregateType"),
            _uuid(document, "aggregateId"),
            payload,
            _time(document, "createdAt"),
            attempt,
            carried,
        )


# What every record of ours carries; of these, `attempt` alone is read.
OUR_HEADERS = frozenset(("event-id", "event-type", "attempt"))


def _carried(headers: Headers) -> tuple[int, dict[str, str]]:
    attempt, carried = 1, {}
    for name, text in headers:
        if name == "attempt" and text is not None:
            attempt = 1 if text == b"1" else _attempt(text.decode("utf-8", "replace"))
        elif name not in OUR_HEADERS and text is not None:
            carried[name] = text.decode("utf-8", "replace")
    return attempt, carried


@lru_cache(maxsize=256)
def _quoted(text: str) -> str:
    return orjson.dumps(text).decode()


def _text(document: dict[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise Undecodable(f"{name}: missing or not a text")
    return value


def _uuid(document: dict[str, Any], name: str) -> UUID:
    value = document.get(name)
    try:
        if isinstance(value, str) and len(value) == 36:
            found = parse_id(value)
            # Hyphens elsewhere would be another text for the same id.
            if str(found) == value.lower():
                return found
    except ValueError:
        raise Undecodable(f"{name}: not a UUID") from None
    raise Undecodable(f"{name}: missing or not a UUID")


def _time(document: dict[str, Any], name: str) -> datetime:
    value = document.get(name)
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
            # Without a zone it can be neither compared with ours nor stored as a moment; in UTC it may leave the calendar.
            if time.tzinfo is UTC:
                return time
            if time.tzinfo is not None:
                return time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise Undecodable(f"{name}: not an ISO 8601 time") from None
    raise Undecodable(f"{name}: missing, or not a time with its zone")


def _attempt(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10 or not 1 <= int(text) <= MAX_ATTEMPT:
        raise Undecodable("header attempt: not a number from 1")
    return int(text)
