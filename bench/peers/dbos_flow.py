"""The order flow on DBOS, both ways of its documentation's page on the transactional outbox.

python dbos_flow.py schema   its tables, once
python dbos_flow.py start    the API; its own process runs the workflow, whose first step inserts the order
python dbos_flow.py api      the API; inserts the order and enqueues the workflow in one transaction
python dbos_flow.py worker   the queue's worker
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import uuid

import uvloop
from aiohttp import web
from dbos import DBOS
from psycopg_pool import ConnectionPool

DATABASE_URL = os.environ["DATABASE_URL"]
ROLE = sys.argv[1]
THREADS = 16
INSERT = """INSERT INTO orders (id, user_id, amount) VALUES (%(id)s::uuid, %(user_id)s::uuid, %(amount)s::numeric)
            ON CONFLICT (id) DO NOTHING"""
MOVE = "UPDATE orders SET state = %s, version = version + 1, updated_at = now() WHERE id = %s::uuid AND state = %s"
ENQUEUE = "SELECT dbos.enqueue_workflow(workflow_name => 'pay', queue_name => 'payments', positional_args => ARRAY[%s::json])"

pool = ConnectionPool(DATABASE_URL, min_size=THREADS, max_size=THREADS, open=False, kwargs={"autocommit": True})


# Steps may run again after a crash; each statement then changes nothing. Its datasources rule that out, at half the speed.
@DBOS.step()
def insert(order: dict[str, str]) -> None:
    """The order itself."""
    with pool.connection() as connection:
        connection.execute(INSERT, order)


@DBOS.step()
def move(order_id: str, old: str, new: str) -> None:
    """One transition and its commit."""
    with pool.connection() as connection:
        connection.execute(MOVE, (new, order_id, old))


@DBOS.step()
def charge(order_id: str) -> bool:
    """The gateway: answers at once, and always yes."""
    return True


@DBOS.workflow(name="pay")
def pay(order: dict[str, str]) -> None:
    """The order where nobody else has inserted it, CREATED -> PAYMENT_PENDING, the charge, -> PAID."""
    if ROLE == "start":
        insert(order)
    move(order["id"], "CREATED", "PAYMENT_PENDING")
    if charge(order["id"]):
        move(order["id"], "PAYMENT_PENDING", "PAID")


def enqueue(order: dict[str, str]) -> None:
    """The order and its workflow, in one transaction."""
    with pool.connection() as connection, connection.transaction():
        connection.execute(INSERT, order)
        connection.execute(ENQUEUE, (json.dumps(order),))


async def place(request: web.Request) -> web.Response:
    """POST /orders; its calls are synchronous and belong on a thread."""
    body, order_id = await request.json(), str(uuid.uuid4())
    order = {"id": order_id, "user_id": body["userId"], "amount": str(body["amount"])}
    await (asyncio.to_thread(DBOS.start_workflow, pay, order) if ROLE == "start" else asyncio.to_thread(enqueue, order))
    answer = {"orderId": order_id, "state": "CREATED"}
    return web.json_response(answer, status=201, headers={"Location": f"/orders/{order_id}"})


if __name__ == "__main__":
    pool.open(wait=True)
    if ROLE != "api":
        config = {"name": "orders", "application_version": "1", "system_database_url": DATABASE_URL, "log_level": "WARNING"}
        DBOS(config={**config, "max_executor_threads": THREADS})
        DBOS.launch()
    if ROLE == "worker":
        DBOS.register_queue("payments", polling_interval_sec=0.02)
        threading.Event().wait()
    if ROLE in ("start", "api"):
        api = web.Application()
        api.router.add_post("/orders", place)
        port = int(os.environ["HTTP_PORT"])
        web.run_app(api, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop())
    DBOS.destroy()
