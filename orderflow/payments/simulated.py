"""The simulated gateway: its own durable ledger, idempotency keys, and failures that can be switched on at run time.

Its tables stand in the same PostgreSQL for convenience only; it uses connections and transactions of its own, as a gateway on
the other side of the world would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from hashlib import blake2b
from typing import Final, NamedTuple
from uuid import UUID

from orderflow.engine.batcher import Batcher
from orderflow.engine.ids import new_id
from orderflow.engine.postgres import Database
from orderflow.engine.seams import seam
from orderflow.payments.gateway import Charge, ChargeFailed, ChargeRequest, ChargeUnknown, Declined, GatewayUnavailable

# The ledger is written in one statement for many charges, as any service of that size would do.
_CHARGE = """
WITH control AS (SELECT coalesce((SELECT mode FROM gateway_control), 'random') AS mode),
written AS (
    INSERT INTO gateway_charges (id, idempotency_key, reference, amount, status)
    SELECT i.id, i.key, i.reference, i.amount,
           CASE WHEN c.mode = 'succeed' OR c.mode <> 'decline' AND i.succeeds THEN 'settled' ELSE 'declined' END
    FROM control c CROSS JOIN unnest($1::uuid[], $2::text[], $3::uuid[], $4::numeric[], $5::boolean[])
                              AS i(id, key, reference, amount, succeeds)
    WHERE c.mode NOT IN ('error', 'hang', 'unavailable') ORDER BY i.key
    ON CONFLICT (idempotency_key) DO NOTHING
    RETURNING id)
SELECT (SELECT mode FROM control), now(),
       (SELECT CASE WHEN count(*) < cardinality($1) THEN coalesce(array_agg(id), '{}') END FROM written)
"""

# A key that has a charge gets that one, whatever the mode is now, unless nobody gets anything. (After the INSERT, whose
# snapshot does not show a charge to which it has just lost the race for a key.)
_LOOK_UP = """
SELECT i.key, coalesce((SELECT mode FROM gateway_control), 'random'), g.id, g.status, g.created_at
FROM unnest($1::text[]) AS i(key) LEFT JOIN gateway_charges g ON g.idempotency_key = i.key
"""

_FIND = """
SELECT t.reference, c.id, c.amount, c.created_at, coalesce((SELECT mode FROM gateway_control), 'random') AS mode
FROM unnest($1::uuid[]) AS t(reference)
LEFT JOIN gateway_charges c ON c.reference = t.reference AND c.status = 'settled'
"""


REFUSAL: Final = "Payment gateway error: Insufficient funds"
UNAVAILABLE: Final = "Payment gateway unavailable: connection refused"


class Mode(StrEnum):
    """What the simulated gateway does with a new charge."""

    RANDOM = "random"
    SUCCEED = "succeed"
    DECLINE = "decline"
    # No charge is made, and the gateway says so.
    ERROR = "error"
    # The charge is made, and the answer is lost.
    TIMEOUT = "timeout"
    # No charge is made, and no answer ever comes.
    HANG = "hang"
    # No charge is made, and none is found: whoever asks is turned away.
    UNAVAILABLE = "unavailable"


class _Entry(NamedTuple):
    """What the ledger says of a key. `fresh`: this very request has made the charge."""

    mode: str | None
    id: UUID | None
    status: str | None
    created_at: datetime | None
    fresh: bool


class SimulatedGateway:
    """A `Gateway` that takes `delay` seconds and succeeds for a share `success_rate` of orders, the same for the same seed."""

    def __init__(
        self, database: Database, *, delay: float = 0.5, success_rate: float = 0.7, error_rate: float = 0.0, seed: int = 1
    ) -> None:
        """`error_rate`: the share of orders whose first charge fails with an error, in each process that is asked."""
        self._database = database
        self._error_rate = error_rate
        self._failed_once: set[UUID] = set()
        self._delay = delay
        self._success_rate = success_rate
        self._seed = str(seed).encode()
        self._charges: Batcher[ChargeRequest, _Entry] = Batcher(self._charge)
        # Asked for by retries only, which come one by one and are in no hurry.
        self._finds: Batcher[UUID, Charge | GatewayUnavailable | None] = Batcher(self._find, linger=0.01)

    def would_succeed(self, reference: UUID) -> bool:
        """The outcome in mode random: a pure function of seed and order, so that a retry gets the same answer."""
        return self._drawn(reference, b"") < self._success_rate

    def _fails_this_time(self, reference: UUID) -> bool:
        if self._drawn(reference, b"error") >= self._error_rate:
            return False
        if reference in self._failed_once:
            self._failed_once.discard(reference)
            return False
        self._failed_once.add(reference)
        return True

    def _drawn(self, reference: UUID, purpose: bytes) -> float:
        digest = blake2b(reference.bytes, digest_size=8, key=self._seed, person=purpose).digest()
        return int.from_bytes(digest, "big") / 2**64

    @seam
    async def charge(self, request: ChargeRequest) -> Charge:
        """See Gateway.charge."""
        if self._delay > 0:
            await asyncio.sleep(self._delay)
        if self._error_rate and self._fails_this_time(request.reference):
            raise ChargeFailed(REFUSAL)
        entry = await self._charges.submit(request)
        if entry.mode == Mode.UNAVAILABLE:
            raise GatewayUnavailable(UNAVAILABLE)
        if entry.id is None and entry.mode == Mode.HANG:
            await asyncio.get_running_loop().create_future()
        if entry.id is None:
            raise ChargeFailed(REFUSAL)
        if entry.fresh and entry.mode == Mode.TIMEOUT:
            raise ChargeUnknown("Payment gateway timeout: the answer was lost")
        return self._answer(request, entry)

    @seam
    async def find(self, reference: UUID) -> Charge | None:
        """See Gateway.find."""
        found = await self._finds.submit(reference)
        if isinstance(found, GatewayUnavailable):
            raise found
        return found

    def _answer(self, request: ChargeRequest, entry: _Entry) -> Charge:
        if entry.status != "settled" or entry.id is None or entry.created_at is None:
            raise Declined("Payment declined")
        return Charge(entry.id, request.reference, request.amount, entry.created_at)

    @seam
    async def _charge(self, requests: Sequence[ChargeRequest]) -> list[_Entry]:
        ids = [new_id() for _ in requests]
        succeeds = [self.would_succeed(request.reference) for request in requests]
        row = await self._database.fetchrow(
            _CHARGE,
            ids,
            [request.idempotency_key for request in requests],
            [request.reference for request in requests],
            [request.amount for request in requests],
            succeeds,
        )
        assert row is not None
        mode, now, written = row
        settled = ["settled" if mode == Mode.SUCCEED or (mode != Mode.DECLINE and drawn) else "declined" for drawn in succeeds]
        entries = [_Entry(mode, charge_id, status, now, True) for charge_id, status in zip(ids, settled, strict=True)]
        if written is None:
            return entries
        fresh = set(written)
        left = [request.idempotency_key for request, charge_id in zip(requests, ids, strict=True) if charge_id not in fresh]
        rows = await self._database.fetch(_LOOK_UP, left)
        # Without a charge it is the mode of before that has made none, whatever it has been switched to since.
        found = {
            key: _Entry(then if charge_id else mode, charge_id, status, at, False) for key, then, charge_id, status, at in rows
        }
        return [found.get(request.idempotency_key, entry) for request, entry in zip(requests, entries, strict=True)]

    @seam
    async def _find(self, references: Sequence[UUID]) -> Sequence[Charge | GatewayUnavailable | None]:
        rows = await self._database.fetch(_FIND, references)
        if rows and rows[0]["mode"] == Mode.UNAVAILABLE:
            return [GatewayUnavailable(UNAVAILABLE) for _ in references]
        found = {r["reference"]: Charge(r["id"], r["reference"], r["amount"], r["created_at"]) for r in rows if r["id"]}
        return [found.get(reference) for reference in references]

    async def close(self) -> None:
        """End the statements under way."""
        for batcher in (self._charges, self._finds):
            await batcher.close()
