"""Clients that look for a topic and never make it.

aiokafka asks for metadata with leave to create what is missing, and has no option for it. A running client that looks for a
topic that has vanished (deleted, or its disk wiped) would have the broker make it anew with the broker's own number of
partitions, often one: one worker of many would do all the work from then on. `Kafka.ensure_topic` alone makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import aiokafka.client
from aiokafka.protocol.metadata import MetadataRequest

_may_create: ContextVar[bool] = ContextVar("_may_create", default=True)


@contextmanager
def making_no_topic() -> Iterator[None]:
    """For the start of a client: the task in which it asks for metadata begins there, and keeps to it for its life.

    Other clients of this process, another program's among them, are left as they are.
    """
    before = _may_create.set(False)
    try:
        yield
    finally:
        _may_create.reset(before)


def _request(topics: list[str] | None = None) -> MetadataRequest:
    return MetadataRequest(topics, _may_create.get())


aiokafka.client.MetadataRequest = _request
