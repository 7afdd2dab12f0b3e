"""One timer for many calls: each ends in time, and none is told of another's end or of a cancellation that is not its own."""

from __future__ import annotations

import asyncio

import pytest

from orderflow.engine.patience import TimeLimit

LIMIT = 10.0


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def test_what_is_in_time_gives_its_result_and_leaves_nothing_behind() -> None:
    limit = TimeLimit(LIMIT)

    async def answer(number: int) -> int:
        await asyncio.sleep(0)
        return number

    async with asyncio.timeout(LIMIT):
        assert await asyncio.gather(*(limit.run(answer(number)) for number in range(100))) == list(range(100))
    assert not limit._running
    assert not limit._expired


async def test_what_hangs_ends_and_the_others_go_on() -> None:
    limit = TimeLimit(0.05)
    release = asyncio.Event()
    hanging = [asyncio.create_task(limit.run(never())) for _ in range(50)]
    async with asyncio.timeout(LIMIT):
        results = await asyncio.gather(*hanging, return_exceptions=True)
        assert {type(result) for result in results} == {TimeoutError}
        assert not any(task.cancelled() for task in hanging)
        # The timer was let go with the last call, and comes again with the next.
        later = asyncio.create_task(limit.run(release.wait()))
        await asyncio.sleep(0)
        release.set()
        assert await later is True
        with pytest.raises(TimeoutError):
            await limit.run(never())


async def test_a_cancellation_from_outside_stays_one() -> None:
    limit = TimeLimit(LIMIT)
    task = asyncio.create_task(limit.run(never()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not limit._running


async def test_an_error_of_the_call_is_the_caller_s() -> None:
    async def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await TimeLimit(LIMIT).run(fails())


async def test_who_is_cancelled_by_both_is_cancelled() -> None:
    limit = TimeLimit(0.02)
    task = asyncio.create_task(limit.run(never()))
    await asyncio.sleep(0)
    limit._running[task] = 0.0
    limit._look(asyncio.get_running_loop())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
