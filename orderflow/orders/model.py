"""The order's state machine: pure, and the one place that says which transitions are legal.

The database holds the same rules (schema.sql, orders_legal_transition); a test keeps the two equal.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Where an order stands. Each comment says who moves an order out of the state."""

    # The worker's `begin` moves it on; the burial of its event moves it to FAILED when no charge ever began.
    CREATED = "CREATED"
    # Settlement moves it on; a redelivery, a retry or the reconciler brings it back to settlement after a crash.
    PAYMENT_PENDING = "PAYMENT_PENDING"
    # Nobody: final.
    PAID = "PAID"
    # A redrive, and only of a technical failure; a declined order is final.
    FAILED = "FAILED"


class Failure(StrEnum):
    """Why an order is FAILED."""

    DECLINED = "declined"
    ERROR = "error"


class IllegalTransition(Exception):
    """The order cannot go there from where it is."""


_NEXT: Final[dict[State, frozenset[State]]] = {
    State.CREATED: frozenset({State.PAYMENT_PENDING, State.FAILED}),
    State.PAYMENT_PENDING: frozenset({State.PAID, State.FAILED}),
    State.PAID: frozenset(),
    State.FAILED: frozenset({State.PAYMENT_PENDING}),
}

TERMINAL: Final = frozenset({State.PAID, State.FAILED})


def may_go(old: State, new: State, failure: Failure | None = None) -> bool:
    """Whether the transition is legal; `failure` says why an order in FAILED failed."""
    return new in _NEXT[old] and (old is not State.FAILED or failure is Failure.ERROR)


def transition(old: State, version: int, new: State, failure: Failure | None = None) -> tuple[State, int]:
    """The state and version after the transition.

    Raises IllegalTransition where the machine has no such step.
    """
    if not may_go(old, new, failure):
        raise IllegalTransition(f"{old} (version {version}) -> {new}")
    return new, version + 1


def path_to(state: State, version: int) -> list[State]:
    """The states of versions 1 to `version` of an order that is now in `state`.

    They follow from the two alone: only a FAILED order can be taken back, so going backwards each step has one origin.
    Raises IllegalTransition where no legal path of that length leads to the state.
    """
    path = [state]
    for at in range(version - 1, 0, -1):
        match path[0]:
            case State.PAID if at >= 2:
                path.insert(0, State.PAYMENT_PENDING)
            case State.FAILED:
                path.insert(0, State.CREATED if at == 1 else State.PAYMENT_PENDING)
            case State.PAYMENT_PENDING:
                path.insert(0, State.CREATED if at == 1 else State.FAILED)
            case _:
                raise IllegalTransition(f"no path of {version} versions leads to {state}")
    if path[0] is not State.CREATED:
        raise IllegalTransition(f"no path of {version} versions leads to {state}")
    return path
