"""Seams: the named places where a crash, an error or a delay could matter, and failpoints armed at them.

    @seam
    async def mark_published_if_attempt(connection, messages): ...

notes the function and returns it as it is: off, a seam costs nothing at all. `arm` puts failpoints around those that a plan
names, by replacing them where they stand. Each function has two, before and after; in between is its statement, send or lock.
Named failpoints with actions by passage or chance are those of FreeBSD's fail(9); fail-rs and pingcap/failpoint follow it.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from random import Random
from typing import Any, Final, TypeVar

from orderflow.engine.telemetry import PROCESS, emit

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

BEFORE: Final = "before"
AFTER: Final = "after"
# The last is of `after` only: what was asked for is done, and the caller is told that the connection was lost.
ACTIONS: Final = ("crash", "raise", "delay", "drop")

_seams: dict[str, Callable[..., Awaitable[Any]]] = {}
_owning: set[str] = set()

# As in: store.place.before=crash@3; outbox.append.after=delay(0.5)%0.01; relay._publish.after=crash@1+20
_ONE: Final = re.compile(
    r"(?P<name>[a-z_]+\.\w+)\.(?P<where>before|after)=(?P<action>[a-z]+)(?:\((?P<seconds>\d+(?:\.\d+)?)\))?"
    r"(?:@(?P<passage>[1-9]\d*)|%(?P<share>0?\.\d+|1(?:\.0*)?))?(?:\+(?P<wait>\d+(?:\.\d+)?))?"
)


class BadPlan(ValueError):
    """The text names no seam, or no action; it says which part is wrong."""


class ConnectionLost(ConnectionResetError):
    """What a failpoint raises: transient, as a lost connection is."""


@dataclass(slots=True)
class Failpoint:
    """`action` at passage number `passage`, or at each with probability `share`. `seconds` is how long a delay lasts.

    Before `begins`, by the monotonic clock, nothing happens and no passage counts.
    """

    name: str
    action: str
    passage: int | None = None
    share: float = 1.0
    seconds: float = 0.1
    begins: float = 0.0
    passed: int = 0

    async def pass_by(self, random: Random) -> None:
        """Once more. Raises ConnectionLost, or never returns, when it is its turn."""
        if time.monotonic() < self.begins:
            return
        self.passed += 1
        if self.passage is not None and self.passed != self.passage:
            return
        if self.passage is None and self.share < 1.0 and random.random() >= self.share:
            return
        if self.action == "crash":
            # By hand and at once: the log's thread dies with the process.
            os.write(2, f"failpoint {self.name}: crash\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "delay":
            await asyncio.sleep(self.seconds)
        else:
            emit(PROCESS, "FAILPOINT", name=self.name, action=self.action, passage=self.passed)
            raise ConnectionLost(f"failpoint {self.name}")


@dataclass(slots=True)
class _Armed:
    before: list[Failpoint] = field(default_factory=list)
    after: list[Failpoint] = field(default_factory=list)


def seam(function: F) -> F:
    """Note an async function as a seam, by its module's last name and its own: `outbox.append`, `wake._listen_once`."""
    name = name_of(function)
    if name in _seams:
        raise ValueError(f"two seams are named {name}")
    _seams[name] = function
    return function


def owning_seam(function: F) -> F:
    """A seam whose result has to be given back, a connection say, or that gives one back: it can crash or be delayed only.

    An error after it would be a leak that no real failure makes.
    """
    _owning.add(name_of(function))
    return seam(function)


def owning() -> frozenset[str]:
    """The names of those."""
    return frozenset(_owning)


def name_of(function: Callable[..., Any]) -> str:
    """Of a seam; the class is left out."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def seams() -> Mapping[str, Callable[..., Awaitable[Any]]]:
    """Those of every module that has been imported, by name."""
    return dict(_seams)


def parse(plan: str) -> list[Failpoint]:
    """The failpoints of a plan: `seam.before=action`, divided by semicolons, each with @N or %P behind it, and +SECONDS.

    Raises BadPlan.
    """
    found = []
    for text in filter(None, (part.strip() for part in plan.split(";"))):
        match = _ONE.fullmatch(text)
        if match is None:
            raise BadPlan(f"{text!r}: must read seam.before=action or seam.after=action, with @N or %P behind it, and +SECONDS")
        name, where, action = match["name"], match["where"], match["action"]
        if name not in _seams:
            raise BadPlan(f"{text!r}: there is no seam {name}; `orderflow torture --seams` lists them")
        if action not in ACTIONS or (action == "drop" and where == BEFORE):
            raise BadPlan(f"{text!r}: {action} is none of {', '.join(ACTIONS)}; drop is of after only")
        if action in ("raise", "drop") and name in _owning:
            raise BadPlan(f"{text!r}: {name} can only crash or be delayed: what it returns has to be given back")
        passage = int(match["passage"]) if match["passage"] else None
        share, seconds = float(match["share"] or 1.0), float(match["seconds"] or 0.1)
        begins = time.monotonic() + float(match["wait"]) if match["wait"] else 0.0
        found.append(Failpoint(f"{name}.{where}", action, passage, share, seconds, begins))
    return found


def arm(plan: str, *, seed: int = 1) -> Callable[[], None]:
    """Put the plan's failpoints in place, for the life of the process or until what is returned is called. Raises BadPlan."""
    armed: dict[str, _Armed] = {}
    for failpoint in parse(plan):
        name, _, where = failpoint.name.rpartition(".")
        getattr(armed.setdefault(name, _Armed()), where).append(failpoint)
    # One source of chance for each seam: what another seam does, or how often it is passed, changes nothing here.
    undo = [_replace(_seams[name], _around(_seams[name], points, Random(f"{seed} {name}"))) for name, points in armed.items()]

    def disarm() -> None:
        for put_back in undo:
            put_back()

    return disarm


def _around(function: Callable[..., Awaitable[Any]], points: _Armed, random: Random) -> Callable[..., Awaitable[Any]]:
    @wraps(function)
    async def with_failpoints(*arguments: Any, **named: Any) -> Any:
        for point in points.before:
            await point.pass_by(random)
        result = await function(*arguments, **named)
        for point in points.after:
            await point.pass_by(random)
        return result

    return with_failpoints


def _replace(function: Callable[..., Awaitable[Any]], by: Callable[..., Awaitable[Any]]) -> Callable[[], None]:
    owner: Any = sys.modules[function.__module__]
    for name in function.__qualname__.split(".")[:-1]:
        owner = getattr(owner, name)
    setattr(owner, function.__name__, by)
    return lambda: setattr(owner, function.__name__, function)
