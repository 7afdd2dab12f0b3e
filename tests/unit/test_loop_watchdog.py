"""The watchdog of the event loop, in processes of its own: what blocks ends the process, what merely stood still does not."""

from __future__ import annotations

import signal
import time

import pytest

from tests.programs import Program

# Where the loop is blocked: a sleep that keeps the thread, a computation that only lends it, a wait for a lock.
BLOCKS = {
    "sleep": "time.sleep(3600)",
    "computation": "while True: pass",
    "lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
}
PROGRAM = """
import threading
from orderflow.loop_watchdog import loop_watched

limit, what = float(sys.argv[1]), sys.argv[2]
subscribe()

def guilty():
    {block}

async def main():
    with loop_watched(limit, lambda: tell("FLUSHED")):
        tell("RUNNING")
        if what == "block":
            await asyncio.sleep(0)
            guilty()
        for _ in range(4 if what == "slow" else 0):
            time.sleep(limit / 2)
            await asyncio.sleep(limit / 4)
        if what == "wait":
            loop = asyncio.get_running_loop()
            stop = asyncio.Event()
            loop.add_signal_handler(signal.SIGTERM, stop.set)
            tell("READY")
            await stop.wait()
    # Nobody watches any more.
    time.sleep(limit * 1.5)
    tell("DONE")

{run}
"""
ASYNCIO = "asyncio.run(main())"
UVLOOP = "import uvloop; asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())"


def program(limit: float, what: str, *, block: str = "pass", run: str = ASYNCIO) -> Program:
    return Program(PROGRAM.replace("{block}", block).replace("{run}", run), str(limit), what)


@pytest.mark.parametrize("run", [ASYNCIO, UVLOOP], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_blocked_loop_ends_the_process_and_says_where(block: str, run: str) -> None:
    with program(0.5, "block", block=BLOCKS[block], run=run) as blocked:
        told = blocked.until("LOOP_BLOCKED")
        # Last of all, so that both lines are written.
        blocked.until("FLUSHED")
        assert blocked.end() == 1
    assert blocked.types() == ["RUNNING", "LOOP_BLOCKED", "FAILED", "FLUSHED"]
    assert told["seconds"] == 0.5
    assert " guilty" in told["at"] + told["stack"].split(" < ")[1]
    assert " guilty < <string>:" in told["stack"]
    assert " main < " in told["stack"]
    said = f"the event loop was blocked for 0.5 s at {told['at']}: LOOP_BLOCKED in the log has the stack"
    assert blocked.errors == f"orderflow: {said}\n"


def test_a_loop_that_is_slow_and_turns_goes_on_and_after_its_end_nobody_watches() -> None:
    with program(1.0, "slow") as slow:
        assert slow.end() == 0
    assert slow.types() == ["RUNNING", "DONE"]


def test_a_process_that_was_stopped_for_longer_goes_on() -> None:
    with program(1.0, "wait") as stopped:
        stopped.until("READY")
        for _ in range(2):
            stopped.send(signal.SIGSTOP)
            # What it is stopped for: longer than the limit by the clock.
            time.sleep(2.0)
            stopped.send(signal.SIGCONT)
        stopped.send(signal.SIGTERM)
        assert stopped.end() == 0
    assert stopped.types() == ["RUNNING", "READY", "DONE"]
