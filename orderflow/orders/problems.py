"""Errors as RFC 9457 problem documents: ours, aiohttp's own, and what nobody expected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import orjson
from aiohttp import web

from orderflow.engine.telemetry import API, emit

CONTENT_TYPE: Final = "application/problem+json"
SERVER: Final = "orderflow"
RETRY_AFTER_SECONDS: Final = 1

Handle = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

# Errors that mean no more than their status have the type that RFC 9457 reserves for that.
PLAIN: Final = "about:blank"
TYPES: Final = "urn:orderflow:problem:"


class Problem(Exception):
    """An error answer. `kind` ends its type; None for one that means no more than its status."""

    def __init__(
        self, status: int, detail: str, *, kind: str | None = None, title: str | None = None,
        headers: Mapping[str, str] | None = None, close: bool = False, **members: Any,
    ) -> None:  # fmt: skip
        super().__init__(detail)
        self.status = status
        self.headers = dict(headers or {})
        self.close = close
        self.document: dict[str, Any] = {
            "type": TYPES + kind if kind else PLAIN,
            "title": title or HTTPStatus(status).phrase,
            "status": status,
            "detail": detail,
            **members,
        }

    def response(self, instance: str | None = None) -> web.Response:
        """The answer; `instance` is the path that was asked for."""
        document = self.document if instance is None else {**self.document, "instance": instance}
        answer = web.Response(
            body=orjson.dumps(document),
            status=self.status,
            headers={**self.headers, "Content-Type": CONTENT_TYPE, "Server": SERVER},
        )
        if self.close:
            answer.force_close()
        return answer


def fields_wrong(errors: Sequence[tuple[str, str]]) -> Problem:
    """422: each field or parameter that is wrong, with a sentence on what it may be."""
    return Problem(
        422,
        "; ".join(f"{field}: {message}" for field, message in errors),
        kind="field-wrong",
        title="A field is wrong",
        errors=[{"field": field, "message": message} for field, message in errors],
    )


def field_wrong(field: str, message: str) -> Problem:
    """422 for one field, header or parameter."""
    return fields_wrong([(field, message)])


def busy(status: int, detail: str, kind: str, title: str, *, retry_after: int = RETRY_AFTER_SECONDS, **members: Any) -> Problem:
    """An error that passes by itself, with Retry-After in seconds."""
    return Problem(status, detail, kind=kind, title=title, headers={"Retry-After": str(retry_after)}, **members)


def database_unavailable(detail: str = "The database does not answer; try again.", **members: Any) -> Problem:
    """503, and nothing was changed unless `detail` says otherwise."""
    return busy(503, detail, "database-unavailable", "The database is not available", **members)


def with_problems(handle: Handle) -> Handle:
    """A request handler whose every error, and every error of aiohttp's routing, is answered by a problem document."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handle(request)
        except Problem as problem:
            return problem.response(request.rel_url.raw_path)
        except web.HTTPException as error:
            return _of_aiohttp(request, error)
        except Exception as error:
            if isinstance(error, ConnectionError) and request.transport is None:
                # The caller has gone before its request was whole: nobody reads this, and nothing was begun.
                return Problem(400, "The request ended early.", close=True).response()
            return _unexpected(request, error)

    return answer


def _of_aiohttp(request: web.BaseRequest, error: web.HTTPException) -> web.Response:
    path = request.rel_url.raw_path
    if isinstance(error, web.HTTPMethodNotAllowed):
        allow = ", ".join(sorted({*error.allowed_methods, "OPTIONS"}))
        if request.method == "OPTIONS":
            return web.Response(status=204, headers={"Allow": allow, "Server": SERVER})
        detail = f"This address takes {allow}."
        return Problem(405, detail, headers={"Allow": allow}).response(path)
    if error.status == 404:
        return Problem(404, "There is nothing at this address.").response(path)
    return Problem(error.status, error.reason).response(path)


def _unexpected(request: web.BaseRequest, error: Exception) -> web.Response:
    # The first line only: what follows it in a database's error may hold a row's values.
    first = str(error).partition("\n")[0][:200]
    emit(
        API,
        "REQUEST_ERROR",
        method=request.method,
        path=request.path[:200],
        error=f"{type(error).__name__}: {first}",
    )
    return Problem(500, "Something went wrong here; it has been noted.").response(request.rel_url.raw_path)
