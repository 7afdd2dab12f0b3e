"""The watchdog of a role: due work of which nothing is done for too long ends the run, and the supervisor begins another.

For what no limit of its own catches: a fetch that hangs, a client whose tasks have died without a word (aiokafka #1037). A
server that is away is no such thing: to say what is due it has to be reached, and where that fails nothing is due.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from orderflow.engine.patience import is_transient, within
from orderflow.engine.telemetry import emit

# Looks within the limit.
LOOKS = 4
# What a run may take to close its clients: each of them has a limit of its own.
CLOSING_SECONDS = 10.0


class Stalled(Exception):
    """A role had work to do and got nothing done; the text says what was due, and for how long."""


async def watched(
    work: Coroutine[Any, Any, None], stopping: asyncio.Event, *, service: str, role: str, limit: float,
    progress: Callable[[], object], due: Callable[[], Awaitable[str | None]],
) -> None:  # fmt: skip
    """Run `work` to its end, unless something has been due for `limit` seconds in which nothing was done.

    `progress` returns a value that changes with whatever is done, `due` a line of text while there is something to do; it is
    asked only when nothing was done since the last look, and a transient error counts as nothing due. A drain is not judged.
    Raises Stalled, after the work was cancelled, and what the work raises.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(work)
    since: float | None = None
    last = progress()
    try:
        while not (await asyncio.wait((task,), timeout=limit / LOOKS))[0]:
            before, last = last, progress()
            what = None if last != before or stopping.is_set() else await _asked(due, limit)
            # Done while it was asked for: then what is due now, is due since now.
            if what is None or progress() != last:
                since = None
                continue
            since = loop.time() if since is None else since
            if (seconds := loop.time() - since) >= limit:
                emit(service, "STALLED", role=role, due=what, seconds=round(seconds, 1))
                raise Stalled(f"{what}, and nothing was done for {seconds:.0f} s")
        task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=CLOSING_SECONDS)


async def _asked(due: Callable[[], Awaitable[str | None]], limit: float) -> str | None:
    try:
        return await within(due(), limit)
    except Exception as error:
        if not is_transient(error):
            raise
        return None
