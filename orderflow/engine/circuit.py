"""A circuit breaker shared by all workers through a row of PostgreSQL: who does not answer is asked by one, not by thousands.

closed -> open: so many calls in a row of one worker had no answer. open -> half-open: its time is over, and the one delivery
that claims the probe passes. half-open -> closed: the probe was answered; -> open, for twice as long: it was not. A probe whose
worker died is claimed again when its time is over. After Michael Nygard, "Release It!" (2007).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

from orderflow.engine.patience import ENDLESS, is_transient
from orderflow.engine.postgres import Database
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import WORKER, emit

# Seconds: how long it is open at first and at the most, and between two looks at the row, while there is work.
SHORTEST = 1.0
LONGEST = 30.0
LOOK_EVERY = 1.0
# What was put off comes back at so many a second, or within so many seconds if there is too much of it for that: until the end
# of an outage it comes back again and again.
RAMP = 500.0
SPREAD = 120.0

_LOOK = "SELECT state, extract(epoch FROM due_at - now())::float8 AS due FROM circuits WHERE name = $1"

_OPEN_IF_CLOSED = """
INSERT INTO circuits AS c (name, state, due_at, worker_id) VALUES ($1, 'open', now() + $2::interval, $3)
ON CONFLICT (name) DO UPDATE SET state = 'open', opened_at = now(), due_at = excluded.due_at, probes = 0,
                                 worker_id = excluded.worker_id
WHERE c.state = 'closed'
RETURNING name
"""

# The row decides between all who find its time over at the same moment.
_CLAIM_IF_DUE = """
UPDATE circuits SET state = 'half-open', due_at = now() + $2::interval, probes = probes + 1, worker_id = $3
WHERE name = $1 AND state <> 'closed' AND due_at <= now()
RETURNING probes
"""

_END_IF_PROBE = """
UPDATE circuits SET state = $3, due_at = now() + $4::interval WHERE name = $1 AND state = 'half-open' AND probes = $2
RETURNING extract(epoch FROM now() - opened_at)::float8
"""


class Circuit:
    """One worker's view of the row `name`. `closed`: calls may be made; it can be a second behind what others have seen.

    Each delivery passes `enter` where it is not closed, tells `answered` or `unanswered` of each call, and at its end `leave`.
    `failures`: calls in a row without an answer that open it; 0: never, whatever the row says. `claim`: seconds that a probe
    has before another may be claimed.
    """

    def __init__(self, database: Database, name: str, *, worker_id: str, failures: int = 20, claim: float = 15.0) -> None:
        self._database = database
        self._name = name
        self._worker_id = worker_id
        self._failures = failures
        self._claim_for = timedelta(seconds=claim)
        self.closed = True
        # By the event loop's clock: the next probe, and the next look at the row.
        self._due = 0.0
        self._look_at = 0.0 if failures else float("inf")
        self._silences = 0
        # How often this worker has opened it.
        self._openings = 0
        self._put_off = 0.0
        self._claiming = False
        # The delivery that probes, and the number of its claim.
        self._prober: asyncio.Task[Any] | None = None
        self._probe = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self) -> None:
        """Have the row looked at in the background, at most once a second. To be called wherever there is work."""
        now = asyncio.get_running_loop().time()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY
            self._start(self.look())

    def answered(self) -> None:
        """A call was answered, whatever the answer."""
        self._silences = 0
        if self._prober is not None and self._prober is asyncio.current_task():
            self._end_probe("closed", 0.0)

    def unanswered(self, error: str) -> None:
        """A call had no answer; `error` says why."""
        if self._prober is not None and self._prober is asyncio.current_task():
            self._end_probe("open", min(LONGEST, SHORTEST * 2 ** min(self._probe, 30)))
        elif self.closed:
            self._silences += 1
            if self._silences == self._failures:
                # At once, whatever becomes of the row: what comes behind this call must not be made any more.
                self._openings += 1
                self._see(False, SHORTEST)
                self._start(self._open(error))

    async def enter(self) -> float | None:
        """None for a delivery that may pass: all while it is closed, else the one that probes. The others: seconds to wait."""
        if self.closed:
            return None
        if self._claiming or asyncio.get_running_loop().time() < self._due:
            self.watch()
            return self._seconds()
        self._claiming = True
        try:
            probe = await ENDLESS.run(self._claim)
            if probe is not None:
                self._prober, self._probe = asyncio.current_task(), probe
                self._see(False, LOOK_EVERY)
                return None
            await ENDLESS.run(self.look)
        finally:
            self._claiming = False
        return self._seconds()

    def _seconds(self) -> float | None:
        return None if self.closed else self.wait()

    def leave(self) -> None:
        """The delivery is at its end. A probe that made no call gives its claim back."""
        if self._prober is not None and self._prober is asyncio.current_task():
            self._end_probe("open", 0.0)

    def wait(self) -> float:
        """Seconds after which one that may not pass should come again: evenly spread after the next probe. 0 while closed."""
        if self.closed:
            return 0.0
        self._put_off = (self._put_off + 1 / RAMP) % SPREAD
        return max(0.0, self._due - asyncio.get_running_loop().time()) + self._put_off

    @seam
    async def look(self) -> None:
        """See what the row says."""
        openings = self._openings
        row = await self._database.fetchrow(_LOOK, self._name)
        if openings != self._openings:
            # It was read before this worker opened it, and would close it again for a moment.
            return
        if row is None or row["state"] == "closed":
            self._see(True)
        elif row["state"] == "half-open":
            # Another's probe, which mostly ends long before its claim does.
            self._see(False, min(row["due"], LOOK_EVERY))
        else:
            self._see(False, row["due"])

    @seam
    async def _open(self, error: str) -> None:
        """Tell all workers. Not tried again: a database that is away may be all that the calls have failed of."""
        try:
            opened = await self._database.fetchval(_OPEN_IF_CLOSED, self._name, timedelta(seconds=SHORTEST), self._worker_id)
        except Exception as lost:
            if not is_transient(lost):
                raise
            self._see(True)
            return
        if opened is not None:
            emit(WORKER, "CIRCUIT_OPENED", circuit=self._name, failures=self._failures, error=error)
        else:
            await self.look()

    @seam
    async def _claim(self) -> int | None:
        claimed: int | None = await self._database.fetchval(_CLAIM_IF_DUE, self._name, self._claim_for, self._worker_id)
        return claimed

    def _end_probe(self, state: str, seconds: float) -> None:
        self._prober = None
        if state == "open":
            self._see(False, seconds)
        self._start(self._tell_end(self._probe, state, seconds))

    @seam
    async def _tell_end(self, probe: int, state: str, seconds: float) -> None:
        open_for = await ENDLESS.run(
            lambda: self._database.fetchval(_END_IF_PROBE, self._name, probe, state, timedelta(seconds=seconds))
        )
        if open_for is None:
            # The claim had run out, or an earlier try has told it and was lost.
            await ENDLESS.run(self.look)
        elif state == "closed":
            self._see(True)
            emit(WORKER, "CIRCUIT_CLOSED", circuit=self._name, openSeconds=round(open_for, 3))

    def _see(self, closed: bool, seconds: float = 0.0) -> None:
        closed = closed or not self._failures
        if closed != self.closed:
            self._silences = 0
            emit(WORKER, "CIRCUIT_SEEN", circuit=self._name, open=not closed)
        due = asyncio.get_running_loop().time() + seconds
        # The same probe, seen again, does not make what was put off before and what is put off next come together.
        if due > self._due + LOOK_EVERY / 2:
            self._put_off = 0.0
        self.closed, self._due = closed, due

    def _start(self, telling: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(telling)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        # Without PostgreSQL nothing moves anyway, and the next look tells what was missed.
        if error is not None and not is_transient(error):
            raise error

    async def close(self) -> None:
        """End the statements under way."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
