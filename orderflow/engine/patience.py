"""Errors of the servers we depend on: which of them pass, how long to wait for that, and what to tell people."""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg

R = TypeVar("R")


class DependencyUnavailable(Exception):
    """PostgreSQL or Kafka cannot be reached; the text says which, where, and why. It may pass."""


class Misconfigured(Exception):
    """A server was reached and refuses what the settings ask for; the text says what to change. It will not pass."""


# What a later try can mend: the server is away, restarting, read-only after a failover, or two transactions met.
TRANSIENT = (
    DependencyUnavailable,
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # What asyncpg says when a connection ends in the middle of something else it was doing.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
)


def is_transient(error: BaseException) -> bool:
    """True for errors after which the same statement may succeed on another try."""
    # asyncpg reports an argument that does not fit its type under the same class as a lost connection. (A certificate that does
    # not verify is a ValueError and an OSError: renewing it mends that.)
    argument = isinstance(error, asyncpg.exceptions.DataError | ValueError) and not isinstance(error, OSError)
    return isinstance(error, TRANSIENT) and not argument


async def within(awaitable: Awaitable[R], seconds: float | None) -> R:
    """The result of the awaitable; TimeoutError after that many seconds.

    Instead of asyncio.wait_for, which in Python 3.11 swallows a cancellation that meets the result in the same turn of the
    loop (gh-86296): a role that was told to end would go on, and whoever waits for its end would wait for ever.
    """
    async with asyncio.timeout(seconds):
        return await awaitable


class TimeLimit:
    """`within` for thousands of calls at a time that all have the same limit: one timer for all of them.

    A call may take up to a twentieth longer than `seconds`.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # In the order of their begin, which is that of their end.
        self._running: dict[asyncio.Task[Any], float] = {}
        self._expired: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, awaitable: Awaitable[R]) -> R:
        """The result of the awaitable; TimeoutError when it takes too long. One call at a time for each task."""
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        self._running[task] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_later(self._seconds / 20, self._look, loop)
        try:
            return await awaitable
        except asyncio.CancelledError:
            # Ours, unless somebody else wants this task to end as well.
            if task in self._expired and task.uncancel() == 0:
                raise TimeoutError from None
            raise
        finally:
            self._running.pop(task, None)
            self._expired.discard(task)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        late = []
        for task, end in self._running.items():
            if end > now:
                break
            late.append(task)
        for task in late:
            del self._running[task]
            self._expired.add(task)
            task.cancel()
        self._timer = loop.call_later(self._seconds / 20, self._look, loop) if self._running else None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long transient errors are answered by trying again. `seconds`: 0 not at all, None without an end."""

    seconds: float | None = 0.0
    pause: float = 0.05
    longest_pause: float = 1.0

    async def run(self, action: Callable[[], Awaitable[R]]) -> R:
        """Run the action until it succeeds, fails for good, or the time is over; then its last error is raised."""
        loop = asyncio.get_running_loop()
        end = None if self.seconds is None else loop.time() + self.seconds
        pause = self.pause
        while True:
            try:
                return await action()
            except Exception as error:
                if not is_transient(error) or (end is not None and loop.time() + pause > end):
                    raise
            # Jitter: hundreds of callers that lost one server must not come back in the same millisecond.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, self.longest_pause)


ENDLESS = Patience(seconds=None)


async def wait_until(attempt: Callable[[], Awaitable[R]], *, timeout: float, waiting: Callable[[str], object]) -> R:
    """Repeat `attempt` while it raises DependencyUnavailable, for `timeout` seconds; `waiting` is told each new reason."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    pause = 0.1
    said = ""
    while True:
        try:
            return await attempt()
        except DependencyUnavailable as error:
            if loop.time() + pause > end:
                raise
            if str(error) != said:
                said = str(error)
                waiting(said)
        await asyncio.sleep(pause * random.uniform(0.7, 1.0))
        pause = min(pause * 1.7, 2.0)


def database_error(url: str, error: BaseException) -> DependencyUnavailable | Misconfigured:
    """What a failed connection means, in one line that says what to do; it never shows the password."""
    parts = urlsplit(url)
    address = parts.netloc.rpartition("@")[2]
    where = f"PostgreSQL at {address}" + ("" if re.search(r":\d+$", address) else ":5432")
    match error:
        case ssl.SSLError():
            return DependencyUnavailable(
                f"{where} does not get through TLS: is its certificate signed by the sslrootcert in DATABASE_URL, and made out "
                f"to this host? ({error})"
            )
        case FileNotFoundError() if "sslrootcert=" in parts.query:
            return Misconfigured("DATABASE_URL: there is no file where sslrootcert points to")
        case asyncpg.exceptions.ClientConfigurationError():
            return Misconfigured(f"DATABASE_URL: {error}")
        case asyncpg.InvalidPasswordError() | asyncpg.InvalidAuthorizationSpecificationError():
            return Misconfigured(f"{where} refuses user {parts.username!r}: check user and password in DATABASE_URL")
        case asyncpg.InvalidCatalogNameError():
            return Misconfigured(f"{where} has no database {parts.path.lstrip('/')!r}: create it or correct DATABASE_URL")
        case asyncpg.TooManyConnectionsError():
            return DependencyUnavailable(
                f"{where} has no free connection: raise max_connections or lower ORDERFLOW_DATABASE_POOL_SIZE"
            )
        case TimeoutError():
            return DependencyUnavailable(f"{where} does not answer: check the address in DATABASE_URL")
        case OSError():
            return DependencyUnavailable(f"{where} cannot be reached: is it running, and is DATABASE_URL right? ({error})")
        case asyncpg.PostgresError() if not is_transient(error):
            return Misconfigured(f"{where}: {error}")
        case _:
            return DependencyUnavailable(f"{where}: {type(error).__name__}: {error}")
