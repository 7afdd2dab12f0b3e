"""Payments: every answer of a gateway, and every silence, brings the order to the right end with one charge at the most."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from orderflow.commands.checks import backlog
from orderflow.engine.handling import SettledMeanwhile
from orderflow.engine.ids import new_id
from orderflow.payments.gateway import (
    Charge,
    ChargeFailed,
    ChargeRequest,
    ChargeUnknown,
    Declined,
    GatewayUnavailable,
    idempotency_key,
)
from orderflow.payments.handlers import FailOrder
from orderflow.payments.store import Settlement, settle_if_pending
from tests.pipeline import FakeGateway, deliver, executing, watching
from tests.rows import (
    dead_letter,
    events_of,
    is_processed,
    message_of,
    one_database,
    order_row,
    place,
    record_of,
    violations,
)
from tests.waiting import eventually

database_url = one_database
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def raising(error: Exception) -> Callable[[Any], Any]:
    """A gateway's behaviour: always this error."""

    def behave(_: Any) -> Any:
        raise error

    return behave


FAILING = raising(ChargeFailed("Payment gateway error: Insufficient funds"))


def hanging(_: Any) -> Any:
    return asyncio.get_running_loop().create_future()


async def last_event(connection: asyncpg.Connection, order_id: UUID) -> tuple[dict[str, Any], dict[str, Any]]:
    row = await connection.fetchrow(
        "SELECT payload, headers FROM outbox WHERE aggregate_id = $1 ORDER BY seq DESC LIMIT 1", order_id
    )
    return json.loads(row["payload"]), json.loads(row["headers"] or "{}")


async def test_success(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection, amount="299.99", trace=TRACE)
    gateway = FakeGateway()
    facts = await deliver(connection, database_url, gateway, event_id)
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert await is_processed(connection, event_id)
    assert [(fact.event, dict(fact.fields)) for fact in facts.seen] == [
        ("EVENT_RECEIVED", {"eventId": event_id, "eventType": "OrderCreated"}),
        ("STATE_CHANGE", {"orderId": order_id, "oldState": "CREATED", "newState": "PAYMENT_PENDING"}),
        ("PAYMENT_RESULT", {"orderId": order_id, "status": "SUCCESS"}),
        ("STATE_CHANGE", {"orderId": order_id, "oldState": "PAYMENT_PENDING", "newState": "PAID"}),
        ("EVENT_PROCESSED", {"eventId": event_id, "eventType": "OrderCreated"}),
    ]
    assert gateway.requests == [ChargeRequest(order_id, idempotency_key(order_id), Decimal("299.99"))]
    # An order that was fresh has no charge to be found.
    assert gateway.asked == []
    payload, headers = await last_event(connection, order_id)
    assert (payload["orderId"], payload["amount"]) == (str(order_id), "299.99")
    assert payload["chargeId"] == str(gateway.charges[order_id].id)
    assert headers == {"traceparent": TRACE}
    entered = await connection.fetchval("SELECT entered_at FROM orders WHERE id = $1", order_id)
    assert entered == sorted(entered)


async def test_pending_is_committed_before_the_gateway_is_asked(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    found: list[tuple[str, int, str | None]] = []

    async def book(request: ChargeRequest) -> Charge:
        # As another session sees it, and so whoever finds the order after a crash.
        found.append(await order_row(connection, order_id))
        return gateway.book(request)

    gateway.on_charge = book
    await deliver(connection, database_url, gateway, event_id)
    assert found == [("PAYMENT_PENDING", 2, None)]


async def test_declined_at_once_without_a_retry_or_a_dead_letter(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    gateway.on_charge = raising(Declined("Payment declined"))
    facts = await deliver(connection, database_url, gateway, event_id, times=2)
    assert await order_row(connection, order_id) == ("FAILED", 3, "declined")
    assert await events_of(connection, order_id) == ["OrderCreated", "OrderFailed"]
    assert await is_processed(connection, event_id)
    assert await dead_letter(connection, event_id) is None
    assert facts.of("PAYMENT_RESULT") == [{"orderId": order_id, "status": "DECLINED"}]
    assert facts.of("PROCESSING_ERROR") + facts.of("RETRY_SCHEDULED") + facts.of("DLQ_EVENT") == []
    assert len(gateway.requests) == 1
    assert (await last_event(connection, order_id))[0]["reason"] == "Payment declined"


async def test_three_errors(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    gateway.on_charge = FAILING
    facts = await deliver(connection, database_url, gateway, event_id, times=4)
    error = "Payment gateway error: Insufficient funds"
    assert facts.of("PROCESSING_ERROR") == [{"eventId": event_id, "error": error, "retryCount": n} for n in (1, 2, 3)]
    retries = facts.of("RETRY_SCHEDULED", eventId=event_id)
    assert [(retry["retryCount"], retry["maxRetries"]) for retry in retries] == [(1, 3), (2, 3)]
    assert facts.of("DLQ_EVENT") == [{"eventId": event_id, "reason": "Max retries exceeded (3)"}]
    assert len(facts.of("DUPLICATE_EVENT")) == 1
    assert await order_row(connection, order_id) == ("FAILED", 3, "error")
    assert await events_of(connection, order_id) == ["OrderCreated", "OrderFailed"]
    assert not await is_processed(connection, event_id)
    letter = await dead_letter(connection, event_id)
    assert letter is not None
    assert (letter["reason"], letter["error_class"], letter["error_message"]) == (
        "Max retries exceeded (3)",
        "ChargeFailed",
        error,
    )
    assert (letter["event_type"], letter["aggregate_id"], letter["worker_id"]) == ("OrderCreated", order_id, "payment-worker-1")
    attempts = json.loads(letter["attempts"])
    assert [(a["attempt"], a["error"], a["message"]) for a in attempts] == [(n, "ChargeFailed", error) for n in (1, 2, 3)]
    assert [a["at"] for a in attempts] == sorted(a["at"] for a in attempts)
    assert len({request.idempotency_key for request in gateway.requests}) == 1
    # Before it was given up, and at each attempt that found the order pending, the gateway was asked.
    assert gateway.asked == [order_id] * 3
    assert await connection.fetchval("SELECT available_at = 'infinity' FROM outbox WHERE event_id = $1", event_id)


async def test_an_error_that_passes(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    gateway.on_charge = FAILING
    await deliver(connection, database_url, gateway, event_id, times=2)
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 2, None)
    gateway.on_charge = gateway.book
    facts = await deliver(connection, database_url, gateway, event_id)
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert [fact.event for fact in facts.seen] == ["EVENT_RECEIVED", "PAYMENT_RESULT", "STATE_CHANGE", "EVENT_PROCESSED"]
    failures = json.loads(await connection.fetchval("SELECT failures FROM outbox WHERE event_id = $1", event_id))
    assert [entry["attempt"] for entry in failures] == [1, 2]
    assert len(gateway.charges) == 1


@pytest.mark.parametrize(
    "error", [ChargeUnknown("lost"), TimeoutError(), ConnectionResetError("reset"), asyncpg.ConnectionDoesNotExistError("gone")]
)
async def test_the_charge_is_made_and_the_answer_is_lost(
    connection: asyncpg.Connection, database_url: str, error: Exception
) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()

    def charge(request: ChargeRequest) -> Charge:
        gateway.book(request)
        raise error

    gateway.on_charge = charge
    facts = await deliver(connection, database_url, gateway, event_id)
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert len(gateway.requests) == len(gateway.charges) == 1
    assert facts.of("PROCESSING_ERROR") == []


async def test_no_answer_and_no_charge_is_bounded_and_tried_again(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    gateway.on_charge = hanging
    facts = await deliver(connection, database_url, gateway, event_id, timeout=0.05)
    (error,) = facts.of("PROCESSING_ERROR")
    assert (error["retryCount"], error["error"]) == (1, "Payment gateway timeout: no answer within 0.05 s")
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 2, None)
    gateway.on_charge = gateway.book
    await deliver(connection, database_url, gateway, event_id)
    assert await order_row(connection, order_id) == ("PAID", 3, None)


async def test_an_answer_that_comes_too_late_is_found_the_next_time(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    gateway.on_charge = hanging
    await deliver(connection, database_url, gateway, event_id, timeout=0.05)
    # The gateway has worked on; the next attempt asks before it charges.
    charge = gateway.book(gateway.requests[0])
    gateway.on_charge = raising(AssertionError("charged again"))
    await deliver(connection, database_url, gateway, event_id)
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert (await last_event(connection, order_id))[0]["chargeId"] == str(charge.id)


@pytest.mark.parametrize("charged", [False, True])
async def test_an_order_that_is_pending_already_is_resumed(
    connection: asyncpg.Connection, database_url: str, charged: bool
) -> None:
    ((order_id, event_id),) = await place(connection)
    # A worker died here: pending is committed, and nobody knows about the charge.
    await connection.execute(
        "UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, entered_at = entered_at || now() WHERE id = $1", order_id
    )
    gateway = FakeGateway()
    if charged:
        gateway.book(ChargeRequest(order_id, idempotency_key(order_id), Decimal("10.50")))
    facts = await deliver(connection, database_url, gateway, event_id)
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert gateway.asked == [order_id]
    assert len(gateway.requests) == (0 if charged else 1)
    assert len(gateway.charges) == 1
    assert [change["newState"] for change in facts.of("STATE_CHANGE")] == ["PAID"]


async def test_a_charge_that_exists_after_three_errors_is_not_given_up(
    connection: asyncpg.Connection, database_url: str
) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    asked: list[UUID] = []

    def find(reference: UUID) -> Charge | None:
        # It shows up only at the very last question, the one before the burial.
        asked.append(reference)
        return None if len(asked) < 3 else Charge(new_id(), reference, Decimal("10.50"), None)  # type: ignore[arg-type]

    gateway.on_charge, gateway.on_find = FAILING, find
    facts = await deliver(connection, database_url, gateway, event_id, times=3)
    assert len(facts.of("PROCESSING_ERROR")) == 3
    assert facts.of("DLQ_EVENT") == []
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert await dead_letter(connection, event_id) is None
    assert await is_processed(connection, event_id)


@pytest.mark.parametrize(
    "silence", [raising(ChargeUnknown("no idea")), raising(ConnectionResetError()), hanging], ids=["unknown", "reset", "hang"]
)
async def test_a_gateway_that_cannot_tell_keeps_the_order_pending(
    connection: asyncpg.Connection, database_url: str, silence: Callable[[Any], Any]
) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    gateway.on_charge, gateway.on_find = FAILING, silence
    facts = await deliver(connection, database_url, gateway, event_id, times=6, timeout=0.05)
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 2, None)
    assert facts.of("DLQ_EVENT") == []
    # The first had an answer, if a bad one. No answer is no attempt, however often.
    assert (len(facts.of("RETRY_SCHEDULED")), len(facts.of("EVENT_POSTPONED"))) == (1, 5)
    assert await dead_letter(connection, event_id) is None
    # It can tell again: no charge was made, and two attempts are left.
    gateway.on_find = gateway.charges.get
    facts = await deliver(connection, database_url, gateway, event_id, times=2)
    assert facts.of("DLQ_EVENT", reason="Max retries exceeded (3)")
    assert await order_row(connection, order_id) == ("FAILED", 3, "error")


async def test_a_find_that_is_broken_for_good_is_no_reason_to_give_up_either(
    connection: asyncpg.Connection, database_url: str
) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    gateway.on_charge, gateway.on_find = FAILING, raising(KeyError("a bug in the client"))
    facts = await deliver(connection, database_url, gateway, event_id, times=5)
    assert facts.of("DLQ_EVENT") == []
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 2, None)


@pytest.mark.parametrize("charged", [False, True])
async def test_an_unknown_outcome_outlasts_every_attempt_and_whoever_looks_sees_it(
    connection: asyncpg.Connection, database_url: str, charged: bool
) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()

    def lost(request: ChargeRequest) -> Charge:
        if charged:
            gateway.book(request)
        raise ChargeUnknown("the answer was lost")

    gateway.on_charge, gateway.on_find = lost, raising(ChargeUnknown("no idea"))
    facts = await deliver(connection, database_url, gateway, event_id, times=10)
    assert len(facts.of("GATEWAY_UNANSWERED", orderId=order_id)) == 10
    # As if it had gone on for a day; the last to say so is the relay, which cannot publish it any more.
    await connection.execute(
        "UPDATE orders SET created_at = now() - interval '1 d', updated_at = now() - interval '1 d' WHERE id = $1", order_id
    )
    with pytest.raises(SettledMeanwhile):
        await FailOrder().on_buried(connection, await message_of(connection, event_id), "Cannot be published")
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 2, None)
    assert await dead_letter(connection, event_id) is None
    assert f"order {order_id}: PAYMENT_PENDING since" in str((await violations(connection))["I6"])
    seen = [check.seen for check in await backlog.check(connection) if check.level == "problem"]
    assert any("PAYMENT_PENDING: what became of their charges is not known" in text for text in seen), seen
    # At last it answers: paid by the charge that was there all the time, or by one of now; by one in either case.
    gateway.on_charge, gateway.on_find = gateway.book, gateway.charges.get
    await deliver(connection, database_url, gateway, event_id)
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert len(gateway.charges) == 1


async def test_an_order_that_is_put_off_before_its_charge_waits_as_it_is(
    connection: asyncpg.Connection, database_url: str
) -> None:
    placed = await place(connection, 6)
    gateway = FakeGateway()
    gateway.on_charge = gateway.on_find = raising(GatewayUnavailable("connection refused"))
    with watching() as facts:
        async with executing(database_url, gateway, failures=3) as executor:
            first = [await record_of(connection, event_id) for _, event_id in placed]
            await asyncio.gather(*(executor.execute(record) for record in first[:3]))
            await facts.until("CIRCUIT_OPENED", circuit="gateway", failures=3)
            await asyncio.gather(*(executor.execute(record) for record in first[3:]))
            # Delivered again, the old record and the new one: what is begun is put off as well, and stays what it is.
            await asyncio.gather(*(executor.execute(record) for record in first[3:]))
            again = [await record_of(connection, event_id) for _, event_id in placed]
            await asyncio.gather(*(executor.execute(record) for record in again))
    assert len(gateway.requests) == 3
    assert gateway.asked == []
    assert [(await order_row(connection, order_id))[0] for order_id, _ in placed] == ["PAYMENT_PENDING"] * 3 + ["CREATED"] * 3
    assert len(facts.of("EVENT_POSTPONED")) == 12
    assert facts.of("PROCESSING_ERROR") + facts.of("RETRY_SCHEDULED") == []
    rows = await connection.fetch(
        "SELECT attempt - first_attempt AS failed, failures, published_at, available_at > now() AS later FROM outbox"
        " WHERE event_id = ANY($1)",
        [event_id for _, event_id in placed],
    )
    assert {tuple(row) for row in rows} == {(0, None, None, True)}


async def test_a_charge_that_ends_after_the_burial_by_another_delivery(
    connection: asyncpg.Connection, database_url: str
) -> None:
    ((order_id, event_id),) = await place(connection)
    slow, failing = FakeGateway(), FakeGateway()
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    charging = asyncio.Event()

    async def book_later(request: ChargeRequest) -> Charge:
        charging.set()
        await answer
        return slow.book(request)

    slow.on_charge = book_later
    failing.on_charge = FAILING
    with watching() as facts:
        async with executing(database_url, slow, worker_id="slow") as executor:
            work = asyncio.create_task(executor.execute(await record_of(connection, event_id)))
            await asyncio.wait_for(charging.wait(), 30)
            # Its partition went to another worker, for which the gateway only has errors.
            await deliver(connection, database_url, failing, event_id, times=3)
            assert await order_row(connection, order_id) == ("FAILED", 3, "error")
            assert await dead_letter(connection, event_id) is not None
            answer.set_result(None)
            await asyncio.wait_for(work, 30)
    assert await order_row(connection, order_id) == ("PAID", 5, None)
    assert await dead_letter(connection, event_id) is None
    assert await is_processed(connection, event_id)
    assert await events_of(connection, order_id) == ["OrderCreated", "OrderFailed", "OrderPaid"]
    assert len(slow.charges) == 1
    assert len(facts.of("PAYMENT_RESULT", status="SUCCESS")) == 1


async def test_a_decline_that_comes_after_the_burial_changes_nothing(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    slow, failing = FakeGateway(), FakeGateway()
    answer: asyncio.Future[Charge] = asyncio.get_running_loop().create_future()
    slow.on_charge, failing.on_charge = (lambda _: answer), FAILING
    async with executing(database_url, slow, worker_id="slow") as executor:
        work = asyncio.create_task(executor.execute(await record_of(connection, event_id)))
        async with asyncio.timeout(30):
            while not slow.requests:
                await asyncio.sleep(0)
        await deliver(connection, database_url, failing, event_id, times=3)
        answer.set_exception(Declined("Payment declined"))
        await asyncio.wait_for(work, 30)
    assert await order_row(connection, order_id) == ("FAILED", 3, "error")
    assert await events_of(connection, order_id) == ["OrderCreated", "OrderFailed"]
    assert not await is_processed(connection, event_id)


async def test_a_burial_that_waits_for_a_settlement_is_undone(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    await connection.execute("UPDATE outbox SET attempt = 3 WHERE event_id = $1", event_id)
    failing = FakeGateway()
    failing.on_charge = FAILING
    settling = await asyncpg.connect(database_url, timeout=10)
    settlement = Settlement(event_id, order_id, 2, True, "{}", None, datetime.now(UTC))
    async with executing(database_url, failing) as executor:
        # The order is pending, and this delivery knows it.
        await connection.execute(
            "UPDATE orders SET state = 'PAYMENT_PENDING', version = 2, entered_at = entered_at || now() WHERE id = $1", order_id
        )
        async with settling.transaction():
            assert await settle_if_pending(settling, [settlement], "other") == [True]
            burying = asyncio.create_task(executor.execute(await record_of(connection, event_id)))
            # It has found nothing processed, and now wants to fail the order.
            await eventually(lambda: waits_for_a_lock(connection), 30, what="the burial waits for the order")
        await asyncio.wait_for(burying, 30)
    await settling.close()
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert await dead_letter(connection, event_id) is None
    assert await is_processed(connection, event_id)
    assert not await connection.fetchval("SELECT available_at = 'infinity' FROM outbox WHERE event_id = $1", event_id)


async def waits_for_a_lock(connection: asyncpg.Connection) -> bool:
    return await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"
    )


async def test_a_failure_that_cannot_be_written_leaves_no_dead_letter(
    connection: asyncpg.Connection, database_url: str
) -> None:
    ((order_id, event_id),) = await place(connection)
    gateway = FakeGateway()
    gateway.on_charge = FAILING
    await deliver(connection, database_url, gateway, event_id, times=2)
    # Whatever keeps OrderFailed from being written: a constraint of somebody's own, a bug, the end of the process.
    await connection.execute("ALTER TABLE outbox ADD CONSTRAINT nothing_new CHECK (event_type <> 'OrderFailed') NOT VALID")
    try:
        with pytest.raises(asyncpg.CheckViolationError, match="nothing_new"):
            await deliver(connection, database_url, gateway, event_id)
    finally:
        await connection.execute("ALTER TABLE outbox DROP CONSTRAINT nothing_new")
    assert await order_row(connection, order_id) == ("PAYMENT_PENDING", 2, None)
    assert await dead_letter(connection, event_id) is None
    await deliver(connection, database_url, gateway, event_id)
    assert await order_row(connection, order_id) == ("FAILED", 3, "error")
    assert await dead_letter(connection, event_id) is not None


async def test_a_settlement_and_a_burial_at_the_same_moment(connection: asyncpg.Connection, database_url: str) -> None:
    placed = await place(connection, 20)
    await connection.execute("UPDATE outbox SET attempt = 3 WHERE event_id = ANY($1)", [event_id for _, event_id in placed])
    together = asyncio.Barrier(2 * len(placed))

    def gateway_that(answers: bool) -> FakeGateway:
        gateway = FakeGateway()

        async def behave(request: ChargeRequest) -> Charge:
            await together.wait()
            return gateway.book(request) if answers else FAILING(request)

        gateway.on_charge = behave
        return gateway

    paying, failing = gateway_that(True), gateway_that(False)
    async with executing(database_url, paying, worker_id="a") as one, executing(database_url, failing, worker_id="b") as other:
        records = [await record_of(connection, event_id) for _, event_id in placed]
        work = [executor.execute(record) for record in records for executor in (one, other)]
        await asyncio.wait_for(asyncio.gather(*work), 60)
    for order_id, event_id in placed:
        state, version, _ = await order_row(connection, order_id)
        # Whoever was first: money was taken, so the order is paid, and the event is processed and not dead-lettered.
        assert (state, version) in {("PAID", 3), ("PAID", 5)}
        assert await is_processed(connection, event_id)
        assert await dead_letter(connection, event_id) is None
        assert (await events_of(connection, order_id)).count("OrderPaid") == 1
        assert (await events_of(connection, order_id)).count("OrderFailed") == (version - 3) // 2
