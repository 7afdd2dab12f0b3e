"""The key scheduler: strict order within a key, everything else side by side, and an error that stops its key only."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orderflow.engine.scheduler import KeyScheduler
from tests.pipeline import in_tasks

Item = tuple[str, int]
# Items by key in the order of submission, and how many turns of the loop the work on each takes.
plans = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 4)), max_size=60)


def scheduling(work: Callable[[Any], Awaitable[None]], errors: list[BaseException] | None = None) -> KeyScheduler[Any]:
    """A scheduler whose items are run as tasks; what they raise is noted, and their key goes no further."""
    start_task = in_tasks(work)

    def start(key: Hashable, item: Any) -> None:
        def finished(error: BaseException | None) -> None:
            if error is None:
                scheduler.finished(key)
            elif errors is not None:
                errors.append(error)

        start_task(item, finished)

    scheduler: KeyScheduler[Any] = KeyScheduler(start)
    return scheduler


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@given(plans, st.lists(st.integers(0, 3), max_size=60))
def test_order_within_a_key_and_never_two_at_once(plan: list[tuple[str, int]], pauses: list[int]) -> None:
    async def main() -> None:
        done: dict[str, list[int]] = defaultdict(list)
        at_work: set[str] = set()

        async def work(item: Item) -> None:
            key, number = item
            assert key not in at_work
            at_work.add(key)
            await turns(plan[number][1])
            at_work.discard(key)
            done[key].append(number)

        errors: list[BaseException] = []
        scheduler: KeyScheduler[Item] = scheduling(work, errors)
        for number, (key, _) in enumerate(plan):
            scheduler.submit(key, (key, number))
            await turns(pauses[number] if number < len(pauses) else 0)
        assert await scheduler.drain(5)
        assert errors == []
        assert done == {key: [n for n, (k, _) in enumerate(plan) if k == key] for key in {k for k, _ in plan}}
        # Memory drained: a key that is idle is not remembered.
        assert scheduler.running == 0
        assert scheduler._waiting == {}

    asyncio.run(main())


@given(plans, st.integers(0, 59))
def test_an_error_stops_its_key_and_no_other(plan: list[tuple[str, int]], culprit: int) -> None:
    async def main() -> None:
        done: list[int] = []

        async def work(item: Item) -> None:
            await turns(plan[item[1]][1])
            if item[1] == culprit:
                raise ValueError(item)
            done.append(item[1])

        errors: list[BaseException] = []
        scheduler: KeyScheduler[Item] = scheduling(work, errors)
        for number, (key, _) in enumerate(plan):
            scheduler.submit(key, (key, number))
        stopped = plan[culprit][0] if culprit < len(plan) else None
        # What failed never finishes, and its key with it.
        assert await scheduler.drain(5 if stopped is None else 0.05) is (stopped is None)
        assert [type(error) for error in errors] == [ValueError] * (culprit < len(plan))
        assert sorted(done) == [n for n, (key, _) in enumerate(plan) if key != stopped or n < culprit]
        scheduler.forget_all()
        assert await scheduler.drain(0)

    asyncio.run(main())


async def test_keys_do_not_wait_for_each_other() -> None:
    gates = {key: asyncio.Event() for key in "ab"}
    done: list[Item] = []

    async def work(item: Item) -> None:
        await gates[item[0]].wait()
        done.append(item)

    scheduler: KeyScheduler[Item] = scheduling(work)
    for item in [("a", 1), ("a", 2), ("b", 1)]:
        scheduler.submit(item[0], item)
    assert scheduler.running == 2
    gates["b"].set()
    await turns(5)
    assert done == [("b", 1)]
    gates["a"].set()
    assert await scheduler.drain(5)
    assert done == [("b", 1), ("a", 1), ("a", 2)]


async def test_thousands_run_at_the_same_time() -> None:
    everyone = asyncio.Barrier(3000)

    async def work(_: int) -> None:
        await everyone.wait()

    scheduler: KeyScheduler[int] = scheduling(work)
    for number in range(3000):
        scheduler.submit(number, number)
    assert await scheduler.drain(10)


async def test_what_is_forgotten_never_begins_and_what_has_begun_ends() -> None:
    gate = asyncio.Event()
    done: list[Item] = []

    async def work(item: Item) -> None:
        await gate.wait()
        done.append(item)

    scheduler: KeyScheduler[Item] = scheduling(work)
    for number in range(4):
        scheduler.submit("a", ("a", number))
        scheduler.submit("b", ("b", number))
    scheduler.forget_waiting(lambda item: item[0] == "a" and item[1] != 2)
    gate.set()
    assert await scheduler.drain(5)
    assert sorted(done) == [("a", 0), ("a", 2), ("b", 0), ("b", 1), ("b", 2), ("b", 3)]


async def test_a_drain_that_takes_too_long_says_so_and_all_can_be_forgotten() -> None:
    begun: list[int] = []
    scheduler: KeyScheduler[int] = KeyScheduler(lambda key, item: begun.append(item))
    scheduler.submit("a", 1)
    scheduler.submit("a", 2)
    assert not await scheduler.drain(0.01)
    scheduler.forget_all()
    # Told too late: what was forgotten is not begun by it.
    scheduler.finished("a")
    assert begun == [1]
    assert scheduler.running == 0
    assert await scheduler.drain(5)


async def test_a_key_can_be_used_again_after_its_queue_has_drained() -> None:
    done: list[int] = []

    async def work(number: int) -> None:
        done.append(number)

    scheduler: KeyScheduler[int] = scheduling(work)
    for number in range(3):
        scheduler.submit("a", number)
        assert await scheduler.drain(5)
    assert done == [0, 1, 2]
