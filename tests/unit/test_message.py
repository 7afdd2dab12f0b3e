"""The encoding of events: what goes out comes back, and whatever comes in is either an event or Undecodable."""

from __future__ import annotations

from datetime import UTC, timedelta, timezone
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.engine.message import MAX_ATTEMPT, Message, Undecodable

EVENT = "0198f3a2-7c41-7b6e-9d0f-3a5c8e1b2d47"
ORDER = "0198f3a2-7c41-7b6e-9d0f-aaaaaaaaaaaa"
GOOD: dict[str, Any] = {
    "eventId": EVENT,
    "eventType": "OrderCreated",
    "aggregateId": ORDER,
    "aggregateType": "order",
    "payload": {"orderId": ORDER, "amount": "299.99"},
    "createdAt": "2026-05-01T12:00:00.123456+00:00",
}

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)
json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
payloads = st.dictionaries(text, json, max_size=5)
zones = st.just(UTC) | st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
messages = st.builds(
    Message,
    id=st.uuids(),
    type=text,
    aggregate_type=text,
    aggregate_id=st.uuids(),
    payload=payloads,
    created_at=st.datetimes(timezones=zones),
    attempt=st.integers(1, MAX_ATTEMPT),
    headers=st.dictionaries(text.filter(lambda name: name not in ("event-id", "event-type", "attempt")), text),
)


@given(messages)
def test_what_is_encoded_decodes_to_the_same(message: Message) -> None:
    key, value, headers = message.encode()
    assert key == str(message.aggregate_id).encode()
    assert Message.decode(value, headers) == message


@given(messages)
def test_a_payload_as_text_is_carried_as_it_stands(message: Message) -> None:
    as_stored = Message(
        **{
            **{name: getattr(message, name) for name in Message.__slots__},
            "payload": orjson.dumps(message.payload).decode(),
        }
    )
    assert as_stored.encode() == message.encode()


def test_the_record_is_the_contract_s() -> None:
    key, value, headers = Message.decode(orjson.dumps(GOOD), [("attempt", b"2"), ("traceparent", b"00-ab")]).encode()
    assert key == ORDER.encode()
    assert orjson.loads(value) == GOOD
    assert headers == [
        ("event-id", EVENT.encode()),
        ("event-type", b"OrderCreated"),
        ("attempt", b"2"),
        ("traceparent", b"00-ab"),
    ]


record_headers = st.lists(st.tuples(st.sampled_from(["attempt", "event-id", "x"]) | st.text(), st.none() | st.binary()))
mutations = st.dictionaries(st.sampled_from(sorted(GOOD)), json, max_size=3)


@given(st.none() | st.binary() | json.map(orjson.dumps), record_headers)
def test_foreign_records_are_undecodable_and_nothing_worse(value: bytes | None, headers: list[Any]) -> None:
    with pytest.raises(Undecodable, match=r".+"):
        Message.decode(value, headers)


@given(mutations, record_headers)
def test_a_near_miss_is_an_event_that_keeps_its_ids_or_undecodable(changed: dict[str, Any], headers: list[Any]) -> None:
    document = GOOD | changed
    try:
        message = Message.decode(orjson.dumps(document), headers)
    except Undecodable:
        return
    assert (str(message.id), str(message.aggregate_id)) == (document["eventId"], document["aggregateId"])
    assert 1 <= message.attempt <= MAX_ATTEMPT
    assert message.created_at.tzinfo is not None
    message.encode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eventId", None),
        ("eventId", 7),
        ("eventId", "not-a-uuid"),
        ("eventId", EVENT.replace("-", "")),
        ("eventId", "{" + EVENT[1:35] + "}"),
        ("eventId", "0198f3a2_7c41-7b6e-9d0f-3a5c8e1b2d47"),
        ("eventId", "٠١٩٨f3a2-7c41-7b6e-9d0f-3a5c8e1b2d47"),
        ("aggregateId", {"id": ORDER}),
        ("eventType", ""),
        ("eventType", ["OrderCreated"]),
        ("eventType", "Order\0Created"),
        ("aggregateType", None),
        ("payload", None),
        ("payload", "{}"),
        ("payload", [1]),
        ("createdAt", None),
        ("createdAt", 1_777_000_000),
        ("createdAt", "yesterday"),
        ("createdAt", "2026-05-01T12:00:00"),
        ("createdAt", "9999-12-31T24:00:00+00:00"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(Undecodable, match=f"^{field}: "):
        Message.decode(orjson.dumps(GOOD | {field: value}), [])


@pytest.mark.parametrize(
    "attempt",
    [b"", b"0", b"-1", b"1.0", b"one", b"\xff", "١".encode(), b"2147483648", b"1" + b"0" * 5000, b"00000000001" + b"9" * 5000],
    ids=lambda value: value[:14].decode("ascii", "replace"),
)  # fmt: skip
def test_a_wrong_attempt_is_undecodable(attempt: bytes) -> None:
    with pytest.raises(Undecodable, match=r"^header attempt"):
        Message.decode(orjson.dumps(GOOD), [("attempt", attempt)])


def test_headers_that_are_no_text_still_decode() -> None:
    message = Message.decode(orjson.dumps(GOOD), [("x", b"\xff"), ("y", None)])  # type: ignore[list-item]
    assert message.headers == {"x": "\ufffd"}
    assert message.attempt == 1
    assert message.id == UUID(EVENT)


@pytest.mark.parametrize("value", [b"", b"[", b"[" * 100_000, b'"' + b"x" * 900_000 + b'"', b"\xff\xfe", b"{}", b"null"])
def test_records_of_every_wrong_kind(value: bytes) -> None:
    with pytest.raises(Undecodable):
        Message.decode(value, [])
