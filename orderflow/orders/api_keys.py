"""API keys: who may use /orders, and how often.

A key is 32 random bytes, and what is kept of it is its SHA-256. A slow hash, made for passwords, would add nothing: no
list of likely keys exists to be tried, and 2**256 cannot be tried at any speed; it would only make each request dear.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from orderflow.orders.problems import Problem

PREFIX: Final = "ofk_"
# Of a digest: tells the entries apart, and says nothing about the key.
_SHORT: Final = 8
_ENTRY: Final = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-f]{64})")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WrongKeys(ValueError):
    """The list of keys cannot be used; the text says which entry and why, and never shows what stands there."""


def new_key(name: str) -> tuple[str, str]:
    """A new key and its entry for the list: the key is for its user alone, the entry does not give it away.

    Raises WrongKeys for a name that no entry can have.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    entry = f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _ENTRY.fullmatch(entry):
        raise WrongKeys("a name is 1 to 64 letters, digits, dots, hyphens and underscores")
    return key, entry


@dataclass(slots=True)
class _Holder:
    """A key's name and digest, and its token bucket: `tokens` at the time `at` (seconds, monotonic)."""

    name: str
    digest: bytes
    tokens: float
    at: float


class ApiKeys:
    """The keys that are taken, and each one's rate: `rate` requests a second in this process, 0 for no limit.

    A key that was idle may send a second's worth at once.
    """

    def __init__(self, entries: str, rate: float = 0.0) -> None:
        """`entries`: `name:sha256`, separated by commas or line ends; what follows a # is a comment. Raises WrongKeys."""
        self._rate = rate
        self._most = max(1.0, rate)
        self._holders: dict[bytes, _Holder] = {}
        for number, text in enumerate(_split(entries), start=1):
            match = _ENTRY.fullmatch(text)
            if match is None:
                raise WrongKeys(f"entry {number} is not name:sha256 in hexadecimal; `orderflow keys new NAME` makes one")
            digest = bytes.fromhex(match["digest"])
            if digest[:_SHORT] in self._holders:
                raise WrongKeys(f"entry {number} is there twice")
            self._holders[digest[:_SHORT]] = _Holder(match["name"], digest, self._most, time.monotonic())

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def names(self) -> list[str]:
        """Whose keys these are; a name may stand there twice, while its key is being changed."""
        return [holder.name for holder in self._holders.values()]

    def admit(self, authorization: str | None) -> float | None:
        """What becomes of a request with this Authorization header.

        None: it is taken, and counted. Otherwise the seconds after which its key may be used again. Raises Problem (401)
        without a key that is known.
        """
        holder = self._holder(authorization)
        if not self._rate:
            return None
        now = time.monotonic()
        holder.tokens = min(self._most, holder.tokens + (now - holder.at) * self._rate)
        holder.at = now
        if holder.tokens < 1.0:
            return (1.0 - holder.tokens) / self._rate
        holder.tokens -= 1.0
        return None

    def _holder(self, authorization: str | None) -> _Holder:
        if authorization is None:
            raise _unauthorized("This address wants an API key: `Authorization: Bearer ofk_...`.", "")
        scheme, _, key = authorization.partition(" ")
        # Bytes that are no UTF-8 reach us as surrogates: a wrong key like any other.
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogatepass")).digest()
        holder = self._holders.get(digest[:_SHORT])
        # The look-up tells, by its time, at the most whether a digest begins like one of ours: nothing of a key.
        if holder is None or not hmac.compare_digest(holder.digest, digest) or scheme.lower() != "bearer":
            raise _unauthorized("This API key is not known here.", ', error="invalid_token"')
        return holder

    def guard(self, handler: Handler) -> Handler:
        """The handler behind the keys; the handler itself where there are none, so that they cost nothing."""
        if not self._holders:
            return handler

        async def guarded(request: web.Request) -> web.StreamResponse:
            wait = self.admit(request.headers.get("Authorization"))
            if wait is not None:
                raise Problem(
                    429, f"This API key may send {self._rate:g} requests a second to this process.", kind="rate-limited",
                    title="Too many requests", headers={"Retry-After": str(int(wait) + 1)},
                )  # fmt: skip
            return await handler(request)

        return guarded


def _split(entries: str) -> Iterator[str]:
    for line in entries.splitlines():
        for text in line.partition("#")[0].split(","):
            if text.strip():
                yield text.strip()


def _unauthorized(detail: str, error: str) -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": f'Bearer realm="orderflow"{error}'})
