"""Query parameters of GET /orders, and its opaque keyset cursor."""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar
from uuid import UUID

from multidict import MultiMapping

from orderflow.orders.model import State
from orderflow.orders.problems import field_wrong, fields_wrong

DEFAULT_LIMIT: Final = 50
LARGEST_LIMIT: Final = 500

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CURSOR = struct.Struct(">q16s")
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST = (datetime(1, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LATEST = (datetime(9999, 12, 31, tzinfo=UTC) - _EPOCH) // _MICROSECOND
_LIMIT = re.compile(r"[0-9]{1,3}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page:
    """What is asked for: orders in `state` (None: all), at most `limit`, that come after `after`."""

    state: State | None
    limit: int
    after: tuple[datetime, UUID] | None


def parse_page(query: MultiMapping[str]) -> Page:
    """The parameters; an empty one is as if not given. Raises Problem (422) that names each wrong one."""
    wrong: list[tuple[str, str]] = []

    def read(name: str, parse: Callable[[str], T], default: T) -> T:
        given = query.getall(name, ())
        if len(given) > 1:
            wrong.append((name, "may be given once"))
        elif given and given[0]:
            try:
                return parse(given[0])
            except ValueError as error:
                wrong.append((name, str(error)))
        return default

    page = Page(read("state", _state, None), read("limit", _limit, DEFAULT_LIMIT), read("after", decode_cursor, None))
    if wrong:
        raise field_wrong(*wrong[0]) if len(wrong) == 1 else fields_wrong(wrong)
    return page


def encode_cursor(created_at: datetime, order_id: UUID) -> str:
    """The cursor of the orders that come after this one."""
    microseconds = (created_at - _EPOCH) // _MICROSECOND
    return base64.urlsafe_b64encode(_CURSOR.pack(microseconds, order_id.bytes)).decode("ascii")


def decode_cursor(text: str) -> tuple[datetime, UUID]:
    """The place that a cursor stands for. Raises ValueError for what encode_cursor has not made."""
    try:
        microseconds, order_id = _CURSOR.unpack(base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, struct.error):
        raise ValueError("must be the `next` of an earlier answer") from None
    # Whatever eight bytes say is a time; those that no calendar has come before or after all orders.
    return _EPOCH + min(max(microseconds, _EARLIEST), _LATEST) * _MICROSECOND, UUID(bytes=order_id)


def _state(text: str) -> State:
    try:
        return State(text)
    except ValueError:
        raise ValueError(f"must be one of {', '.join(State)}") from None


def _limit(text: str) -> int:
    if _LIMIT.fullmatch(text) is None or not 1 <= int(text) <= LARGEST_LIMIT:
        raise ValueError(f"must be a whole number from 1 to {LARGEST_LIMIT}")
    return int(text)
