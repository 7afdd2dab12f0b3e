"""The decoder under bytes from anywhere: a Message or Undecodable, nothing else; and what decodes survives a round trip."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orderflow.engine.message import Message, Undecodable

ORDER = "0198f3a2-7c41-7b6e-9d0f-aaaaaaaaaaaa"
GOOD = orjson.dumps(
    {
        "eventId": "0198f3a2-7c41-7b6e-9d0f-3a5c8e1b2d47",
        "eventType": "OrderCreated",
        "aggregateId": ORDER,
        "aggregateType": "order",
        "payload": {"orderId": ORDER, "amount": "299.99", "lines": [{"n": 1}, None, True, 1.5]},
        "createdAt": "2026-05-01T12:00:00.123456+00:00",
    }
)
# What means something in JSON, and what does to the parsers behind it.
TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"null", b"true", b"NaN", b"-0", b"1e999", b"1e-999", b"9" * 400,
    b"\\u0000", b"\\ud800", b"\xff", b"\xed\xa0\x80", b"\0", b"\n", b"[" * 300, b'{"a":' * 300, b'"payload":{},', b"+14:00",
)  # fmt: skip
# orjson reads deeper than it writes.
DEEPEST = 200

edits = st.lists(
    st.tuples(
        st.sampled_from(["cut", "insert", "overwrite", "repeat"]),
        st.integers(0, len(GOOD)),
        st.integers(0, 40),
        st.sampled_from(TOKENS) | st.binary(max_size=6),
    ),
    min_size=1,
    max_size=4,
)
headers = st.lists(
    st.tuples(
        st.sampled_from(["attempt", "event-id", "event-type", "traceparent", "x"]) | st.text(max_size=8),
        st.none() | st.binary(max_size=20) | st.sampled_from([b"1", b"2", b"-1", b"2147483648", "١".encode(), b"1\n"]),
    ),
    max_size=6,
)


def edited(value: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, at, length, token in changes:
        match kind:
            case "cut":
                value = value[:at] + value[at + length :]
            case "insert":
                value = value[:at] + token + value[at:]
            case "overwrite":
                value = value[:at] + token + value[at + len(token) :]
            case _:
                value = value[: at + length] + value[at:]
    return value


def depth(value: Any) -> int:
    """How deep objects and arrays stand in each other."""
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def check(value: bytes | None, carried: list[tuple[str, Any]]) -> bool:
    """Whether it decodes; then what it is encoded to decodes to the same. Any error but Undecodable fails the test."""
    try:
        message = Message.decode(value, carried)
    except Undecodable:
        return False
    if depth(message.payload) < DEEPEST:
        key, again, ours = message.encode()
        assert key == str(message.aggregate_id).encode()
        assert b"\n" not in again
        assert Message.decode(again, ours) == message
    return True


def test_the_record_to_begin_with_decodes() -> None:
    assert check(GOOD, [])


@settings(max_examples=400)
@given(edits, headers)
def test_a_damaged_record_is_an_event_or_undecodable(changes: list[tuple[str, int, int, bytes]], carried: list[Any]) -> None:
    check(edited(GOOD, changes), carried)


@settings(max_examples=200)
@given(st.none() | st.binary(max_size=400), headers)
@example(b"[" * 100_000, [])
@example(b'{"a":' * 100_000, [])
@example(b'"' + b"\\u0041" * 100_000 + b'"', [])
def test_any_bytes_are_undecodable_and_nothing_worse(value: bytes | None, carried: list[Any]) -> None:
    assert not check(value, carried)


@settings(max_examples=200)
@given(st.text(), st.text(), st.text(), headers)
def test_any_text_in_any_field_is_an_event_or_undecodable(kind: str, time: str, identifier: str, carried: list[Any]) -> None:
    document = orjson.loads(GOOD)
    for changed in ({"eventType": kind}, {"aggregateType": kind}, {"createdAt": time}, {"eventId": identifier}):
        check(orjson.dumps(document | changed), carried)
