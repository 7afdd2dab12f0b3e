"""Amounts of money, exact from the wire to the table: no float is ever made of one."""

from __future__ import annotations

import re
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any, Final

SMALLEST: Final = Decimal("0.01")
LARGEST: Final = Decimal("9999999999.99")

# [0-9], not \d: that would take every script's digits.
_TEXT = re.compile(r"[0-9]{1,10}(?:\.[0-9]{1,2})?")
_CENTS = Decimal("0.01")
_EXACT = Context(prec=12, traps=[Inexact, InvalidOperation])

WRONG_TYPE: Final = 'must be a number, or a string such as "299.99"'
WRONG_TEXT: Final = "must be digits with at most two decimals, such as 299.99"
TOO_FINE: Final = "must have at most two decimals"
OUT_OF_RANGE: Final = f"must be from {SMALLEST} to {LARGEST}"


def parse_amount(value: Any) -> Decimal:
    """The amount with exactly two decimals, from a decimal string or an exact number (int or Decimal).

    Numbers are judged by their value (1e1 is 10), strings by their form. Raises ValueError with words for people.
    """
    if isinstance(value, str):
        if _TEXT.fullmatch(value) is None:
            raise ValueError(WRONG_TEXT)
        number = Decimal(value)
    elif isinstance(value, Decimal):
        number = value
    elif isinstance(value, int) and not isinstance(value, bool):
        number = Decimal(value)
    else:
        raise ValueError(WRONG_TYPE)
    # The place of the first digit decides first: 1e400 has four hundred digits that nobody should write out.
    if not number.is_finite() or number.adjusted() > LARGEST.adjusted():
        raise ValueError(OUT_OF_RANGE)
    try:
        exact = number.quantize(_CENTS, context=_EXACT)
    except (Inexact, InvalidOperation):
        raise ValueError(TOO_FINE) from None
    if not SMALLEST <= exact <= LARGEST:
        raise ValueError(OUT_OF_RANGE)
    return exact
