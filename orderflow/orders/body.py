"""A request's body as JSON, strictly: what two parsers could read in two ways is refused."""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import orjson

# How deep json.loads can go before it runs out of stack differs from one Python to the next; this is safe in all of them.
MOST_BRACKETS: Final = 500


class NotJson(ValueError):
    """The body is not JSON that everybody reads alike; the text says why."""


def parse(body: bytes) -> Any:
    """The JSON value of a UTF-8 body; every number as an exact Decimal.

    Raises NotJson for what is not JSON, for bytes that are not UTF-8, NaN and Infinity, a name given twice in one
    object, and more objects and arrays than any request of ours has.
    """
    # Four texts and nothing to unescape: if these are two names with a text each, no name can be there twice and no number can
    # lose digits, and the fast parser reads it like the strict one.
    if body.count(b'"') == 8 and b"\\" not in body:
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = None  # the strict one says what is wrong
        if isinstance(document, dict) and len(document) == 2 and all(type(value) is str for value in document.values()):
            return document
    try:
        # Decoded here: json.loads would accept UTF-16 and UTF-32 as well.
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"the body is not UTF-8 (byte {error.start})") from None
    if text.count("[") + text.count("{") > MOST_BRACKETS:
        raise NotJson("the body is nested too deeply")
    try:
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise NotJson(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None


def printable(text: str, longest: int = 64) -> str:
    """A name from a body, fit for an answer: short, and without what no encoder takes (lone surrogates)."""
    cut = text if len(text) <= longest else text[:longest] + "…"
    return cut.encode("utf-8", "replace").decode("utf-8")


def _number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        # An exponent of twenty digits is JSON all right; NaN makes every check of a value refuse it.
        return Decimal("NaN")


def _refuse(name: str) -> Any:
    raise NotJson(f"the body is not JSON: {name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise NotJson(f"the body gives {printable(name)!r} twice")
            seen.add(name)
    return members


# Made once: json.loads makes one for each call that has options.
_DECODER: Final = json.JSONDecoder(parse_float=_number, parse_int=_number, parse_constant=_refuse, object_pairs_hook=_object)
