"""What a request is made of, apart from its amount: strict JSON, the idempotency key, the cursor."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import MultiDict

from orderflow.orders.body import NotJson, parse, printable
from orderflow.orders.idempotency import parse_key, request_hash
from orderflow.orders.paging import decode_cursor, encode_cursor, parse_page
from orderflow.orders.problems import Problem
from orderflow.orders.schemas import parse_uuid


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_what_json_writes_is_read(document: object) -> None:
    assert parse(json.dumps(document).encode()) == document


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"{'a': 1}", "not JSON"), (b'{"a": 1,}', "not JSON"), (b"01", "not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"), (b"-Infinity", "-Infinity is not a JSON number"),
        (b'{"a": 1, "b": 2, "a": 1}', "gives 'a' twice"), (b'[{"x": {"a": 1, "a": 2}}]', "gives 'a' twice"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 7)"), (b"\xef\xbb\xbf{}", "not JSON"), ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\x00"}', "not JSON"), (b"{}\x00", "not JSON"), (b"[" * 65_000, "nested too deeply"),
        (b'{"a":' * 10_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(NotJson) as refused:
        parse(body)
    assert said in str(refused.value)


def test_a_name_from_outside_is_made_printable() -> None:
    assert printable("a" * 100) == "a" * 64 + "…"
    assert printable("\ud800x").encode() == b"?x"


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("abc", "abc"), ('"abc"', "abc"), ('  "abc" ', "abc"), (r'"a\"b\\c"', r'a"b\c'), ('a"b', 'a"b'), (r"a\b", r"a\b"),
        ("x" * 255, "x" * 255), ('"a b"', "a b"), ('"' + "x" * 255 + '"', "x" * 255),
    ],
)  # fmt: skip
def test_quoted_and_bare_forms_are_one_key(header: str, key: str) -> None:
    assert parse_key(header) == key


@pytest.mark.parametrize(
    "header",
    ["", " ", '""', '"', '"abc', '"abc"x', r'"a\b"', "a b", "é", "a\x00b", "a\tb", "x" * 256, '"' + "x" * 256 + '"'],
)
def test_what_is_not_a_key_is_refused(header: str) -> None:
    with pytest.raises(ValueError, match="1 to 255 ASCII"):
        parse_key(header)


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255))
def test_every_visible_key_has_a_quoted_form(key: str) -> None:
    assert parse_key('"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"') == key


def test_one_request_has_one_hash() -> None:
    user = uuid4()
    assert request_hash(user, Decimal("10.00")) == request_hash(UUID(str(user).upper()), Decimal("10.00"))
    assert request_hash(user, Decimal("10.00")) != request_hash(user, Decimal("100.00"))
    assert request_hash(user, Decimal("10.00")) != request_hash(uuid4(), Decimal("10.00"))


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "3f0c8a526d1e4b7f9a430c5d2e8f7b61", "{3f0c8a52-6d1e-4b7f-9a43-0c5d2e8f7b61}",
        "3f0c8a52-6d1e-4b7f-9a43-0c5d2e8f7b6\n", "3f0c8a5-26d1e-4b7f-9a43-0c5d2e8f7b61",
        "urn:uuid:3f0c8a52-6d1e-4b7f-9a43-0c5d2e8f7b61", "３f0c8a52-6d1e-4b7f-9a43-0c5d2e8f7b61",
    ],
)  # fmt: skip
def test_only_the_usual_form_is_a_uuid(text: str) -> None:
    with pytest.raises(ValueError, match="must be a UUID"):
        parse_uuid(text)


@given(st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)), st.uuids())  # noqa: DTZ001
def test_a_cursor_is_the_place_it_was_made_of(created_at: datetime, order_id: UUID) -> None:
    assert decode_cursor(encode_cursor(created_at, order_id)) == (created_at, order_id)


@given(st.binary(min_size=24, max_size=24))
def test_every_cursor_of_the_right_form_is_a_place(raw: bytes) -> None:
    created_at, order_id = decode_cursor(base64.urlsafe_b64encode(raw).decode())
    assert created_at.tzinfo is UTC
    assert order_id.bytes == raw[8:]


@given(st.text(max_size=40).filter(lambda text: len(text) != 32))
def test_anything_else_is_no_cursor(text: str) -> None:
    with pytest.raises(ValueError, match="must be the `next`"):
        decode_cursor(text)


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ({"limit": "0"}, ["limit"]), ({"limit": "501"}, ["limit"]), ({"limit": "-1"}, ["limit"]), ({"limit": "٥"}, ["limit"]),
        ({"limit": "1.0"}, ["limit"]), ({"limit": "9" * 5000}, ["limit"]), ({"state": "paid"}, ["state"]),
        ({"state": "PAID\x00"}, ["state"]), ({"after": "AAAA"}, ["after"]),
        ({"state": "x", "limit": "x", "after": "x"}, ["state", "limit", "after"]),
    ],
)  # fmt: skip
def test_each_wrong_parameter_is_named(query: dict[str, str], fields: list[str]) -> None:
    with pytest.raises(Problem) as refused:
        parse_page(MultiDict(query))
    assert [error["field"] for error in refused.value.document["errors"]] == fields
    assert all(field in refused.value.document["detail"] for field in fields)


def test_a_parameter_given_twice_is_refused_and_an_empty_one_is_not_given() -> None:
    with pytest.raises(Problem):
        parse_page(MultiDict([("limit", "5"), ("limit", "6")]))
    page = parse_page(MultiDict([("state", ""), ("limit", ""), ("after", "")]))
    assert (page.state, page.limit, page.after) == (None, 50, None)
