"""The port to whoever takes the money. Yours is another implementation of `Gateway`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Protocol
from uuid import UUID


@dataclass(frozen=True, slots=True)
class ChargeRequest:
    """What is to be charged. `reference` finds the charge again; the same `idempotency_key` never charges twice."""

    reference: UUID
    idempotency_key: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Charge:
    """A settled charge in the gateway's own books."""

    id: UUID
    reference: UUID
    amount: Decimal
    created_at: datetime


class Declined(Exception):
    """An answer: the charge is refused, now and for good. No retry."""


class ChargeFailed(Exception):
    """The gateway could not do it, and no charge was made; the next attempt may succeed."""


class ChargeUnknown(Exception):
    """No answer: the charge may or may not exist. Ask `find` before charging again or giving up."""


class GatewayUnavailable(Exception):
    """It cannot be reached, or refuses to work at all: this call has surely done nothing, and others would fare no better."""


class Gateway(Protocol):
    """Charges money. Implementations are safe for thousands of concurrent calls; every call is bounded by the caller."""

    async def charge(self, request: ChargeRequest) -> Charge:
        """Charge once for the request's key, however often it is called.

        Raises Declined, ChargeFailed, ChargeUnknown or GatewayUnavailable.
        """
        ...

    async def find(self, reference: UUID) -> Charge | None:
        """The settled charge with that reference, or None when there is none.

        Raises ChargeUnknown when the gateway cannot tell, or GatewayUnavailable.
        """
        ...


def idempotency_key(order_id: UUID) -> str:
    """The key of an order's one charge: from what can never change, and never from the attempt."""
    return f"orderflow-charge-{order_id}"
