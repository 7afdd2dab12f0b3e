"""The handlers of /orders: they translate between HTTP and the order service, and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar
from uuid import UUID

import orjson
from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from orderflow.engine.batcher import Overloaded
from orderflow.engine.patience import is_transient
from orderflow.engine.postgres import Database
from orderflow.orders import store
from orderflow.orders.answers import JSON, TIMES, created, event_view, shown
from orderflow.orders.api_keys import ApiKeys
from orderflow.orders.body import NotJson, parse
from orderflow.orders.idempotency import HEADER, parse_key
from orderflow.orders.model import path_to
from orderflow.orders.paging import encode_cursor, parse_page
from orderflow.orders.problems import (
    Problem,
    busy,
    database_unavailable,
    field_wrong,
)
from orderflow.orders.schemas import parse_uuid, place_order
from orderflow.orders.service import Backlogged, KeyInProgress, OrderService, Unavailable
from orderflow.orders.serving import MAX_BODY
from orderflow.orders.store import KeyReused, Placed

R = TypeVar("R")

# A backlog is worked off in minutes: to come back each second would only be more work.
BACKLOG_RETRY_SECONDS: Final = 5

# W3C trace context: version, trace id, parent id, flags. All zeros mean that there is none.
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class OrderRoutes:
    """The routes of /orders, behind `keys`. `request_timeout`: seconds for one request, body included.

    `database_failed` is told the error when PostgreSQL did not answer a request.
    """

    def __init__(
        self, service: OrderService, database: Database, keys: ApiKeys, *, request_timeout: float,
        database_failed: Callable[[BaseException], None] = lambda error: None,
    ) -> None:  # fmt: skip
        self._service = service
        self._database = database
        self._keys = keys
        self._timeout = request_timeout
        self._database_failed = database_failed

    def add_to(self, app: web.Application) -> None:
        """Add the routes to an application."""
        guard = self._keys.guard
        app.router.add_post("/orders", guard(self.place))
        app.router.add_get("/orders", guard(self.newest))
        app.router.add_get("/orders/{order_id}", guard(self.show))
        app.router.add_get("/orders/{order_id}/events", guard(self.timeline))

    async def place(self, request: web.Request) -> web.Response:
        """POST /orders."""
        headers = request.headers
        _require_json(headers)
        key = _key(request) if HEADER in headers else None
        if (request.content_length or 0) > MAX_BODY:
            raise _too_large()
        # Most bodies arrive with their head: those are here already, and need no timer of their own.
        deadline = None if request.content.is_eof() else asyncio.get_running_loop().time() + self._timeout
        body = await _read(request, deadline)
        try:
            document = parse(body)
        except NotJson as error:
            raise Problem(400, str(error), kind="not-json", title="Not JSON") from None
        user_id, amount = place_order(document)
        trace = headers.get("traceparent")
        try:
            placed = await self._service.place(
                user_id,
                amount,
                key,
                trace if trace and _TRACEPARENT.fullmatch(trace) else None,
                deadline,
            )
        except Overloaded:
            raise busy(
                429,
                "Too many orders wait for their commit; this one was not placed.",
                "overloaded",
                "Too many requests",
            ) from None
        except Backlogged as error:
            raise busy(
                429,
                f"The oldest order has waited for {error.age:.0f} s, too long to accept more; this one was not placed.",
                "backlogged",
                "Too many requests",
                retry_after=BACKLOG_RETRY_SECONDS,
            ) from None
        except Unavailable as error:
            self._database_failed(error.__cause__ or error)
            raise _unavailable(error, key) from error
        match placed:
            case Placed():
                return created(placed)
            case KeyReused():
                raise _conflict(422, "was used with another body; nothing was placed", "idempotency-key-reused")
            case KeyInProgress():
                raise _conflict(409, "belongs to a request that is still in work", "idempotency-key-in-use")

    async def show(self, request: web.Request) -> web.Response:
        """GET /orders/{id}."""
        order_id = _order_id(request)
        order = await self._ask(store.get(self._database, order_id))
        if order is None:
            raise _unknown(order_id)
        return web.Response(body=orjson.dumps(shown(order), option=TIMES), headers=JSON)

    async def timeline(self, request: web.Request) -> web.Response:
        """GET /orders/{id}/events."""
        order_id = _order_id(request)
        order = await self._ask(store.get(self._database, order_id))
        if order is None:
            raise _unknown(order_id)
        events = await self._ask(store.timeline(self._database, order_id))
        states = path_to(order.state, order.version)
        document = {
            "orderId": str(order.id),
            "transitions": [
                {"state": state, "version": version, "at": at}
                for version, (state, at) in enumerate(zip(states, order.entered_at, strict=True), start=1)
            ],
            "events": [event_view(event) for event in events],
            "retiredAt": order.retired_at,
        }
        return web.Response(body=orjson.dumps(document, option=TIMES), headers=JSON)

    async def newest(self, request: web.Request) -> web.Response:
        """GET /orders."""
        page = parse_page(request.query)
        # One more than asked for shows whether another page follows.
        found = await self._ask(store.newest(self._database, state=page.state, limit=page.limit + 1, after=page.after))
        orders = found[: page.limit]
        headers = dict(JSON)
        cursor = None
        if len(found) > page.limit:
            cursor = encode_cursor(orders[-1].created_at, orders[-1].id)
            following = {
                "state": page.state.value if page.state else "",
                "limit": str(page.limit),
                "after": cursor,
            }
            target = request.rel_url.with_path("/orders").with_query({n: v for n, v in following.items() if v})
            headers["Link"] = f'<{target.raw_path_qs}>; rel="next"'
        document = {"orders": [shown(order) for order in orders], "next": cursor}
        return web.Response(body=orjson.dumps(document, option=TIMES), headers=headers)

    async def _ask(self, answer: Awaitable[R]) -> R:
        """What a query answers; raises Problem (503) when PostgreSQL does not within the request's time."""
        try:
            async with asyncio.timeout(self._timeout):
                return await answer
        except Exception as error:
            if not is_transient(error):
                raise
            self._database_failed(error)
            raise database_unavailable() from error


def _require_json(headers: Any) -> None:
    given = headers.get("Content-Type", "")
    if given != "application/json" and given.partition(";")[0].strip().lower() != "application/json":
        raise Problem(
            415,
            f"Content-Type: must be application/json, not {given[:64]!r}.",
            headers={"Accept": "application/json"},
        )
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem(
            415,
            "Content-Encoding: compressed bodies are not taken here.",
            headers={"Accept-Encoding": "identity"},
        )


def _key(request: web.Request) -> str:
    given = request.headers.getall(HEADER)
    try:
        if len(given) > 1:
            raise ValueError("may be given once")
        return parse_key(given[0])
    except ValueError as error:
        raise field_wrong(HEADER, str(error)) from None


async def _read(request: web.Request, deadline: float | None) -> bytes:
    try:
        if deadline is None:
            return await request.read()
        async with asyncio.timeout_at(deadline):
            return await request.read()
    except TimeoutError:
        raise Problem(408, "The body did not arrive in time; nothing was placed.", close=True) from None
    except web.HTTPRequestEntityTooLarge:
        raise _too_large() from None
    except RequestPayloadError:
        raise Problem(400, "The body's transfer encoding is malformed.", close=True) from None


def _too_large() -> Problem:
    return Problem(413, f"The body may have {MAX_BODY} bytes at the most.", close=True)


def _conflict(status: int, message: str, kind: str) -> Problem:
    errors = [{"field": HEADER, "message": message}]
    detail = f"{HEADER}: {message}"
    if status == 409:
        return busy(409, detail, kind, "The idempotency key is in use", errors=errors)
    return Problem(status, detail, kind=kind, title="The idempotency key was used before", errors=errors)


def _unavailable(error: Unavailable, key: str | None) -> Problem:
    if error.order_id is None:
        return database_unavailable("The database does not answer; nothing was placed.")
    advice = f"send the request again with the same {HEADER}" if key else "look for orderId before sending it again"
    return database_unavailable(
        f"The connection was lost while the order was being committed, so it may have been placed: {advice}.",
        orderId=str(error.order_id),
    )


def _order_id(request: web.Request) -> UUID:
    text = request.match_info["order_id"]
    try:
        return parse_uuid(text)
    except ValueError:
        raise _unknown(text) from None


def _unknown(order_id: UUID | str) -> Problem:
    shown = order_id if isinstance(order_id, UUID) else "this id"
    return Problem(404, f"There is no order {shown}." if shown is order_id else "There is no order with this id.")
