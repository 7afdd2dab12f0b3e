"""Placing orders: the use case between HTTP and the store, with group commit and idempotency keys."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

import asyncpg
import orjson

from orderflow.engine.batcher import Batcher
from orderflow.engine.handoff import Handoff
from orderflow.engine.ids import new_id
from orderflow.engine.patience import Patience, TimeLimit, is_transient
from orderflow.engine.postgres import Database
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import observe
from orderflow.orders import store
from orderflow.orders.admission import Admission
from orderflow.orders.idempotency import request_hash
from orderflow.orders.store import KeyReused, NewOrder, Placed

PATIENCE_SECONDS = 3.0

# With these the server itself says that it has rolled the INSERT back; after any other error it may have committed.
# (A cancelled query is not among them: it may have been the second one of store.place, which only reads.)
_ROLLED_BACK = (
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
)


@dataclass(frozen=True, slots=True)
class KeyInProgress:
    """A request with this idempotency key is being worked on; nothing was written for this one."""


class Unavailable(Exception):
    """PostgreSQL did not confirm the order in time.

    `order_id` is None when the order was certainly not placed. Otherwise a commit was on its way when the server was
    lost or the time was over: the order has this id if it was placed.
    """

    def __init__(self, order_id: UUID | None, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.order_id = order_id


class Backlogged(Exception):
    """Orders are accepted faster than they are worked off, so none is; nothing was written. `age`: seconds the oldest waits."""

    def __init__(self, age: float) -> None:
        super().__init__(f"the oldest order has waited for {age:.0f} s")
        self.age = age


@dataclass(slots=True)
class _Attempt:
    """An order on its way. `sent`: its statement is running; `unknown`: one has ended without an answer."""

    order: NewOrder
    sent: bool = False
    unknown: bool = False


class OrderService:
    """Places orders in groups. `handoff` is told of each commit, for a relay in this process; `admission` may refuse orders."""

    def __init__(
        self, database: Database, *, batch_size: int = 500, batches_in_flight: int = 4, queue: int = 4096,
        timeout: float = 10.0, patience: Patience | None = None, handoff: Handoff | None = None,
        admission: Admission | None = None,
    ) -> None:  # fmt: skip
        self._database = database
        self._admission = admission or Admission(0.0)
        self._earlier: Batcher[tuple[str, bytes], Placed | KeyReused | None] = Batcher(
            lambda keys: store.earlier(database, keys), size=batch_size, in_flight=batches_in_flight, queue=queue
        )
        self._handoff = handoff or Handoff()
        self._keys_in_work: set[str] = set()
        self._batcher: Batcher[_Attempt, Placed | KeyReused] = Batcher(
            self._flush, size=batch_size, in_flight=batches_in_flight, queue=queue,
            patience=patience or Patience(PATIENCE_SECONDS),
        )  # fmt: skip
        self._limit = TimeLimit(timeout)
        # Event loop time of the last commit: proof that PostgreSQL works, without asking it.
        self.last_commit = float("-inf")

    async def place(
        self, user_id: UUID, amount: Decimal, key: str | None = None, traceparent: str | None = None,
        deadline: float | None = None,
    ) -> Placed | KeyReused | KeyInProgress:  # fmt: skip
        """Place an order; returns after it and its event are durable.

        `amount` has two decimals (amounts.parse_amount); `deadline` is event loop time, `timeout` from now without it. Raises
        Overloaded when too many orders are waiting, Backlogged when the oldest of them has waited too long, Unavailable when
        PostgreSQL did not confirm in time.
        """
        if self._admission.refusing:
            return await self._replay(user_id, amount, key)
        if key is None:
            return await self._place(user_id, amount, None, traceparent, deadline)
        if key in self._keys_in_work:
            return KeyInProgress()
        self._keys_in_work.add(key)
        try:
            return await self._place(user_id, amount, key, traceparent, deadline)
        finally:
            self._keys_in_work.discard(key)

    async def _replay(self, user_id: UUID, amount: Decimal, key: str | None) -> Placed | KeyReused | KeyInProgress:
        """What was placed before is answered however long the backlog: whoever asks may not know that it was accepted."""
        if key is not None:
            if key in self._keys_in_work:
                return KeyInProgress()
            try:
                found = await self._limit.run(self._earlier.submit((key, request_hash(user_id, amount))))
            except Exception as error:
                if not is_transient(error):
                    raise
                raise Unavailable(None, error) from error
            if found is not None:
                return found
        raise Backlogged(self._admission.age)

    async def _place(
        self, user_id: UUID, amount: Decimal, key: str | None, traceparent: str | None, deadline: float | None
    ) -> Placed | KeyReused:
        loop = asyncio.get_running_loop()
        started = loop.time()
        hashed = request_hash(user_id, amount) if key is not None else None
        trace = orjson.dumps({"traceparent": traceparent}).decode() if traceparent else None
        attempt = _Attempt(NewOrder(new_id(), new_id(), user_id, amount, key, hashed, trace))
        try:
            if deadline is None:
                result = await self._limit.run(self._batcher.submit(attempt))
            else:
                async with asyncio.timeout_at(deadline):
                    result = await self._batcher.submit(attempt)
        except Exception as error:
            if not is_transient(error):
                raise
            raise Unavailable(attempt.order.order_id if attempt.sent or attempt.unknown else None, error) from error
        observe("accepted", loop.time() - started)
        return result

    @seam
    async def _flush(self, group: Sequence[_Attempt]) -> Sequence[Placed | KeyReused]:
        async with self._database.acquire() as connection:
            for attempt in group:
                attempt.sent = True
            orders = [attempt.order for attempt in group]
            try:
                results = await store.place(connection, orders)
            except _ROLLED_BACK:
                for attempt in group:
                    attempt.sent = False
                raise
            except BaseException:
                for attempt in group:
                    attempt.sent, attempt.unknown = False, True
                raise
        self.last_commit = asyncio.get_running_loop().time()
        self._admission.news = True
        self._handoff.committed(lambda: store.announced(orders, results))
        return results

    async def close(self) -> None:
        """End what is still on its way; callers that wait are cancelled."""
        await self._batcher.close()
        await self._earlier.close()
