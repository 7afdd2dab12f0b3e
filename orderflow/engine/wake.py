"""The wake-up: a LISTEN connection whose notifications set an asyncio.Event.

A notification is a hint and lost on any reconnect; correctness is the relay's poll. The connection does nothing else: a
listener inside a transaction would hold PostgreSQL's notification queue. Its heartbeat finds what TCP does not tell: a
half-open connection stays silent for minutes (asyncpg #519).
"""

from __future__ import annotations

import asyncio
import random

import asyncpg

from orderflow.engine.outbox import CHANNEL
from orderflow.engine.patience import DependencyUnavailable, within
from orderflow.engine.postgres import close_connection, connect
from orderflow.engine.seams import seam
from orderflow.engine.telemetry import PUBLISHER, emit


class Wake:
    """Keeps `event` set whenever there may be due rows. `heartbeat`: seconds between probes, and the limit of one.

    Before the next try it waits `pause` seconds, twice as long with each failure in a row, `longest_pause` at the most.
    """

    def __init__(
        self, url: str, event: asyncio.Event, *, heartbeat: float = 2.0, pause: float = 0.05, longest_pause: float = 2.0
    ) -> None:
        self._url = url
        self._event = event
        self._heartbeat = heartbeat
        self._first_pause = self._pause = pause
        self._longest_pause = longest_pause
        self.reconnects = 0
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Listen for ever, over as many connections as it takes; ends by cancellation."""
        while True:
            try:
                await self._listen_once()
            except (DependencyUnavailable, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                emit(PUBLISHER, "WAKE_LOST", error=str(error) or type(error).__name__)
            self.reconnects += 1
            # What was notified while nobody listened is found by looking.
            self._event.set()
            await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))
            self._pause = min(self._pause * 2, self._longest_pause)

    @seam
    async def _listen_once(self) -> None:
        connection = await connect(self._url, timeout=self._heartbeat, application="orderflow wake")
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _: ended.set())
        try:
            await connection.add_listener(CHANNEL, self._notified)
            # Only failures in a row make the pause longer: lost for the tenth time, it is replaced as fast as the first time.
            self._pause = self._first_pause
            self.listening.set()
            self._event.set()
            while not ended.is_set():
                try:
                    await within(ended.wait(), self._heartbeat)
                except TimeoutError:
                    await self._probe(connection)
        except TimeoutError:
            # Half-open: to close it politely would wait for the same silence once more.
            connection.terminate()
            raise
        finally:
            self.listening.clear()
            await close_connection(connection)

    @seam
    async def _probe(self, connection: asyncpg.Connection) -> None:
        await connection.execute("SELECT 1", timeout=self._heartbeat)

    def _notified(self, *_: object) -> None:
        self._event.set()
