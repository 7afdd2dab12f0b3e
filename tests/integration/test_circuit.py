"""The circuit breaker: opened by silence alone, for all workers at once; one probe at a time, whoever dies with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest

from orderflow.engine.circuit import LONGEST, RAMP, SHORTEST, SPREAD, Circuit
from orderflow.engine.postgres import Database
from tests.pipeline import opened, watching
from tests.waiting import eventually

NAME = "gateway"


@asynccontextmanager
async def circuits(url: str, count: int = 1, **options: Any) -> AsyncIterator[list[Circuit]]:
    """As many workers' views of the row."""
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(opened(url, timeout=options.pop("timeout", 5.0)))
        made = [Circuit(database, NAME, worker_id=f"w{n}", **{"failures": 3, **options}) for n in range(1, count + 1)]
        for circuit in made:
            await circuit.look()
            stack.push_async_callback(circuit.close)
        yield made


async def state(connection: asyncpg.Connection) -> str | None:
    return await connection.fetchval("SELECT state FROM circuits WHERE name = $1", NAME)


async def is_open(connection: asyncpg.Connection, *views: Circuit, probe_due: bool = True) -> None:
    """Open for all of these, its time over."""
    due = "now()" if probe_due else "now() + interval '1 h'"
    await connection.execute(
        f"INSERT INTO circuits (name, state, opened_at, due_at) VALUES ($1, 'open', now() - interval '1 min', {due})", NAME
    )
    for circuit in views:
        await circuit.look()
        assert not circuit.closed


async def passes(circuit: Circuit, answer: bool | None, end: asyncio.Event | None = None) -> bool:
    """One delivery: whether it may pass, and then its call is answered or not (None: it makes none) when `end` is set."""

    async def delivery() -> bool:
        if await circuit.enter() is not None:
            return False
        try:
            if end is not None:
                await end.wait()
            if answer is not None:
                circuit.answered() if answer else circuit.unanswered("no answer")
            return True
        finally:
            circuit.leave()

    return await asyncio.create_task(delivery())


async def test_silence_opens_it_for_everybody_and_an_answer_in_between_does_not(
    connection: asyncpg.Connection, database_url: str
) -> None:
    with watching() as facts:
        async with circuits(database_url, 2) as (one, other):
            for answer in (False, False, True, False, False):
                assert await passes(one, answer)
            assert one.closed
            assert await state(connection) is None
            assert await passes(one, False)
            # At once, before the row is written.
            assert not one.closed
            assert not await passes(one, True)
            await facts.until("CIRCUIT_OPENED")
            assert await passes(other, True)
            await other.look()
            assert not await passes(other, True)
    assert facts.of("CIRCUIT_OPENED") == [{"circuit": NAME, "failures": 3, "error": "no answer"}]
    assert await state(connection) == "open"


async def test_two_workers_that_open_it_together_say_so_once(connection: asyncpg.Connection, database_url: str) -> None:
    with watching() as facts:
        async with circuits(database_url, 2) as both:
            for _ in range(3):
                assert [await passes(circuit, False) for circuit in both] == [True, True]
            await facts.until("CIRCUIT_OPENED")
            await eventually(lambda: state(connection))
            assert not any([await passes(circuit, True) for circuit in both])
    assert len(facts.of("CIRCUIT_OPENED")) == 1


async def test_one_delivery_of_one_worker_probes_and_its_answer_closes_it(
    connection: asyncpg.Connection, database_url: str
) -> None:
    with watching() as facts:
        async with circuits(database_url, 4) as views:
            await is_open(connection, *views)
            end = asyncio.Event()
            deliveries = [asyncio.create_task(passes(circuit, True, end)) for circuit in views for _ in range(50)]
            await eventually(lambda: sum(task.done() for task in deliveries) == 199, what="all but one are put off")
            end.set()
            assert sum(await asyncio.gather(*deliveries)) == 1
            await facts.until("CIRCUIT_CLOSED")
            assert [await passes(circuit, True) for circuit in views if circuit.closed] == [True]
            for circuit in views:
                await circuit.look()
                assert await passes(circuit, True)
    (told,) = facts.of("CIRCUIT_CLOSED")
    assert told["circuit"] == NAME
    assert told["openSeconds"] >= 60
    assert len(facts.of("CIRCUIT_SEEN", open=True)) == len(facts.of("CIRCUIT_SEEN", open=False)) == 4


async def test_a_probe_without_an_answer_opens_it_for_twice_as_long_up_to_a_limit(
    connection: asyncpg.Connection, database_url: str
) -> None:
    async with circuits(database_url) as (circuit,):
        await is_open(connection, circuit)
        lasted = []
        for probe in range(1, 8):
            await connection.execute("UPDATE circuits SET due_at = now()")
            await circuit.look()
            assert await passes(circuit, False)
            await eventually(lambda: ended(connection), what="the probe's end is told")
            row = await connection.fetchrow("SELECT probes, extract(epoch FROM due_at - now())::float8 AS due FROM circuits")
            assert row["probes"] == probe
            lasted.append(row["due"])
    wanted = [min(LONGEST, SHORTEST * 2**probe) for probe in range(1, 8)]
    # The row was read a moment after it was written.
    assert all(want - 0.9 < lasted_for <= want for lasted_for, want in zip(lasted, wanted, strict=True)), lasted


async def ended(connection: asyncpg.Connection) -> bool:
    return await state(connection) == "open"


async def test_the_claim_of_a_dead_worker_runs_out_and_what_it_says_too_late_is_not_heard(
    connection: asyncpg.Connection, database_url: str
) -> None:
    async with circuits(database_url, 2) as (dead, heir):
        await is_open(connection, dead, heir)
        entered, end = asyncio.Event(), asyncio.Event()

        async def zombie() -> None:
            assert await dead.enter() is None
            entered.set()
            await end.wait()
            dead.unanswered("too late")
            dead.leave()

        probing = asyncio.create_task(zombie())
        await asyncio.wait_for(entered.wait(), 30)
        await heir.look()
        assert not await passes(heir, True)
        await connection.execute("UPDATE circuits SET due_at = now()")
        await heir.look()
        assert await passes(heir, True)
        await eventually(lambda: heir.closed, what="the heir's probe closes it")
        end.set()
        await asyncio.wait_for(probing, 30)
        await eventually(lambda: dead.closed, what="the other sees it")
    assert await connection.fetchval("SELECT worker_id FROM circuits") == "w2"
    assert await state(connection) == "closed"


async def test_a_probe_that_made_no_call_leaves_it_to_the_next(connection: asyncpg.Connection, database_url: str) -> None:
    async with circuits(database_url) as (circuit,):
        await is_open(connection, circuit)
        assert await passes(circuit, None)
        await eventually(lambda: ended(connection), what="the claim is given back")
        await circuit.look()
        assert await passes(circuit, True)
        await eventually(lambda: circuit.closed)


async def test_what_is_put_off_comes_back_one_after_the_other_after_the_probe(
    connection: asyncpg.Connection, database_url: str
) -> None:
    async with circuits(database_url) as (circuit,):
        assert circuit.wait() == 0
        await is_open(connection, circuit, probe_due=False)
        waits = [circuit.wait() for _ in range(int(RAMP * SPREAD))]
        first = min(waits)
        assert first > 3500
        # As many a second as are allowed, and none later than the spread.
        assert max(waits) - first == pytest.approx(SPREAD, rel=0.1)
        assert sum(wait < first + 1 for wait in waits) == pytest.approx(RAMP, rel=0.1)


async def test_off_it_never_opens(connection: asyncpg.Connection, database_url: str) -> None:
    async with circuits(database_url, failures=0) as (circuit,):
        assert [await passes(circuit, False) for _ in range(100)] == [True] * 100
        assert await state(connection) is None
        # Nor does it heed a row that was left behind.
        await is_open(connection)
        await circuit.look()
        assert await passes(circuit, False)


async def test_a_database_that_cannot_be_told_keeps_nobody_from_calling(
    connection: asyncpg.Connection, database_url: str
) -> None:
    async with circuits(database_url, timeout=0.2) as (circuit,), connection.transaction():
        await connection.execute("LOCK TABLE circuits")
        for _ in range(3):
            assert await passes(circuit, False)
        assert not circuit.closed
        await eventually(lambda: circuit.closed, what="it is closed again")


async def test_looks_are_rare_and_go_on_in_the_background(connection: asyncpg.Connection, database_url: str) -> None:
    async with circuits(database_url) as (circuit,):
        await is_open(connection, probe_due=False)
        for _ in range(1000):
            circuit.watch()
        assert len(circuit._tasks) == 1
        await eventually(lambda: not circuit.closed, what="it has been looked at")


class Slow(Database):
    """Answers a row when it is allowed to, however long ago it has read it."""

    read: asyncio.Event
    allowed: asyncio.Event

    async def fetchrow(self, query: str, *arguments: Any) -> asyncpg.Record | None:
        row = await super().fetchrow(query, *arguments)
        self.read.set()
        await self.allowed.wait()
        return row


async def test_a_look_from_before_the_opening_does_not_close_it_again(database_url: str) -> None:
    database = await Slow.open(database_url, size=2, timeout=5.0)
    assert isinstance(database, Slow)
    database.read, database.allowed = asyncio.Event(), asyncio.Event()
    circuit = Circuit(database, NAME, worker_id="w1", failures=2)
    try:
        look = asyncio.create_task(circuit.look())
        await database.read.wait()
        with watching() as facts:
            circuit.unanswered("no answer")
            circuit.unanswered("no answer")
            await facts.until("CIRCUIT_OPENED", circuit=NAME)
        database.allowed.set()
        await look
        assert not circuit.closed
    finally:
        await circuit.close()
        await database.close()
