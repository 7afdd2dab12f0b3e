"""The order flow on faststream-outbox, FastStream and Kafka: the order and its outbox row commit in one transaction.

python faststream_outbox_flow.py schema   its table, once
python faststream_outbox_flow.py api      the API
python faststream_outbox_flow.py relay    the relay, outbox -> Kafka
python faststream_outbox_flow.py worker   the consumer
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import uuid
from decimal import Decimal

import uvloop
from aiohttp import web
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker, KafkaResponse
from faststream.kafka.schemas import Topic
from faststream_outbox import OutboxBroker, make_outbox_table, outbox_autovacuum_ddl
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

DATABASE_URL = os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:")
INSERT = text("INSERT INTO orders (id, user_id, amount) VALUES (:id, :user_id, :amount)")
MOVE = text("UPDATE orders SET state = :new, version = version + 1, updated_at = now() WHERE id = :id AND state = :old")

metadata = MetaData()
outbox = make_outbox_table(metadata, table_name="outbox")
engine = create_async_engine(DATABASE_URL, pool_size=16, max_overflow=0)
sessions = async_sessionmaker(engine, expire_on_commit=False)
logger = logging.getLogger(__name__)
broker_outbox = OutboxBroker(engine, outbox_table=outbox, logger=logger)
broker_kafka = KafkaBroker(os.environ["KAFKA_BOOTSTRAP_SERVERS"], acks="all", enable_idempotence=True, logger=logger)
topic = Topic(os.environ["TOPIC"], num_partitions=12)


@broker_kafka.publisher(topic.name)
@broker_outbox.subscriber("orders", max_workers=4, fetch_batch_size=100, terminal_flush_batch_size=100)
async def relay(order_id: str) -> KafkaResponse:
    """One outbox row to Kafka, with a key, so that the events of one order stay in order."""
    return KafkaResponse(order_id, key=order_id.encode())


# Its default acknowledges first, which loses what a worker had in hand when it died.
@broker_kafka.subscriber(
    topic, group_id="payments", auto_offset_reset="earliest", ack_policy=AckPolicy.NACK_ON_ERROR, max_workers=12
)
async def pay(order_id: str) -> None:
    """CREATED -> PAYMENT_PENDING, the charge, -> PAID; a record that comes again changes nothing."""
    await move(order_id, "CREATED", "PAYMENT_PENDING")
    if await charge(order_id):
        await move(order_id, "PAYMENT_PENDING", "PAID")


async def move(order_id: str, old: str, new: str) -> None:
    """One transition and its commit."""
    async with engine.begin() as connection:
        await connection.execute(MOVE, {"id": uuid.UUID(order_id), "old": old, "new": new})


async def charge(order_id: str) -> bool:
    """The gateway: answers at once, and always yes."""
    return True


async def place(request: web.Request) -> web.Response:
    """POST /orders."""
    body, order_id = await request.json(), uuid.uuid4()
    order = {"id": order_id, "user_id": uuid.UUID(body["userId"]), "amount": Decimal(str(body["amount"]))}
    async with sessions() as session, session.begin():
        await session.execute(INSERT, order)
        await broker_outbox.publish(str(order_id), queue="orders", session=session)
    answer = {"orderId": str(order_id), "state": "CREATED"}
    return web.json_response(answer, status=201, headers={"Location": f"/orders/{order_id}"})


async def schema() -> None:
    """Its table, tuned as its documentation has it for much traffic."""
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(text(outbox_autovacuum_ddl("outbox", vacuum_cost_delay=0)))


if __name__ == "__main__":
    match sys.argv[1]:
        case "schema":
            asyncio.run(schema())
        case "relay":
            asyncio.run(FastStream(broker_outbox, on_startup=[broker_kafka.connect]).run())
        case "worker":
            asyncio.run(FastStream(broker_kafka).run())
        case "api":
            app = web.Application()
            app.router.add_post("/orders", place)
            port = int(os.environ["HTTP_PORT"])
            web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop())
