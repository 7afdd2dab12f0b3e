"""Amounts: exact by value, strict by form, and never written out when they are huge."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.orders.amounts import LARGEST, OUT_OF_RANGE, SMALLEST, TOO_FINE, WRONG_TEXT, WRONG_TYPE, parse_amount
from orderflow.orders.body import parse

in_range = st.decimals(SMALLEST, LARGEST, places=2)


@pytest.mark.parametrize(
    ("given_json", "amount"),
    [
        ("0.01", "0.01"), ("299.99", "299.99"), ("10", "10.00"), ("1e1", "10.00"), ("1E-2", "0.01"), ("10.000", "10.00"),
        ("9999999999.99", "9999999999.99"), ('"10.00"', "10.00"), ('"10"', "10.00"), ('"10.5"', "10.50"),
        ('"0000000007.10"', "7.10"), ("0.1e1", "1.00"), ("10.00" + "0" * 5000, "10.00"),
    ],
)  # fmt: skip
def test_taken(given_json: str, amount: str) -> None:
    assert str(parse_amount(parse(given_json.encode()))) == amount


@pytest.mark.parametrize(
    ("given_json", "message"),
    [
        ("0", OUT_OF_RANGE), ("-0", OUT_OF_RANGE), ("0.00", OUT_OF_RANGE), ("-1", OUT_OF_RANGE), ("0.001", TOO_FINE),
        ("10.005", TOO_FINE), ("10.00" + "0" * 5000 + "1", TOO_FINE), ("10000000000", OUT_OF_RANGE),
        ("9999999999.991", TOO_FINE), ("1e400", OUT_OF_RANGE), ("1e999999999999999999", OUT_OF_RANGE),
        ("1e99999999999999999999999", OUT_OF_RANGE), ("-1e400", OUT_OF_RANGE), ("1e-400", TOO_FINE),
        ("9" * 60_000, OUT_OF_RANGE), ("0e999999999999999999", OUT_OF_RANGE),
        ('"0"', OUT_OF_RANGE), ('"0.00"', OUT_OF_RANGE), ('"-1"', WRONG_TEXT), ('"+1"', WRONG_TEXT), ('"1e1"', WRONG_TEXT),
        ('"10.000"', WRONG_TEXT), ('"10.005"', WRONG_TEXT), ('".5"', WRONG_TEXT), ('"5."', WRONG_TEXT), ('""', WRONG_TEXT),
        ('" 10"', WRONG_TEXT), ('"10\\n"', WRONG_TEXT), ('"1,000.00"', WRONG_TEXT), ('"1_0"', WRONG_TEXT),
        ('"10000000000"', WRONG_TEXT), ('"NaN"', WRONG_TEXT), ('"Infinity"', WRONG_TEXT), ('"\\u0661\\u0662"', WRONG_TEXT),
        ('"10\\u0000"', WRONG_TEXT), ("true", WRONG_TYPE), ("false", WRONG_TYPE), ("null", WRONG_TYPE), ("[]", WRONG_TYPE),
        ('{"value": 1}', WRONG_TYPE), ("[10]", WRONG_TYPE),
    ],
)  # fmt: skip
def test_refused(given_json: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_amount(parse(given_json.encode()))
    assert str(refused.value) == message


def test_a_float_never_gets_in() -> None:
    with pytest.raises(ValueError, match="must be a number"):
        parse_amount(10.0)


@given(in_range)
def test_every_amount_survives_as_number_and_as_text(amount: Decimal) -> None:
    assert parse_amount(parse(str(amount).encode())) == amount
    assert str(parse_amount(parse(json.dumps(f"{amount:f}").encode()))) == f"{amount:.2f}"


@given(in_range, st.integers(-30, 30))
def test_the_way_a_number_is_written_does_not_count(amount: Decimal, shift: int) -> None:
    written = f"{amount.scaleb(-shift):f}e{shift}"
    assert parse_amount(parse(written.encode())) == amount


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_a_number_is_taken_exactly_if_it_is_in_range_and_whole_cents(number: Decimal) -> None:
    fits = SMALLEST <= number <= LARGEST and number * 100 % 1 == 0
    try:
        taken: Any = parse_amount(number)
    except ValueError:
        taken = None
    assert (taken == number and taken.as_tuple().exponent == -2) if fits else taken is None


@given(st.one_of(st.text(max_size=16), st.from_regex(r"\s?[+-]?\d{1,12}(\.\d{1,4})?(e\d)?\s?")))
def test_a_text_is_taken_only_in_the_one_form(text: str) -> None:
    whole, point, cents = text.partition(".")
    digits = set("0123456789")
    form = 1 <= len(whole) <= 10 and set(whole + cents) <= digits and (1 <= len(cents) <= 2 if point else not cents)
    try:
        taken, said = parse_amount(text), ""
    except ValueError as error:
        taken, said = None, str(error)
    if taken is None:
        assert said == (OUT_OF_RANGE if form else WRONG_TEXT)
    else:
        assert form
        assert taken == Decimal(text)
