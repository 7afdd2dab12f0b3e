"""The simulated gateway: its outcomes, its ledger, its modes, and an order in each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.engine.ids import new_id
from orderflow.payments.gateway import (
    ChargeFailed,
    ChargeRequest,
    ChargeUnknown,
    Declined,
    GatewayUnavailable,
    idempotency_key,
)
from orderflow.payments.simulated import Mode, SimulatedGateway
from tests.pipeline import deliver, opened
from tests.rows import charges_of, one_database, order_row, place, set_mode

database_url = one_database


@asynccontextmanager
async def simulated(url: str, **options: Any) -> AsyncIterator[SimulatedGateway]:
    async with opened(url) as database:
        gateway = SimulatedGateway(database, **{"delay": 0.0, **options})
        try:
            yield gateway
        finally:
            await gateway.close()


def request_for(order_id: UUID, amount: str = "10.50") -> ChargeRequest:
    return ChargeRequest(order_id, idempotency_key(order_id), Decimal(amount))


async def attempt(gateway: SimulatedGateway, order_id: UUID) -> str:
    try:
        await gateway.charge(request_for(order_id))
    except (Declined, ChargeFailed, ChargeUnknown, GatewayUnavailable) as error:
        return type(error).__name__
    return "settled"


def pure(seed: int, rate: float = 0.7) -> SimulatedGateway:
    return SimulatedGateway(None, success_rate=rate, seed=seed)  # type: ignore[arg-type]


@given(st.uuids(), st.integers(-(2**70), 2**70))
def test_the_outcome_is_a_pure_function_of_seed_and_order(order_id: UUID, seed: int) -> None:
    assert pure(seed).would_succeed(order_id) is pure(seed).would_succeed(order_id)
    assert pure(seed, rate=1.0).would_succeed(order_id)
    assert not pure(seed, rate=0.0).would_succeed(order_id)


@pytest.mark.parametrize("seed", [1, 2, 20261123])
def test_about_seventy_percent_succeed_and_another_seed_picks_others(seed: int) -> None:
    orders = [new_id() for _ in range(20_000)]
    chosen = {order_id for order_id in orders if pure(seed).would_succeed(order_id)}
    # Five standard deviations: 0.7 +- 0.016.
    assert 0.684 < len(chosen) / len(orders) < 0.716
    assert chosen != {order_id for order_id in orders if pure(seed + 1).would_succeed(order_id)}


async def test_modes_switch_at_run_time(connection: asyncpg.Connection, database_url: str) -> None:
    async with simulated(database_url, success_rate=1.0) as gateway:
        for mode, outcome, entries in [
            ("succeed", "settled", ["settled"]),
            ("decline", "Declined", ["declined"]),
            ("error", "ChargeFailed", []),
            ("timeout", "ChargeUnknown", ["settled"]),
            ("unavailable", "GatewayUnavailable", []),
            ("random", "settled", ["settled"]),
        ]:
            await set_mode(connection, mode)
            order_id = new_id()
            assert (mode, await attempt(gateway, order_id)) == (mode, outcome)
            assert await charges_of(connection, order_id) == entries
        await set_mode(connection, "hang")
        order_id = new_id()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gateway.charge(request_for(order_id)), 0.1)
        assert await charges_of(connection, order_id) == []
        await set_mode(connection, "random")


def test_every_mode_has_a_test_above() -> None:
    assert set(Mode) == {"succeed", "decline", "error", "timeout", "random", "hang", "unavailable"}


async def test_the_ledger_and_the_key_survive_a_restart(connection: asyncpg.Connection, database_url: str) -> None:
    await set_mode(connection, "succeed")
    order_id = new_id()
    async with simulated(database_url) as gateway:
        first = await gateway.charge(request_for(order_id))
    # Another process, another mode: the same key gets the same answer.
    await set_mode(connection, "decline")
    async with simulated(database_url) as gateway:
        assert (await gateway.charge(request_for(order_id))).id == first.id
        found = await gateway.find(order_id)
        assert found is not None
        assert (found.id, found.amount) == (first.id, Decimal("10.50"))
        assert await gateway.find(new_id()) is None
    await set_mode(connection, "random")
    assert await charges_of(connection, order_id) == ["settled"]


async def test_a_declined_charge_is_not_found_and_stays_declined(connection: asyncpg.Connection, database_url: str) -> None:
    order_id = new_id()
    await set_mode(connection, "decline")
    async with simulated(database_url) as gateway:
        assert await attempt(gateway, order_id) == "Declined"
        await set_mode(connection, "succeed")
        assert await attempt(gateway, order_id) == "Declined"
        assert await gateway.find(order_id) is None
    await set_mode(connection, "random")


async def test_the_same_key_at_the_same_moment_charges_once(connection: asyncpg.Connection, database_url: str) -> None:
    await set_mode(connection, "succeed")
    orders = [new_id() for _ in range(5)]
    async with simulated(database_url) as one, simulated(database_url) as other:
        charges = await asyncio.gather(*(g.charge(request_for(o)) for o in orders for g in (one, other) for _ in range(4)))
    assert len({charge.id for charge in charges}) == 5
    for order_id in orders:
        assert await charges_of(connection, order_id) == ["settled"]
    await set_mode(connection, "random")


@pytest.mark.parametrize(
    ("mode", "row", "charges"),
    [
        ("succeed", ("PAID", 3, None), ["settled"]),
        ("decline", ("FAILED", 3, "declined"), ["declined"]),
        ("timeout", ("PAID", 3, None), ["settled"]),
        ("error", ("PAYMENT_PENDING", 2, None), []),
        ("hang", ("PAYMENT_PENDING", 2, None), []),
        ("unavailable", ("PAYMENT_PENDING", 2, None), []),
    ],
)
async def test_an_order_in_each_mode(
    connection: asyncpg.Connection, database_url: str, mode: str, row: tuple[str, int, str | None], charges: list[str]
) -> None:
    ((order_id, event_id),) = await place(connection)
    await set_mode(connection, mode)
    async with simulated(database_url, success_rate=1.0) as gateway:
        facts = await deliver(connection, database_url, gateway, event_id, timeout=0.3 if mode == "hang" else 5.0)
    await set_mode(connection, "random")
    assert await order_row(connection, order_id) == row
    assert await charges_of(connection, order_id) == charges
    assert len(facts.of("RETRY_SCHEDULED")) == (mode in ("error", "hang"))
    assert len(facts.of("EVENT_POSTPONED")) == (mode == "unavailable")


async def test_unavailable_tells_nothing_of_a_charge_that_exists(connection: asyncpg.Connection, database_url: str) -> None:
    order_id = new_id()
    async with simulated(database_url) as gateway:
        await set_mode(connection, "succeed")
        charge = await gateway.charge(request_for(order_id))
        await set_mode(connection, "unavailable")
        with pytest.raises(GatewayUnavailable):
            await gateway.charge(request_for(order_id))
        with pytest.raises(GatewayUnavailable):
            await gateway.find(order_id)
        await set_mode(connection, "random")
        assert await gateway.find(order_id) == charge


async def test_a_lost_answer_that_would_have_been_a_decline(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    await set_mode(connection, "timeout")
    async with simulated(database_url, success_rate=0.0) as gateway:
        await deliver(connection, database_url, gateway, event_id, times=2)
    await set_mode(connection, "random")
    # Nothing is settled, so the first attempt cannot know; the second gets the declined answer by its key.
    assert await order_row(connection, order_id) == ("FAILED", 3, "declined")
    assert await charges_of(connection, order_id) == ["declined"]


async def test_the_ledger_s_database_is_gone_while_it_charges(connection: asyncpg.Connection, database_url: str) -> None:
    ((order_id, event_id),) = await place(connection)
    async with opened(database_url, application="ledger") as ledger:
        gateway = SimulatedGateway(ledger, delay=0.0, success_rate=1.0)
        await ledger.fetchval("SELECT 1")
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ledger'")
        await deliver(connection, database_url, gateway, event_id, times=2)
        await gateway.close()
    assert await order_row(connection, order_id) == ("PAID", 3, None)
    assert await charges_of(connection, order_id) == ["settled"]
