"""The order flow on procrastinate: the order and its job commit in one transaction.

python procrastinate_flow.py schema   its tables, once
python procrastinate_flow.py api      the API
python procrastinate_flow.py worker   a worker
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal

import uvloop
from aiohttp import web
from procrastinate import App, PsycopgConnector
from psycopg_pool import AsyncConnectionPool

DATABASE_URL = os.environ["DATABASE_URL"]
CONCURRENCY = 10
INSERT = "INSERT INTO orders (id, user_id, amount) VALUES (%s, %s, %s)"
MOVE = """UPDATE orders SET state = %(new)s, version = version + 1, updated_at = now()
          WHERE id = %(order_id)s AND state = %(old)s"""
POOL = web.AppKey("pool", AsyncConnectionPool)

# As its documentation has it for short jobs: a connection for each sub-worker, and one more.
app = App(connector=PsycopgConnector(conninfo=DATABASE_URL, min_size=CONCURRENCY + 1, max_size=CONCURRENCY + 1))


@app.task(name="pay", queue="payments")
async def pay(order_id: str) -> None:
    """CREATED -> PAYMENT_PENDING, the charge, -> PAID; a job that runs again changes nothing."""
    await move(order_id, "CREATED", "PAYMENT_PENDING")
    if await charge(order_id):
        await move(order_id, "PAYMENT_PENDING", "PAID")


async def move(order_id: str, old: str, new: str) -> None:
    """One transition and its commit."""
    await app.connector.execute_query_async(MOVE, order_id=order_id, old=old, new=new)


async def charge(order_id: str) -> bool:
    """The gateway: answers at once, and always yes."""
    return True


async def place(request: web.Request) -> web.Response:
    """POST /orders."""
    body, order_id = await request.json(), str(uuid.uuid4())
    async with request.app[POOL].connection() as connection:
        await connection.execute(INSERT, (order_id, uuid.UUID(body["userId"]), Decimal(str(body["amount"]))))
        await pay.configure(connection=connection).defer_async(order_id=order_id)
    answer = {"orderId": order_id, "state": "CREATED"}
    return web.json_response(answer, status=201, headers={"Location": f"/orders/{order_id}"})


async def pool(api: web.Application) -> AsyncIterator[None]:
    """The API's connections."""
    async with app.open_async(), AsyncConnectionPool(DATABASE_URL, min_size=8, max_size=16) as opened:
        api[POOL] = opened
        yield


async def schema() -> None:
    """Its tables."""
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


if __name__ == "__main__":
    match sys.argv[1]:
        case "schema":
            asyncio.run(schema())
        case "worker":
            app.run_worker(queues=["payments"], concurrency=CONCURRENCY)
        case "api":
            api = web.Application()
            api.cleanup_ctx.append(pool)
            api.router.add_post("/orders", place)
            port = int(os.environ["HTTP_PORT"])
            web.run_app(api, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop())
