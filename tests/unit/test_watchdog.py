"""The watchdog: only due work of which nothing is done for the whole limit ends a run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orderflow.engine.patience import DependencyUnavailable
from orderflow.engine.watchdog import Stalled, watched
from tests.pipeline import watching

LIMIT = 0.2


class Role:
    """A role's work as the test wants it. `looks` counts how often the watchdog has asked what is due."""

    def __init__(self, due: Callable[[int], Any]) -> None:
        self.done = 0
        self.looks = 0
        self.ended: BaseException | str | None = None
        self._due = due

    async def hang(self) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise

    async def work_until(self, looks: int) -> None:
        while self.looks < looks:
            await asyncio.sleep(0.001)

    async def due(self) -> str | None:
        self.looks += 1
        found = self._due(self.looks)
        return await found if asyncio.iscoroutine(found) else found

    async def watch(self, work: Awaitable[None], stopping: asyncio.Event | None = None) -> None:
        await asyncio.wait_for(
            watched(
                work, stopping or asyncio.Event(), service="test", role="role", limit=LIMIT,  # type: ignore[arg-type]
                progress=lambda: self.done, due=self.due,
            ),
            20,
        )  # fmt: skip


async def test_due_work_and_no_progress_end_the_run_and_say_so() -> None:
    role = Role(lambda _: "3 things")
    with watching() as facts, pytest.raises(Stalled, match="3 things, and nothing was done for"):
        await role.watch(role.hang())
    assert role.ended == "cancelled"
    (told,) = facts.of("STALLED", role="role")
    assert told["due"] == "3 things"
    assert told["seconds"] >= LIMIT


async def away() -> None:
    raise DependencyUnavailable("it is away")


async def silent() -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("due", [
    lambda look: None,
    lambda look: away(),
    # Asked in vain, for as long as the limit is.
    lambda look: silent(),
    # Never for long enough: what was due is gone, or could not be asked, in between.
    lambda look: "3 things" if look % 4 else None,
    lambda look: "3 things" if look % 4 else away(),
], ids=["nothing", "away", "silent", "now and then", "away now and then"])  # fmt: skip
async def test_what_is_not_due_is_no_stall(due: Callable[[int], Any]) -> None:
    role = Role(due)
    with watching() as facts:
        await role.watch(role.work_until(5))
    assert facts.of("STALLED") == []


async def test_progress_is_no_stall_and_nobody_is_asked_what_is_due() -> None:
    role = Role(lambda _: "3 things")

    async def busy() -> None:
        for _ in range(600):
            role.done += 1
            await asyncio.sleep(0.001)

    await role.watch(busy())
    assert role.looks <= 1


async def test_a_drain_is_not_judged() -> None:
    role, stopping = Role(lambda _: "3 things"), asyncio.Event()
    stopping.set()

    async def drain() -> None:
        await asyncio.sleep(LIMIT * 3)

    await role.watch(drain(), stopping)
    assert role.looks == 0


async def test_what_the_work_raises_and_a_cancellation_go_through() -> None:
    role = Role(lambda _: None)

    async def fail() -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        await role.watch(fail())
    task = asyncio.create_task(role.watch(role.hang()))
    while not role.looks:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert role.ended == "cancelled"


async def test_an_error_of_the_question_itself_is_not_hidden() -> None:
    def wrong(_: int) -> None:
        raise KeyError("a bug")

    role = Role(wrong)
    with pytest.raises(KeyError):
        await role.watch(role.hang())
    assert role.ended == "cancelled"
