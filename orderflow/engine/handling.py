"""What a handler is, and what it is given: the port between the engine and whoever does something with events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from orderflow.engine.message import Headers, Message
from orderflow.engine.outcome import Outcome
from orderflow.engine.postgres import Connection
from orderflow.engine.processed import Known


class Record(Protocol):
    """A Kafka record as it was fetched; aiokafka's ConsumerRecord is one."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass(slots=True)
class Delivery:
    """One event on its way through a worker, and what the database said of it when it came."""

    message: Message
    record: Record
    known: Known

    @property
    def failures(self) -> int:
        """Failed attempts before this one, since the last redrive."""
        return max(0, self.known.attempt - self.known.first_attempt)


class SettledMeanwhile(Exception):
    """The event that was about to be buried has been settled by another delivery."""


class Burial(Protocol):
    """What the burial of one type of event means for the domain."""

    async def on_buried(self, connection: Connection, message: Message, reason: str) -> Callable[[], None]:
        """Write it in the burial's own transaction; returns what to tell after the commit.

        Raises SettledMeanwhile to undo the burial: another delivery has finished the work.
        """
        ...


class Handler(Burial, Protocol):
    """What a worker does with one type of event."""

    async def handle(self, delivery: Delivery) -> Outcome:
        """Do the work. Raising Permanent buries the event, any other error is retried by the policy."""
        ...

    async def before_giving_up(self, delivery: Delivery) -> Outcome | None:
        """Called before an event is buried for an error: an outcome if the work turns out to be done after all.

        Raises OutcomeUnknown when that cannot be told: then the event is not buried.
        """
        ...


@runtime_checkable
class InOrder(Handler, Protocol):
    """A handler whose events wait for those before them of the same aggregate, while these are retried or lie buried.

    Not for a Beginner: its first step is done by the time at which that is known.
    """

    in_order: bool


@runtime_checkable
class Beginner(Handler, Protocol):
    """A handler whose first step is one statement for a group of events, taken along with the look at what is known of them."""

    async def begin(self, messages: Sequence[Message]) -> list[Known | None]:
        """What is known of each event, None for one without an outbox row; the first step of what is fresh is done."""
        ...

    async def resume(self, messages: Sequence[Message]) -> list[Known | None]:
        """The same of events that were attempted before: what the first attempt has begun comes along, and no step is done."""
        ...
