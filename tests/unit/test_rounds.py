"""What a round of the relay makes of its results: marked, buried, or sent again in order."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID, uuid4

from aiokafka.errors import MessageSizeTooLargeError

from orderflow.engine.message import Message
from orderflow.engine.relay import _sort

A, B = uuid4(), uuid4()
LOST = TimeoutError("no acknowledgement in time")
TOO_LARGE = MessageSizeTooLargeError("too large")


def event_of(aggregate: UUID) -> Message:
    return Message(uuid4(), "Moved", "parcel", aggregate, "{}", datetime.now(UTC))


def test_what_follows_a_lost_event_of_its_aggregate_is_sent_again_with_it() -> None:
    # Of one partition, but not of one batch: the second batch was acknowledged.
    due = [event_of(A), event_of(A), event_of(B), event_of(A)]
    acknowledged, refused, lost = _sort(due, [None, LOST, None, None])
    assert acknowledged == [due[0], due[2]]
    assert (refused, lost) == ([], LOST)


def test_what_cannot_be_published_holds_up_nothing() -> None:
    due = [event_of(A), event_of(A)]
    assert _sort(due, [TOO_LARGE, None]) == ([due[1]], [(due[0], TOO_LARGE)], None)
