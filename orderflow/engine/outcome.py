"""What became of one delivery: exactly one of these, matched by the executor and by nobody else."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Done:
    """Handled. `recorded`: the handler has already written processed_events along with its own change."""

    recorded: bool = False


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Decided before: processed, buried, or overtaken by a later attempt. Nothing changes."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Not this time: the outbox row is made due again after `delay`."""

    delay: timedelta
    error: BaseException


@dataclass(frozen=True, slots=True)
class Postponed:
    """Not now, and through no fault of the event's: its row is made due again after `delay`, and no attempt is used up."""

    delay: timedelta


@dataclass(frozen=True, slots=True)
class Dead:
    """Never by itself: the event is buried with `reason`."""

    reason: str
    error: BaseException | None = None


Outcome = Done | Duplicate | Retry | Postponed | Dead
