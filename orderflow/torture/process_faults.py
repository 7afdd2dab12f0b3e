"""Faults of our own processes: killed, killed again, all at once, stopped for longer than a session and continued."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping

from orderflow.settings import Role
from orderflow.torture.grounds import NOBODY, Action, Grounds
from orderflow.torture.plan import Fault, Kind
from orderflow.torture.victims import Victim

VICTIM_TIMEOUT = 5.0
VICTIM_POLL = 0.1


class ProcessFaults:
    """`actions`: by kind."""

    def __init__(self, grounds: Grounds) -> None:
        self._victims = grounds.victims
        self.actions: Mapping[Kind, Action] = {
            Kind.KILL_API: lambda fault: self._kill("api", fault),
            Kind.KILL_PUBLISHER: lambda fault: self._kill("publisher", fault),
            Kind.KILL_WORKER: lambda fault: self._kill("worker", fault),
            Kind.KILL_ALL: self._kill_all,
            Kind.KILL_TWICE: self._kill_twice,
            Kind.PAUSE_WORKER: self._pause,
        }

    async def _kill(self, role: Role, fault: Fault) -> str:
        victim = await self._chosen(role, fault.pick)
        return str(victim) if victim and send(victim.pid, signal.SIGKILL) else NOBODY

    async def _kill_all(self, fault: Fault) -> str:
        victims = [victim for victim in await self._victims.all() if send(victim.pid, signal.SIGKILL)]
        return f"{len(victims)} processes"

    async def _kill_twice(self, fault: Fault) -> str:
        first = await self._chosen("worker", fault.pick)
        if first is None or not send(first.pid, signal.SIGKILL):
            return NOBODY
        before = {victim.pid for victim in await self._victims.of("worker")}
        end = time.monotonic() + VICTIM_TIMEOUT
        while time.monotonic() < end:
            for victim in await self._victims.of("worker"):
                if victim.pid not in before and send(victim.pid, signal.SIGKILL):
                    return f"{first}, then {victim}"
            await asyncio.sleep(VICTIM_POLL)
        return str(first)

    async def _pause(self, fault: Fault) -> str:
        victim = await self._chosen("worker", fault.pick)
        if victim is None or not send(victim.pid, signal.SIGSTOP):
            return NOBODY
        try:
            await asyncio.sleep(fault.lasts)
        finally:
            # Another fault may have killed it meanwhile.
            if await self._victims.still(victim):
                send(victim.pid, signal.SIGCONT)
        return str(victim)

    async def _chosen(self, role: Role, pick: int) -> Victim | None:
        """One of the role's processes; waits a moment for one that the parent is about to start again."""
        end = time.monotonic() + VICTIM_TIMEOUT
        while not (alive := await self._victims.of(role)):
            if time.monotonic() >= end:
                return None
            await asyncio.sleep(VICTIM_POLL)
        return alive[pick % len(alive)]


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False when the process has gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
