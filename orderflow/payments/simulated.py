"""The simulated gateway: its own durable ledger, idempotency keys, and failures that can be switched on at run time.

Its tables stand in the same PostgreSQL for convenience only; it uses connections and transactions of its own, as a gateway on
the other side of the world would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import blake2b
from uuid import UUID

from orderflow.engine.batcher import Batcher
from orderflow.engine.ids import new_id
from orderflow.engine.postgres import Database
from orderflow.payments.gateway import Charge, ChargeFailed, ChargeRequest, ChargeUnknown, Declined

# The ledger is asked and written in one statement for many charges, as any service of that size would do: a key that has a
# charge gets that one, whatever the mode is now.
_CHARGE = """
WITH input AS (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::numeric[], $5::boolean[])
                  AS t(id, key, reference, amount, succeeds)),
control AS (SELECT coalesce((SELECT mode FROM gateway_control), 'random') AS mode),
written AS (
    INSERT INTO gateway_charges (id, idempotency_key, reference, amount, status)
    SELECT i.id, i.key, i.reference, i.amount,
           CASE WHEN c.mode = 'succeed' OR c.mode <> 'decline' AND i.succeeds THEN 'settled' ELSE 'declined' END
    FROM input i CROSS JOIN control c WHERE c.mode NOT IN ('error', 'hang') ORDER BY i.key
    ON CONFLICT (idempotency_key) DO NOTHING
    RETURNING idempotency_key, id, status, created_at)
SELECT i.key, c.mode, w.id IS NOT NULL AS fresh, coalesce(w.id, g.id) AS id, coalesce(w.status, g.status) AS status,
       coalesce(w.created_at, g.created_at) AS created_at
FROM input i CROSS JOIN control c LEFT JOIN written w ON w.idempotency_key = i.key
LEFT JOIN gateway_charges g ON g.idempotency_key = i.key
"""

_FIND = """
SELECT t.reference, c.id, c.amount, c.created_at
FROM unnest($1::uuid[]) AS t(reference)
LEFT JOIN gateway_charges c ON c.reference = t.reference AND c.status = 'settled'
"""


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


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the ledger says of a key. `fresh`: this very request has made the charge."""

    mode: Mode
    fresh: bool
    id: UUID | None
    status: str | None
    created_at: datetime | None


class SimulatedGateway:
    """A `Gateway` that takes `delay` seconds and succeeds for a share `success_rate` of orders, the same for the same seed."""

    def __init__(self, database: Database, *, delay: float = 0.5, success_rate: float = 0.7, seed: int = 1) -> None:
        self._database = database
        self._delay = delay
        self._success_rate = success_rate
        self._seed = str(seed).encode()
        self._charges: Batcher[ChargeRequest, _Entry] = Batcher(self._charge)
        self._finds: Batcher[UUID, Charge | None] = Batcher(self._find)

    def would_succeed(self, reference: UUID) -> bool:
        """The outcome in mode random: a pure function of seed and order, so that a retry gets the same answer."""
        digest = blake2b(reference.bytes, digest_size=8, key=self._seed).digest()
        return int.from_bytes(digest, "big") / 2**64 < self._success_rate

    async def charge(self, request: ChargeRequest) -> Charge:
        """See Gateway.charge."""
        if self._delay > 0:
            await asyncio.sleep(self._delay)
        entry = await self._charges.submit(request)
        if entry.id is None and entry.mode is Mode.HANG:
            await asyncio.get_running_loop().create_future()
        if entry.id is None:
            raise ChargeFailed("Payment gateway error: Insufficient funds")
        if entry.fresh and entry.mode is Mode.TIMEOUT:
            raise ChargeUnknown("Payment gateway timeout: the answer was lost")
        return self._answer(request, entry)

    async def find(self, reference: UUID) -> Charge | None:
        """See Gateway.find."""
        return await self._finds.submit(reference)

    def _answer(self, request: ChargeRequest, entry: _Entry) -> Charge:
        if entry.status != "settled" or entry.id is None or entry.created_at is None:
            raise Declined("Payment declined")
        return Charge(entry.id, request.reference, request.amount, entry.created_at)

    async def _charge(self, requests: Sequence[ChargeRequest]) -> list[_Entry]:
        rows = await self._database.fetch(
            _CHARGE,
            [new_id() for _ in requests],
            [request.idempotency_key for request in requests],
            [request.reference for request in requests],
            [request.amount for request in requests],
            [self.would_succeed(request.reference) for request in requests],
        )
        entries = {r["key"]: _Entry(Mode(r["mode"]), r["fresh"], r["id"], r["status"], r["created_at"]) for r in rows}
        missed = [
            request for request in requests
            if (entry := entries[request.idempotency_key]).id is None and entry.mode not in (Mode.ERROR, Mode.HANG)
        ]  # fmt: skip
        if missed:
            # Lost the race for a key to a charge that this statement's snapshot does not show: the next one's does.
            entries.update(zip((request.idempotency_key for request in missed), await self._charge(missed), strict=True))
        return [entries[request.idempotency_key] for request in requests]

    async def _find(self, references: Sequence[UUID]) -> list[Charge | None]:
        rows = await self._database.fetch(_FIND, references)
        found = {r["reference"]: Charge(r["id"], r["reference"], r["amount"], r["created_at"]) for r in rows if r["id"]}
        return [found.get(reference) for reference in references]

    async def close(self) -> None:
        """End the statements under way."""
        for batcher in (self._charges, self._finds):
            await batcher.close()
