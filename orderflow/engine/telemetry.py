"""Facts are emitted once; whoever wants to know subscribes: the log, the metrics, a test that waits for one.

A subscriber is called in the emitter's own task and must neither block nor raise. What happens to a whole group is told in one
call: the price of a fact is mostly that of its calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

PUBLISHER: Final = "outbox-publisher"
WORKER: Final = "payment-worker"
API: Final = "order-api"
PROCESS: Final = "orderflow"

Facts = Sequence[dict[str, Any]]
Subscriber = Callable[[str, str, Facts], None]
Observer = Callable[[str, float], None]

_subscribers: list[Subscriber] = []
_observers: list[Observer] = []


def emit(service: str, event: str, **fields: Any) -> None:
    """Tell every subscriber that `event` happened in `service`; field names are those of the log line."""
    facts = (fields,)
    for subscriber in _subscribers:
        subscriber(service, event, facts)


def emit_each(service: str, event: str, facts: Facts) -> None:
    """Tell every subscriber that `event` happened once for each of these facts, in this order."""
    if facts:
        for subscriber in _subscribers:
            subscriber(service, event, facts)


def observe(stage: str, seconds: float) -> None:
    """Tell every observer how long a stage of an order's way took, in seconds."""
    for observer in _observers:
        observer(stage, seconds)


def subscribe(subscriber: Subscriber, observer: Observer | None = None) -> None:
    """Add a subscriber for the life of the process."""
    _subscribers.append(subscriber)
    if observer is not None:
        _observers.append(observer)


@contextmanager
def subscribed(subscriber: Subscriber) -> Iterator[None]:
    """A subscriber for the length of a `with` block."""
    _subscribers.append(subscriber)
    try:
        yield
    finally:
        _subscribers.remove(subscriber)
