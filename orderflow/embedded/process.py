"""A guarded child: spawn a server under its guard, wait until it is ready, stop, kill, pause and resume it.

Nothing here is bound to an event loop: a server that one loop started may be stopped from another (tests have
a loop each, their servers live for the session). So the guard is a plain subprocess whose reports a thread
reads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from orderflow.embedded.access import Account
from orderflow.embedded.errors import EmbeddedError, ServerDiedError

GUARD = Path(__file__).with_name("guard.py")
SPAWN_TIMEOUT = 15.0
COMMAND_TIMEOUT = 10.0
READY_INTERVAL = 0.02
LOG_TAIL_LINES = 15
LOG_TAIL_BYTES = 8192
LOG_ROTATE_BYTES = 20 * 1024 * 1024

T = TypeVar("T")


def require_posix() -> None:
    """Raises EmbeddedError on Windows, which lacks the signals that this room needs."""
    if sys.platform == "win32":
        raise EmbeddedError(
            "embedded servers run on Linux and macOS only: use WSL, or point DATABASE_URL and "
            "KAFKA_BOOTSTRAP_SERVERS at servers of your own"
        )


class GuardedChild:
    """One server process under its guard (see `guard.py`)."""

    def __init__(self, name: str, guard: subprocess.Popen[bytes], log: Path, log_start: int, stop_timeout: float) -> None:
        self.name = name
        self._stop_timeout = stop_timeout
        self.log = log
        self._log_start = log_start
        self._guard = guard
        self._started: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._ended: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._said: concurrent.futures.Future[str] = concurrent.futures.Future()
        self._acknowledgements: deque[concurrent.futures.Future[None]] = deque()
        self._sending = threading.Lock()
        threading.Thread(target=self._read_reports, name=f"guard of {name}", daemon=True).start()

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str | Path],
        *,
        name: str,
        log: Path,
        stop_signal: int = signal.SIGTERM,
        stop_timeout: float = 10.0,
        death_signal: int = signal.SIGKILL,
        account: Account | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        keep_fds: Sequence[int] = (),
        capture: bool = False,
    ) -> GuardedChild:
        """Start `command` under a guard; returns once the process exists, which is before it is ready.

        `stop_timeout` (seconds from `stop_signal` to SIGKILL) holds also when the parent dies. `death_signal`
        is what the server gets when the guard itself is killed (Linux). `keep_fds` are inherited by the
        server. `capture` lets the server's first line on standard output come back through `said()`.
        Raises EmbeddedError when it cannot be executed.
        """
        require_posix()
        options = [f"--stop-signal={int(stop_signal)}", f"--stop-timeout={stop_timeout}"]
        options += [f"--death-signal={int(death_signal)}"]
        options += [f"--keep-fd={fd}" for fd in keep_fds]
        if account is not None:
            options += [f"--user={account.uid}", f"--group={account.gid}"]
        if capture:
            options += ["--capture"]
        # Isolated and without site: nothing in the environment or the working directory can change what the
        # guard is.
        guard_command = [sys.executable, "-I", "-S", str(GUARD), *options, "--", *map(str, command)]
        child = cls._popen(guard_command, name, log, stop_timeout, cwd, env, keep_fds)
        try:
            await _result(child._started, SPAWN_TIMEOUT)
        except TimeoutError:
            child._guard.kill()
            raise EmbeddedError(f"{name} was not started within {SPAWN_TIMEOUT:.0f} s: see {log}") from None
        except asyncio.CancelledError:
            child._close_stdin()
            raise
        return child

    @classmethod
    def _popen(
        cls,
        guard_command: list[str],
        name: str,
        log: Path,
        stop_timeout: float,
        cwd: Path | None,
        env: Mapping[str, str] | None,
        keep_fds: Sequence[int],
    ) -> GuardedChild:
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > LOG_ROTATE_BYTES:
                log.replace(log.with_name(log.name + ".1"))
        with open(log, "ab") as stream:
            guard = subprocess.Popen(
                guard_command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=cwd,
                env=None if env is None else dict(env),
                pass_fds=keep_fds,
                bufsize=0,
                start_new_session=True,  # Ctrl-C reaches the parent only, which stops its servers in order
            )
            return cls(name, guard, log, stream.tell(), stop_timeout)

    def _read_reports(self) -> None:
        assert self._guard.stdout is not None
        with self._guard.stdout as reports:
            for raw in iter(reports.readline, b""):
                self._take(raw.decode(errors="replace").rstrip("\n"))
        self._guard.wait()
        assert self._guard.stdin is not None
        with self._sending, contextlib.suppress(OSError):
            self._guard.stdin.close()
        # The guard itself was killed; on Linux the kernel has ended the server with it.
        self._end(-signal.SIGKILL)

    def _take(self, line: str) -> None:
        match line.split(" ", 2):
            case ["guard", "pid", pid]:
                self._started.set_result(int(pid))
            case ["guard", "exit", status]:
                self._end(int(status))
            case ["guard", "error", text]:
                self._started.set_exception(EmbeddedError(f"{self.name} cannot be started: {text}"))
            case ["guard", "ok"]:
                self._acknowledgements.popleft().set_result(None)
            case _ if not self._said.done():
                self._said.set_result(line)
            case _:
                pass

    def _end(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)
        if not self._started.done():
            self._started.set_exception(EmbeddedError(f"the guard of {self.name} died: see {self.log}"))
        if not self._said.done():
            self._said.set_result("")
        while self._acknowledgements:
            self._acknowledgements.popleft().set_result(None)

    @property
    def pid(self) -> int:
        """The server's process id (not the guard's)."""
        return self._started.result(timeout=0)

    @property
    def guard_pid(self) -> int:
        return self._guard.pid

    @property
    def returncode(self) -> int | None:
        """None while the server runs; negative: the signal that ended it."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        """Wait until the server has ended, by whatever cause; returns its return code."""
        return await _result(self._ended, None)

    async def ended_within(self, seconds: float) -> bool:
        try:
            await _result(self._ended, seconds)
        except TimeoutError:
            return False
        return True

    async def said(self, timeout: float) -> str:
        """The first line the server wrote to standard output (needs `capture`); empty when it ended without.

        Raises TimeoutError.
        """
        return await _result(self._said, timeout)

    async def stop(self, timeout: float | None = None) -> int:
        """Send the stop signal, SIGKILL after `timeout` seconds (default: as spawned); returns the code."""
        # By a command and not by closing the pipe: a kill() must still get through while we wait.
        await self._tell(f"stop {self._stop_timeout if timeout is None else timeout}")
        return await self.wait()

    async def kill(self) -> int:
        """SIGKILL to the server and everything below it; returns its return code."""
        await self._tell("kill")
        return await self.wait()

    async def signal(self, number: int) -> None:
        await self._tell(f"signal {int(number)}")

    async def pause(self) -> None:
        """SIGSTOP to the whole process tree: the server keeps its connections and answers nothing."""
        await self._tell("pause")

    async def resume(self) -> None:
        await self._tell("resume")

    async def _tell(self, command: str) -> None:
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        assert self._guard.stdin is not None
        with self._sending:
            if self._ended.done() or self._guard.stdin.closed:
                return
            self._acknowledgements.append(done)
            try:
                self._guard.stdin.write(command.encode() + b"\n")
            except BrokenPipeError:  # the guard has just ended, so the server has
                return
        await _result(done, COMMAND_TIMEOUT)

    def _close_stdin(self) -> None:
        assert self._guard.stdin is not None
        with self._sending, contextlib.suppress(OSError):
            self._guard.stdin.close()

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the log since this start."""
        try:
            with open(self.log, "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(self._log_start, size - LOG_TAIL_BYTES))
                return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(the log cannot be read: {error})"

    async def until_ready(self, probe: Callable[[], Awaitable[bool]], timeout: float) -> None:
        """Call `probe` until it returns True.

        Raises ServerDiedError when the server ends first, EmbeddedError when `timeout` seconds are over.
        """
        last: Exception | None = None
        try:
            async with asyncio.timeout(timeout):
                while not await self.ended_within(READY_INTERVAL):
                    try:
                        if await probe():
                            return
                    except (OSError, EOFError) as error:
                        last = error
        except TimeoutError:
            why = f" (last: {last})" if last else ""
            raise EmbeddedError(
                f"{self.name} was not ready within {timeout:.0f} s{why}. The end of {self.log}:\n{self.log_tail()}"
            ) from None
        raise ServerDiedError(self.name, await self.wait(), self.log, self.log_tail())


async def _result(future: concurrent.futures.Future[T], timeout: float | None) -> T:
    # Shielded: a caller that gives up must not cancel what others wait for too.
    return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), timeout)
