"""The OpenAPI 3.1 document: schemas from the pydantic models, and every answer that each route gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import orjson
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from orderflow import __version__
from orderflow.orders import schemas
from orderflow.orders.idempotency import HEADER
from orderflow.orders.model import State
from orderflow.orders.paging import DEFAULT_LIMIT, LARGEST_LIMIT
from orderflow.orders.problems import CONTENT_TYPE

_RETRY: Final = {"Retry-After": ("seconds after which to try again", {"type": "integer", "minimum": 0})}
_ALLOW: Final = {"Allow": ("the methods that this address takes", {"type": "string"})}
_CHALLENGE: Final = {"WWW-Authenticate": ("the scheme that is asked for", {"type": "string"})}
_SCHEMES: Final = {
    "apiKey": {"type": "http", "scheme": "bearer", "description": "An API key as `orderflow keys new` prints it: `ofk_...`."}
}
_KEY: Final = r'^([!#-~][!-~]{0,254}|"([!#-\[\]-~]|\\["\\]){1,255}")$'
_ANSWERS: Final = (
    schemas.OrderPlaced, schemas.OrderView, schemas.OrderPage, schemas.Timeline, schemas.Live, schemas.Ready,
    schemas.ProblemDocument, schemas.FieldProblem, schemas.DatabaseProblem, schemas.NotReady,
)  # fmt: skip


def document(*, keys: bool = False) -> bytes:
    """The document as JSON; `keys`: of a process that asks for API keys."""
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(schemas.PlaceOrder, "validation")]
    wanted.extend((model, "serialization") for model in _ANSWERS)
    _, definitions = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "orderflow",
                "version": __version__,
                "summary": "Orders in, payments out, nothing lost, nothing twice.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "paths": _with_keys(_paths()) if keys else _paths(),
            "components": {"schemas": definitions["$defs"]} | ({"securitySchemes": _SCHEMES} if keys else {}),
        },
        option=orjson.OPT_INDENT_2,
    )


def _paths() -> dict[str, Any]:
    order_id = {
        "name": "order_id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"},
    }  # fmt: skip
    database = _problem(503, "The database does not answer.", schemas.DatabaseProblem, _RETRY)
    unknown = _problem(404, "There is no such order.")
    return {
        "/orders": {
            "post": _place(),
            "get": _get(
                "listOrders", "Orders, newest first.", "orders", _page_parameters(),
                _answer(200, "A page of orders.", schemas.OrderPage, {
                    "Link": ("the page that follows, where there is one", {"type": "string"})}),
                _problem(422, "A parameter is wrong.", schemas.FieldProblem), database,
            ),
        },
        "/orders/{order_id}": {
            "get": _get(
                "getOrder", "One order as it is now.", "orders", [order_id],
                _answer(200, "The order.", schemas.OrderView), unknown, database,
            ),
        },
        "/orders/{order_id}/events": {
            "get": _get(
                "getTimeline", "One order's transitions and events, oldest first.", "orders", [order_id],
                _answer(200, "The timeline.", schemas.Timeline), unknown, database,
            ),
        },
        "/livez": {
            "get": _get("live", "Whether the process runs.", "operations", [], _answer(200, "Yes.", schemas.Live)),
        },
        "/readyz": {
            "get": _get(
                "ready", "Whether to send requests here, and each dependency's state.", "operations", [],
                _answer(200, "They should.", schemas.Ready),
                _problem(503, "Not now.", schemas.NotReady, _RETRY),
            ),
        },
        "/metrics": {
            "get": _get(
                "metrics", "Counters and histograms in the Prometheus text format.", "operations", [],
                _content("The metrics.", "text/plain", {"type": "string"}),
            ),
        },
        "/openapi.json": {
            "get": _get(
                "openapi", "This document.", "operations", [],
                _content("OpenAPI 3.1.", "application/json", {"type": "object"}),
            ),
        },
    }  # fmt: skip


def _with_keys(paths: dict[str, Any]) -> dict[str, Any]:
    """The same paths, those of the orders behind the scheme."""
    refused = _problem(401, "There is no API key, or none that is known.", headers=_CHALLENGE)
    too_many = _problem(429, "The API key is used too often, or too many orders wait for their commit.", headers=_RETRY)
    for operation in (operation for path, item in paths.items() if path.startswith("/orders") for operation in item.values()):
        operation["security"] = [{"apiKey": []}]
        operation["responses"] |= refused | too_many
    return paths


def _place() -> dict[str, Any]:
    replayed = {"type": "string", "enum": ["true"]}
    headers = {
        "Location": ("where the order is", {"type": "string"}, True),
        "Idempotency-Replayed": ("there when an earlier request with this key placed the order", replayed),
    }
    return {
        "operationId": "placeOrder",
        "summary": "Place an order. The answer is sent after the order and its event are durable.",
        "tags": ["orders"],
        "parameters": [
            {
                "name": HEADER,
                "in": "header",
                "required": False,
                "description": "Bare or quoted. The same key and order within 24 hours give the first answer again.",
                "schema": {"type": "string", "pattern": _KEY, "maxLength": 512},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _reference(schemas.PlaceOrder)}},
        },
        "responses": _responses(
            _answer(201, "The order is placed.", schemas.OrderPlaced, headers),
            _problem(400, "The body is not JSON."),
            _problem(408, "The body did not arrive in time."),
            _problem(409, "The idempotency key is still in work.", schemas.FieldProblem, _RETRY),
            _problem(413, "The body has more than 65,536 bytes."),
            _problem(415, "The body is not JSON by its type."),
            _problem(422, "A field is wrong, or the key was used with another order.", schemas.FieldProblem),
            _problem(429, "Too many orders wait for their commit, or the oldest has waited too long.", headers=_RETRY),
            _problem(503, "The database does not answer.", schemas.DatabaseProblem, _RETRY),
        ),
    }  # fmt: skip


def _page_parameters() -> list[dict[str, Any]]:
    # An empty parameter, as a form sends it, is as if not given.
    empty = {"const": ""}
    limit = {"type": "integer", "minimum": 1, "maximum": LARGEST_LIMIT, "default": DEFAULT_LIMIT}
    described = (
        ("state", "Only orders in this state.", {"type": "string", "enum": ["", *State]}),
        ("limit", "Orders in an answer at the most.", {"anyOf": [limit, empty]}),
        ("after", "The `next` of the page before.", {"type": "string", "pattern": "^([A-Za-z0-9_-]{32})?$"}),
    )
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "allowEmptyValue": True,
            "description": text,
            "schema": schema,
        }
        for name, text, schema in described
    ]


def _get(name: str, summary: str, tag: str, parameters: Sequence[Any], *responses: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "tags": [tag],
        "parameters": list(parameters),
        "responses": _responses(*responses),
    }


def _responses(*responses: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for response in (*responses, _problem(405, "This address does not take that method.", headers=_ALLOW),
                     _problem(500, "Something went wrong here.")):  # fmt: skip
        merged.update(response)
    return merged


def _content(text: str, content_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"200": {"description": text, "content": {content_type: {"schema": schema}}}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _answer(
    status: int, text: str, model: type[BaseModel], headers: dict[str, Any] | None = None,
    content_type: str = "application/json",
) -> dict[str, Any]:  # fmt: skip
    answer: dict[str, Any] = {"description": text, "content": {content_type: {"schema": _reference(model)}}}
    if headers:
        answer["headers"] = {
            name: {"description": meaning, "schema": schema, "required": bool(required)}
            for name, (meaning, schema, *required) in headers.items()
        }
    return {str(status): answer}


def _problem(
    status: int,
    text: str,
    model: type[BaseModel] = schemas.ProblemDocument,
    headers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return _answer(status, text, model, headers, CONTENT_TYPE)
