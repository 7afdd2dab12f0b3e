"""Group commit: every item settled exactly once, for its own caller, within the bounds; whatever fails or gives up."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderflow.engine.batcher import Batcher, Overloaded, WrongCount
from orderflow.engine.patience import DependencyUnavailable, Patience

LIMIT = 5.0


class Poison(Exception):
    """What the fake statement raises when it meets an item that it cannot write."""


@dataclass
class Statement:
    """A fake flush: doubles every item; each call passes through `turns` turns of the loop."""

    poisoned: frozenset[int] = frozenset()
    turns: int = 1
    gate: asyncio.Event | None = None
    groups: list[list[int]] = field(default_factory=list)
    settled: Counter[int] = field(default_factory=Counter)
    running: int = 0
    most_running: int = 0

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.groups.append(list(items))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.gate is not None:
                await self.gate.wait()
            for _ in range(self.turns):
                await asyncio.sleep(0)
            if self.poisoned & set(items):
                raise Poison(sorted(self.poisoned & set(items)))
        finally:
            self.running -= 1
        self.settled.update(items)
        return [item * 2 for item in items]


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def outcomes(tasks: Sequence[asyncio.Task[int]]) -> list[int | BaseException]:
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), LIMIT)


@given(
    count=st.integers(1, 60),
    size=st.integers(1, 9),
    in_flight=st.integers(1, 4),
    poisoned=st.frozensets(st.integers(0, 59), max_size=6),
    cancelled=st.frozensets(st.integers(0, 59), max_size=6),
    pauses=st.lists(st.integers(0, 59), max_size=5),
)
def test_every_item_is_settled_once_for_its_own_caller(
    count: int, size: int, in_flight: int, poisoned: frozenset[int], cancelled: frozenset[int], pauses: list[int]
) -> None:
    async def scenario() -> None:
        statement = Statement(poisoned=poisoned, turns=2)
        batcher: Batcher[int, int] = Batcher(statement, size=size, in_flight=in_flight)
        tasks = []
        for item in range(count):
            tasks.append(asyncio.create_task(batcher.submit(item)))
            if item in pauses:
                await turns()
            if item in cancelled:
                tasks[item].cancel()
        for item, outcome in enumerate(await outcomes(tasks)):
            if isinstance(outcome, asyncio.CancelledError):
                assert item in cancelled
            elif isinstance(outcome, BaseException):
                assert item in poisoned
                assert outcome.args == ([item],)
            else:
                assert outcome == item * 2
                assert item not in poisoned
                assert statement.settled[item] == 1
        await turns()
        assert batcher.idle
        assert max(statement.settled.values(), default=0) <= 1
        assert max((len(group) for group in statement.groups), default=0) <= size
        assert statement.most_running <= in_flight

    asyncio.run(scenario())


async def test_alone_an_item_waits_for_nobody() -> None:
    statement = Statement(turns=0)
    batcher: Batcher[int, int] = Batcher(statement)
    task = asyncio.create_task(batcher.submit(1))
    await turns()
    assert statement.groups == [[1]]
    assert await task == 2


async def test_what_arrives_during_a_flush_goes_together_in_the_next() -> None:
    gate = asyncio.Event()
    statement = Statement(gate=gate)
    batcher: Batcher[int, int] = Batcher(statement, size=100, in_flight=1)
    tasks = [asyncio.create_task(batcher.submit(0))]
    await turns()
    tasks += [asyncio.create_task(batcher.submit(item)) for item in range(1, 50)]
    await turns()
    assert len(batcher) == 49
    gate.set()
    assert await outcomes(tasks) == [item * 2 for item in range(50)]
    assert statement.groups == [[0], list(range(1, 50))]


async def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    gate = asyncio.Event()
    statement = Statement(gate=gate)
    batcher: Batcher[int, int] = Batcher(statement, size=2, in_flight=1, queue=3)
    tasks = [asyncio.create_task(batcher.submit(0))]
    await turns()
    tasks += [asyncio.create_task(batcher.submit(item)) for item in (1, 2, 3)]
    await turns()
    with pytest.raises(Overloaded):
        await asyncio.wait_for(batcher.submit(4), LIMIT)
    gate.set()
    assert await outcomes(tasks) == [0, 2, 4, 6]
    assert statement.settled == Counter([0, 1, 2, 3])
    assert await batcher.submit(4) == 8


async def test_an_item_whose_caller_gave_up_in_the_queue_is_never_flushed() -> None:
    gate = asyncio.Event()
    statement = Statement(gate=gate)
    batcher: Batcher[int, int] = Batcher(statement, size=10, in_flight=1)
    tasks = [asyncio.create_task(batcher.submit(0))]
    await turns()
    tasks += [asyncio.create_task(batcher.submit(item)) for item in (1, 2, 3)]
    await turns()
    tasks[2].cancel()
    await turns()
    gate.set()
    results = await outcomes(tasks)
    assert isinstance(results[2], asyncio.CancelledError)
    assert [results[0], results[1], results[3]] == [0, 2, 6]
    assert statement.groups == [[0], [1, 3]]


async def test_a_caller_that_gives_up_during_the_flush_takes_nobody_along() -> None:
    gate = asyncio.Event()
    statement = Statement(gate=gate)
    batcher: Batcher[int, int] = Batcher(statement)
    tasks = [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
    await turns()
    tasks[0].cancel()
    gate.set()
    results = await outcomes(tasks)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1] == 4


async def test_a_transient_error_is_repeated_with_the_same_group() -> None:
    groups: list[list[int]] = []

    async def flush(items: Sequence[int]) -> list[int]:
        groups.append(list(items))
        if len(groups) < 3:
            raise DependencyUnavailable("away")
        return [item * 2 for item in items]

    batcher: Batcher[int, int] = Batcher(flush, patience=Patience(seconds=LIMIT, pause=0.001))
    tasks = [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
    assert await outcomes(tasks) == [2, 4]
    assert groups == [[1, 2]] * 3


async def test_a_transient_error_that_lasts_reaches_every_caller_without_halving() -> None:
    groups: list[list[int]] = []

    async def flush(items: Sequence[int]) -> list[int]:
        groups.append(list(items))
        raise DependencyUnavailable("away")

    batcher: Batcher[int, int] = Batcher(flush)
    results = await outcomes([asyncio.create_task(batcher.submit(item)) for item in (1, 2, 3)])
    assert [type(result) for result in results] == [DependencyUnavailable] * 3
    assert groups == [[1, 2, 3]]


@pytest.mark.parametrize("returned", [[], [2], [2, 4, 6, 8]])
async def test_a_flush_that_returns_a_wrong_count_fails_and_hangs_nobody(returned: list[int]) -> None:
    calls = 0

    async def flush(_items: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        return returned

    batcher: Batcher[int, int] = Batcher(flush)
    results = await outcomes([asyncio.create_task(batcher.submit(item)) for item in (1, 2, 3)])
    assert [type(result) for result in results] == [WrongCount] * 3
    assert calls == 1


@pytest.mark.parametrize("steps", range(1, 6))
async def test_close_leaves_no_caller_waiting_and_starts_nothing_more(steps: int) -> None:
    statement = Statement(gate=asyncio.Event())
    batcher: Batcher[int, int] = Batcher(statement, size=2, in_flight=2)
    tasks = [asyncio.create_task(batcher.submit(item)) for item in range(9)]
    await turns(steps)
    flushed = len(statement.groups)
    async with asyncio.timeout(LIMIT):
        await batcher.close()
    results = await outcomes(tasks)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert len(statement.groups) == flushed
    assert not statement.settled
    assert batcher.idle


async def test_close_between_two_halves_leaves_no_caller_waiting() -> None:
    halves = asyncio.Event()
    calls = 0

    async def flush(items: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Poison
        halves.set()
        await asyncio.Event().wait()
        return list(items)

    batcher: Batcher[int, int] = Batcher(flush)
    tasks = [asyncio.create_task(batcher.submit(item)) for item in range(8)]
    await asyncio.wait_for(halves.wait(), LIMIT)
    await asyncio.wait_for(batcher.close(), LIMIT)
    assert all(isinstance(result, asyncio.CancelledError) for result in await outcomes(tasks))


async def test_who_hands_in_and_goes_on_is_told_in_order_of_the_groups() -> None:
    statement = Statement(poisoned=frozenset({3}))
    batcher = Batcher[int, int](statement, size=4)
    told: list[object] = []
    everyone = asyncio.Event()

    def tell(what: object) -> None:
        told.append(what)
        if len(told) == 6:
            everyone.set()

    for number in range(6):
        batcher.hand_in(number, tell, lambda error: tell(type(error)))
    assert told == []
    await asyncio.wait_for(everyone.wait(), LIMIT)
    assert sorted(map(str, told)) == sorted(map(str, [0, 2, 4, Poison, 8, 10]))
    await asyncio.sleep(0)
    assert batcher.idle


async def test_a_full_queue_turns_away_who_hands_in() -> None:
    batcher = Batcher[int, int](Statement(), queue=2)
    for number in range(2):
        batcher.hand_in(number, lambda _: None, lambda _: None)
    with pytest.raises(Overloaded):
        batcher.hand_in(2, lambda _: None, lambda _: None)
    await batcher.close()


async def test_what_lingers_waits_for_company_and_only_so_long() -> None:
    statement = Statement()
    batcher = Batcher[int, int](statement, linger=0.05)
    first = asyncio.create_task(batcher.submit(1))
    await turns()
    assert statement.groups == []
    second = asyncio.create_task(batcher.submit(2))
    assert await outcomes([first, second]) == [2, 4]
    assert statement.groups == [[1, 2]]
    assert await asyncio.wait_for(batcher.submit(3), LIMIT) == 6
    await batcher.close()
    assert batcher.idle


async def test_what_came_during_a_flush_lingers_as_well() -> None:
    gate = asyncio.Event()
    statement = Statement(gate=gate)
    batcher = Batcher[int, int](statement, linger=0.05, in_flight=1)
    first = asyncio.create_task(batcher.submit(1))
    async with asyncio.timeout(LIMIT):
        while not statement.running:
            await asyncio.sleep(0)
    second = asyncio.create_task(batcher.submit(2))
    await turns()
    gate.set()
    assert await first == 2
    third = asyncio.create_task(batcher.submit(3))
    assert await outcomes([second, third]) == [4, 6]
    assert statement.groups == [[1], [2, 3]]


async def test_a_full_group_does_not_linger_behind_a_flush() -> None:
    gate = asyncio.Event()
    statement = Statement(gate=gate)
    batcher = Batcher[int, int](statement, size=2, linger=0.01, in_flight=1)
    tasks = [asyncio.create_task(batcher.submit(1))]
    async with asyncio.timeout(LIMIT):
        while not statement.running:
            await asyncio.sleep(0)
        batcher._linger = 3600.0
        tasks += [asyncio.create_task(batcher.submit(number)) for number in (2, 3)]
        await turns()
        gate.set()
    assert await outcomes(tasks) == [2, 4, 6]
    assert statement.groups == [[1], [2, 3]]


async def test_a_batcher_that_is_closed_while_an_item_lingers_flushes_nothing_afterwards() -> None:
    statement = Statement()
    batcher = Batcher[int, int](statement, linger=0.01)
    task = asyncio.create_task(batcher.submit(1))
    await turns()
    await batcher.close()
    await asyncio.sleep(0.03)
    assert task.cancelled()
    assert statement.groups == []
