"""Fixed arrival times, whatever becomes of what has arrived: latencies counted from them hide no stall."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from threading import Thread

# So early the thread is up; what is due before it has begun would be late by its own fault.
LEAD = 0.05


async def arrive(rate: float, seconds: float, arrived: Callable[[float], None]) -> None:
    """Call `arrived(due)` `rate` times a second for `seconds` seconds; `due` is a time of time.monotonic().

    In a thread's time and not in the event loop's, whose timers are a millisecond wide. Times that were missed are made up
    for at once. Raises TimeoutError when the loop was held up for a minute.
    """
    loop = asyncio.get_running_loop()
    begin = time.monotonic() + LEAD
    done = asyncio.Event()

    def run() -> None:
        for number in range(round(rate * seconds)):
            due = begin + number / rate
            early = due - time.monotonic()
            if early > 0:
                time.sleep(early)
            loop.call_soon_threadsafe(arrived, due)
        loop.call_soon_threadsafe(done.set)

    Thread(target=run, name="arrivals", daemon=True).start()
    async with asyncio.timeout(seconds + 60):
        await done.wait()
