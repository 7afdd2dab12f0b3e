"""The watchdog of the event loop: where that has not turned for too long, the process ends, and its parent starts another.

For what runs in the loop and does not give way: a handler or a gateway with `time.sleep`, or with a client that is not
asyncio's. Nothing in the loop can notice it, and meanwhile the process keeps its sessions, and with them its shards, and
answers nobody. A thread watches: what never gives back the interpreter's lock (an extension in C) holds that one too, and goes
unnoticed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from orderflow.engine.telemetry import PROCESS, emit
from orderflow.supervisor import FAILED, report_failure

# Looks within the limit; each wakes the thread and the loop once.
LOOKS: Final = 10
MOST_FRAMES: Final = 40
JOIN_SECONDS: Final = 1.0


@contextmanager
def loop_watched(limit: float, flush: Callable[[], object]) -> Iterator[None]:
    """For the length of a `with` block, end the process with status 1 when the running event loop stands still.

    It does when it has not turned for `limit` seconds in which this process ran: one that was stopped, or slept with its
    machine, is not judged for that time. `flush` has the log written before the end.
    """
    watchdog = _LoopWatchdog(asyncio.get_running_loop(), limit, flush)
    thread = threading.Thread(target=watchdog.run, name="loop-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watchdog.ending.set()
        # It must not ask a loop that is closed.
        thread.join(JOIN_SECONDS)


class _LoopWatchdog:
    def __init__(self, loop: asyncio.AbstractEventLoop, limit: float, flush: Callable[[], object]) -> None:
        self._loop = loop
        self._limit = limit
        self._flush = flush
        self._watched = threading.get_ident()
        self._turned = True
        self.ending = threading.Event()

    def run(self) -> None:
        # By looks and not by the clock: while the process was stopped, the clock went on and this thread did not.
        missed = 0
        while not self.ending.wait(self._limit / LOOKS):
            if self._turned:
                self._turned, missed = False, 0
                self._loop.call_soon_threadsafe(self._turn)
            elif (missed := missed + 1) >= LOOKS:
                self._end()

    def _turn(self) -> None:
        self._turned = True

    def _end(self) -> None:
        try:
            stack = _stack_of(self._watched)
            emit(PROCESS, "LOOP_BLOCKED", seconds=self._limit, at=stack[0], stack=" < ".join(stack))
            report_failure(
                f"the event loop was blocked for {self._limit:g} s at {stack[0]}: LOOP_BLOCKED in the log has the stack"
            )
            self._flush()
        finally:
            # Not by way of the loop, nor of an exception in its thread: neither would be heard.
            os._exit(FAILED)


def _stack_of(thread: int) -> list[str]:
    """File, line and function of each call under way there, the innermost first; a thread always has one."""
    calls = traceback.walk_stack(sys._current_frames()[thread])
    lines = [f"{os.path.basename(call.f_code.co_filename)}:{line} {call.f_code.co_qualname}" for call, line in calls]
    return lines[:MOST_FRAMES]
