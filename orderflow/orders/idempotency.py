"""The Idempotency-Key header (draft-ietf-httpapi-idempotency-key-header), and what of a request belongs to it."""

from __future__ import annotations

import re
from decimal import Decimal
from hashlib import sha256
from typing import Final
from uuid import UUID

HEADER: Final = "Idempotency-Key"
WRONG_KEY: Final = "must be 1 to 255 ASCII characters, visible ones when bare, spaces as well in double quotes"

# A quoted key is an RFC 8941 string: a backslash stands before each quote and each backslash in it.
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_ESCAPED = re.compile(r'\\(["\\])')
_BARE = re.compile(r"[!-~]{1,255}")
_PRINTABLE = re.compile(r"[ -~]{1,255}")


def parse_key(header: str) -> str:
    """The key of a header value; quoted and bare forms of a text are the same key. Raises ValueError."""
    key = header.strip(" \t")
    allowed = _BARE
    if key.startswith('"'):
        quoted = _QUOTED.fullmatch(key)
        if quoted is None:
            raise ValueError(WRONG_KEY)
        key, allowed = _ESCAPED.sub(r"\1", quoted[1]), _PRINTABLE
    if allowed.fullmatch(key) is None:
        raise ValueError(WRONG_KEY)
    return key


def request_hash(user_id: UUID, amount: Decimal) -> bytes:
    """32 bytes that are equal for requests that ask for the same order, however their JSON is written."""
    return sha256(user_id.bytes + b"|" + str(amount).encode("ascii")).digest()
