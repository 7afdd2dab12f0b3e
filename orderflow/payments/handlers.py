"""OrderCreated -> charge: begin, charge, settle. The way of an order from CREATED to its end."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import orjson

from orderflow.engine import outbox
from orderflow.engine.batcher import Batcher
from orderflow.engine.circuit import Circuit
from orderflow.engine.handling import Delivery, SettledMeanwhile
from orderflow.engine.ids import new_id
from orderflow.engine.message import Message
from orderflow.engine.outcome import Done, Duplicate, Outcome, Postponed
from orderflow.engine.patience import ENDLESS, TimeLimit, is_transient
from orderflow.engine.postgres import Connection, Database
from orderflow.engine.processed import Known
from orderflow.engine.retry import OutcomeUnknown, Permanent
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import WORKER, emit, emit_each, observe
from orderflow.orders import store as orders
from orderflow.orders.model import Failure, State
from orderflow.payments import store
from orderflow.payments.gateway import (
    Charge,
    ChargeFailed,
    ChargeRequest,
    ChargeUnknown,
    Declined,
    Gateway,
    GatewayUnavailable,
    idempotency_key,
)
from orderflow.payments.store import Begun, Settlement

# Events that nobody handles, and that tell of an order all the same: without it they are buried.
SUBJECTS: Final = {"OrderPaid": "orders", "OrderFailed": "orders"}

# How long an order of which nothing could be told waits for the next try.
SHORTEST_SECONDS: Final = 0.2
LONGEST_SECONDS: Final = 30.0


class FailOrder:
    """What the burial of an OrderCreated means: the order becomes FAILED, and OrderFailed tells of it.

    Not one that is PAYMENT_PENDING: whoever has not asked the gateway must not fail what may be charged.
    """

    fails_from: Sequence[State] = (State.CREATED,)

    @seam
    async def on_buried(self, connection: Connection, message: Message, reason: str) -> Callable[[], None]:
        """See Burial."""
        order_id = message.aggregate_id
        version = await store.fail_if_in(connection, order_id, self.fails_from)
        if version is None:
            if await connection.fetchval("SELECT EXISTS (SELECT FROM orders WHERE id = $1)", order_id):
                raise SettledMeanwhile
            return lambda: None
        payload = {"orderId": str(order_id), "reason": reason, "failure": Failure.ERROR}
        failed = Message(
            new_id(),
            "OrderFailed",
            "order",
            order_id,
            orjson.dumps(payload).decode(),
            datetime.now(UTC),
            headers=message.trace(),
        )
        await outbox.append(connection, [failed])
        old = State.CREATED if version == 2 else State.PAYMENT_PENDING

        def tell() -> None:
            emit(WORKER, "PAYMENT_GIVEN_UP", orderId=order_id)
            _tell_change(order_id, old, State.FAILED)

        return tell


class ChargeHandler(FailOrder):
    """Handles OrderCreated. `timeout`: seconds that one call of the gateway may take; `circuit` is the gateway's.

    No answer is no attempt: an event whose calls had none is postponed, for as long as it is old already.
    """

    # What it buries, it has asked the gateway about before (`before_giving_up`).
    fails_from = (State.CREATED, State.PAYMENT_PENDING)

    def __init__(
        self,
        database: Database,
        gateway: Gateway,
        circuit: Circuit,
        *,
        worker_id: str,
        timeout: float = 5.0,
        batch: int = 500,
        in_flight: int = 4,
    ) -> None:
        self._database = database
        self._gateway = gateway
        self._circuit = circuit
        self._timeout = timeout
        self._limit = TimeLimit(timeout)
        self._worker_id = worker_id
        self._begins: Batcher[UUID, Begun | None] = Batcher(
            lambda ids: store.begin_if_created(database, ids), size=batch, in_flight=in_flight, patience=ENDLESS
        )
        self._settlements: Batcher[Settlement, bool] = Batcher(
            self._settle_group, size=batch, in_flight=in_flight, patience=ENDLESS
        )

    async def begin(self, messages: Sequence[Message]) -> list[Known | None]:
        """See Beginner."""
        self._circuit.watch()
        if not self._circuit.closed:
            # An order of which no charge can be made stays CREATED; `handle` begins it if it is the one that probes.
            return await store.resume(self._database, messages)
        results = await store.begin_if_fresh(self._database, messages)
        begun = [known.begun for known in results if known is not None and isinstance(known.begun, Begun)]
        emit_each(WORKER, "STATE_CHANGE", [_PENDING | {"orderId": order.order_id} for order in begun if order.moved])
        return results

    async def resume(self, messages: Sequence[Message]) -> list[Known | None]:
        """See Beginner."""
        self._circuit.watch()
        return await store.resume(self._database, messages)

    @seam
    async def handle(self, delivery: Delivery) -> Outcome:
        """Bring the order to its end. Raises Permanent, or the gateway's error."""
        if not self._circuit.closed and (seconds := await self._circuit.enter()) is not None:
            return Postponed(timedelta(seconds=seconds))
        try:
            order = delivery.known.begun
            if not isinstance(order, Begun):
                order = await self._begins.submit(delivery.message.aggregate_id)
                if order is None:
                    raise Permanent("Unknown order: not in this database")
                if order.moved:
                    _tell_change(order.order_id, State.CREATED, State.PAYMENT_PENDING)
                elif order.state is not State.PAYMENT_PENDING:
                    return Done()
            try:
                charge = await self._charge(order)
            except Declined:
                return await self._settle(delivery, order, None)
            except OutcomeUnknown:
                return self._postponed(delivery.message)
            return await self._settle(delivery, order, charge)
        finally:
            self._circuit.leave()

    def _postponed(self, message: Message) -> Postponed:
        # By age and not by a count: where one order alone has no answer, the circuit stays closed and nothing is counted.
        age = (datetime.now(UTC) - message.created_at).total_seconds()
        seconds = min(max(age, SHORTEST_SECONDS), LONGEST_SECONDS) * random.uniform(0.5, 1.0)
        return Postponed(timedelta(seconds=max(seconds, self._circuit.wait())))

    @seam
    async def _charge(self, order: Begun) -> Charge:
        # Begun before, by a delivery that died or failed: its charge may exist, so the gateway is asked first.
        if not order.moved and (found := await self._find(order.order_id)):
            return found
        begun = time.monotonic()
        request = ChargeRequest(order.order_id, idempotency_key(order.order_id), order.amount)
        try:
            charge = await self._limit.run(self._gateway.charge(request))
        except GatewayUnavailable as error:
            raise self._unanswered(order.order_id, error) from error
        except Exception as error:
            # A connection that broke tells as little as no answer: the charge may have been made.
            if not isinstance(error, ChargeUnknown) and not is_transient(error):
                self._circuit.answered()
                raise
            if found := await self._find(order.order_id):
                return found
            raise ChargeFailed(str(error) or f"Payment gateway timeout: no answer within {self._timeout:g} s") from error
        else:
            self._circuit.answered()
            return charge
        finally:
            observe("charged", time.monotonic() - begun)

    @seam
    async def _find(self, reference: UUID) -> Charge | None:
        try:
            found = await self._limit.run(self._gateway.find(reference))
        except Exception as error:
            if isinstance(error, ChargeUnknown | GatewayUnavailable) or is_transient(error):
                raise self._unanswered(reference, error) from error
            raise
        self._circuit.answered()
        return found

    def _unanswered(self, order_id: UUID, error: Exception) -> OutcomeUnknown:
        # Told once, when the gateway has not even said what became of a charge: an answer that is lost is found, and
        # thousands of them, lost at the same moment, are not the gateway's absence.
        text = str(error) or type(error).__name__
        emit(WORKER, "GATEWAY_UNANSWERED", orderId=order_id, error=text)
        self._circuit.unanswered(text)
        return OutcomeUnknown(f"Payment outcome unknown: the gateway cannot be asked ({text})")

    @seam
    async def _settle(self, delivery: Delivery, order: Begun, charge: Charge | None) -> Outcome:
        settlement = _settlement(delivery.message, order, charge)
        settled = await self._settlements.submit(settlement)
        if not settled and charge is not None:
            settled = await ENDLESS.run(lambda: self._settle_late(settlement))
        return Done(recorded=True) if settled else Duplicate()

    @seam
    async def _settle_group(self, group: Sequence[Settlement]) -> list[bool]:
        results = await store.settle_if_pending(self._database, group, self._worker_id)
        _tell_settled([settlement for settlement, settled in zip(group, results, strict=True) if settled])
        return results

    @seam
    async def _settle_late(self, settlement: Settlement) -> bool:
        """Given up by another delivery while this charge was under way: money was taken, so the order must not stay FAILED."""
        async with self._database.transaction() as connection:
            version = await orders.reopen_if_failed_technically(connection, settlement.order_id)
            if version is None:
                return False
            await store.unbury_for_late_charge(connection, settlement.event_id)
            late = replace(settlement, version=version)
            settled = (await store.settle_if_pending(connection, [late], self._worker_id))[0]
        if settled:
            _tell_settled([late])
        return settled

    @seam
    async def before_giving_up(self, delivery: Delivery) -> Outcome | None:
        """A charge that exists settles the order, however many attempts have failed."""
        order = await self._begins.submit(delivery.message.aggregate_id)
        if order is None or order.state is not State.PAYMENT_PENDING:
            return None
        found = await self._find(order.order_id)
        return await self._settle(delivery, order, found) if found else None

    async def close(self) -> None:
        """End the statements under way."""
        await self._begins.close()
        await self._settlements.close()


def _settlement(message: Message, order: Begun, charge: Charge | None) -> Settlement:
    # Written by hand: of ids and a number, nothing needs an escape.
    payload = f'"orderId":"{order.order_id}","userId":"{order.user_id}","amount":"{order.amount}"'
    if charge is not None:
        payload = f'{{{payload},"chargeId":"{charge.id}"}}'
    else:
        payload = f'{{{payload},"reason":"Payment declined","failure":"{Failure.DECLINED.value}"}}'
    trace = message.trace() if message.headers else None
    return Settlement(
        message.id, order.order_id, order.version, charge is not None, payload,
        orjson.dumps(trace).decode() if trace else None, message.created_at,
    )  # fmt: skip


_PENDING: Final = {"orderId": None, "oldState": State.CREATED.value, "newState": State.PAYMENT_PENDING.value}


def _tell_change(order_id: UUID, old: State, new: State) -> None:
    emit(WORKER, "STATE_CHANGE", orderId=order_id, oldState=old.value, newState=new.value)


def _tell_settled(group: Sequence[Settlement]) -> None:
    """What a group of settlements has come to; told after its commit."""
    now = datetime.now(UTC)
    old = State.PAYMENT_PENDING.value
    emit_each(
        WORKER, "PAYMENT_RESULT",
        [{"orderId": s.order_id, "status": "SUCCESS" if s.paid else "DECLINED"} for s in group],
    )  # fmt: skip
    emit_each(WORKER, "STATE_CHANGE", [{"orderId": s.order_id, "oldState": old, "newState": s.state.value} for s in group])
    for settlement in group:
        observe("settled", (now - settlement.since).total_seconds())
