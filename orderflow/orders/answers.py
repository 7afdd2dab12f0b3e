"""Answers about orders as JSON, in the shapes that schemas.py describes; built by hand, as every request pays for it."""

from __future__ import annotations

from typing import Any, Final

import asyncpg
import orjson
from aiohttp import web

from orderflow.orders.problems import SERVER
from orderflow.orders.store import Order, Placed

# (orjson takes uuid.UUID and refuses asyncpg's subclass of it: ids are written as text.)
TIMES: Final = orjson.OPT_UTC_Z
JSON: Final = {"Content-Type": "application/json", "Server": SERVER}


def created(placed: Placed) -> web.Response:
    """201; a replay differs from the first answer in one header only."""
    order_id = str(placed.order_id)
    body = orjson.dumps(
        {
            "orderId": order_id,
            "state": "CREATED",
            "version": 1,
            "userId": str(placed.user_id),
            "amount": str(placed.amount),
            "createdAt": placed.created_at,
        },
        option=TIMES,
    )
    headers = {**JSON, "Location": f"/orders/{order_id}"}
    if placed.replayed:
        headers["Idempotency-Replayed"] = "true"
    return web.Response(body=body, status=201, headers=headers)


def shown(order: Order) -> dict[str, Any]:
    """OrderView."""
    return {
        "id": str(order.id),
        "userId": str(order.user_id),
        "state": order.state,
        "version": order.version,
        "amount": str(order.amount),
        "failure": order.failure,
        "createdAt": order.created_at,
        "updatedAt": order.updated_at,
    }


def event_view(event: asyncpg.Record) -> dict[str, Any]:
    """EventView, from a row of store.timeline."""
    return {
        "eventId": str(event["event_id"]),
        "eventType": event["event_type"],
        "payload": orjson.Fragment(event["payload"]),
        "createdAt": event["created_at"],
        "publishedAt": event["published_at"],
        "processedAt": event["processed_at"],
        "workerId": event["worker_id"],
        "attempt": event["attempt"],
        "failures": orjson.Fragment(event["failures"] or "[]"),
        "buriedAt": event["buried_at"],
        "reason": event["reason"],
    }
