"""The order flow on Celery and Redis. The row is committed and then the task is sent: a crash in between strands the order.

python celery_redis.py                    the API
python -m celery -A celery_redis worker   the worker, prefork, one process a core
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from decimal import Decimal

import psycopg
import uvloop
from aiohttp import web
from celery import Celery
from celery.signals import worker_process_init
from psycopg_pool import AsyncConnectionPool

DATABASE_URL = os.environ["DATABASE_URL"]
INSERT = "INSERT INTO orders (id, user_id, amount) VALUES (%s, %s, %s)"
MOVE = "UPDATE orders SET state = %s, version = version + 1, updated_at = now() WHERE id = %s AND state = %s"
POOL = web.AppKey("pool", AsyncConnectionPool)

celery = Celery("orders", broker=os.environ["REDIS_URL"])
celery.conf.update(
    # Without these two a task is lost with the worker that took it.
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=64,  # its documentation's value for short tasks
)
database: psycopg.Connection


@worker_process_init.connect
def connect(**_: object) -> None:
    """One connection a worker process; none may cross the fork."""
    global database
    database = psycopg.connect(DATABASE_URL, autocommit=True)


@celery.task(name="pay")
def pay(order_id: str) -> None:
    """CREATED -> PAYMENT_PENDING, the charge, -> PAID; a task that runs again changes nothing."""
    move(order_id, "CREATED", "PAYMENT_PENDING")
    if charge(order_id):
        move(order_id, "PAYMENT_PENDING", "PAID")


def move(order_id: str, old: str, new: str) -> None:
    """One transition and its commit."""
    database.execute(MOVE, (new, order_id, old))


def charge(order_id: str) -> bool:
    """The gateway: answers at once, and always yes."""
    return True


async def place(request: web.Request) -> web.Response:
    """POST /orders."""
    body, order_id = await request.json(), str(uuid.uuid4())
    async with request.app[POOL].connection() as connection:
        await connection.execute(INSERT, (order_id, uuid.UUID(body["userId"]), Decimal(str(body["amount"]))))
    pay.delay(order_id)
    answer = {"orderId": order_id, "state": "CREATED"}
    return web.json_response(answer, status=201, headers={"Location": f"/orders/{order_id}"})


async def pool(app: web.Application) -> AsyncIterator[None]:
    """The API's connections."""
    async with AsyncConnectionPool(DATABASE_URL, min_size=8, max_size=16, kwargs={"autocommit": True}) as opened:
        app[POOL] = opened
        yield


if __name__ == "__main__":
    api = web.Application()
    api.cleanup_ctx.append(pool)
    api.router.add_post("/orders", place)
    port = int(os.environ["HTTP_PORT"])
    web.run_app(api, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop())
