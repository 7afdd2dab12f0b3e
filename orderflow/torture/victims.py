"""Which processes of the program are alive: the children of its parent process, as the system lists them."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from orderflow.settings import Role

LISTING_TIMEOUT = 10.0
_ROLE = re.compile(r" run --role (\w+)")


@dataclass(frozen=True, slots=True)
class Victim:
    """A process with one role."""

    role: str
    pid: int

    def __str__(self) -> str:
        return f"{self.role}, pid {self.pid}"


class Victims:
    """The processes that `orderflow run --api N ...`, whose pid is `parent`, keeps running."""

    def __init__(self, parent: int) -> None:
        self.parent = parent

    async def of(self, role: Role) -> list[Victim]:
        """That role's living processes, in the order of their pids."""
        return [victim for victim in await self.all() if victim.role == role]

    async def still(self, victim: Victim) -> bool:
        """Whether that process has not ended: its pid may be another program's by now."""
        return victim in await self.all()

    async def all(self) -> list[Victim]:
        """Every living process, in the order of their pids."""
        # Asked for each time: between two faults the parent may have put others in their place.
        return sorted(listed(await _listing(), self.parent), key=lambda victim: victim.pid)


def listed(listing: str, parent: int) -> list[Victim]:
    """The victims among the lines `pid ppid state command` of `ps`; zombies are none."""
    found = []
    for line in listing.splitlines():
        pid, ppid, state, command = line.split(None, 3)
        role = _ROLE.search(command)
        if int(ppid) == parent and role is not None and not state.startswith("Z"):
            found.append(Victim(role[1], int(pid)))
    return found


async def descendants(pid: int) -> list[int]:
    """The processes below that one, by their ids."""
    rows = [line.split(None, 2)[:2] for line in (await _listing()).splitlines()]
    children: dict[int, list[int]] = {}
    for child, parent in rows:
        children.setdefault(int(parent), []).append(int(child))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


async def _listing() -> str:
    # Twice w, as wide as it takes: into a pipe as well, `ps` would cut a command line at COLUMNS or the terminal's width, and
    # below a long path the role is what goes.
    process = await asyncio.create_subprocess_exec(
        "ps", "-axwwo", "pid=,ppid=,stat=,command=", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(LISTING_TIMEOUT):
        output, _ = await process.communicate()
    return output.decode(errors="replace")
