"""What PostgreSQL, Kafka and the broker have in common once they are a guarded child in a directory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from orderflow.embedded.errors import AlreadyRunningError, EmbeddedError
from orderflow.embedded.lock import until_free
from orderflow.embedded.process import GuardedChild, require_posix


class EmbeddedServer(ABC):
    """A server in a directory of its own; `async with` starts and stops it."""

    name: ClassVar[str]

    def __init__(self, data_dir: Path, log_name: str) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._log_name = log_name
        self._child: GuardedChild | None = None

    @abstractmethod
    async def start(self) -> None:
        """Start it and wait until it serves. Raises EmbeddedError."""

    async def stop(self) -> None:
        """The server's orderly stop, SIGKILL when it takes too long. Does nothing when it does not run."""
        if self._child is not None:
            await self._child.stop()
            await self._ended()

    async def kill(self) -> None:
        """SIGKILL to every process of the server at once; what it had on disk stays."""
        if self._child is not None:
            await self._child.kill()
            await self._ended()

    async def _ended(self) -> None:
        self._child = None
        await until_free(self.data_dir)

    async def pause(self) -> None:
        """Freeze every process of the server: connections stay open and nothing is answered."""
        await self._running_child().pause()

    async def resume(self) -> None:
        """Let a paused server go on."""
        await self._running_child().resume()

    async def wait(self) -> int:
        """Wait until the server ends, by whatever cause; returns its exit code (negative: the signal)."""
        return await self._running_child().wait()

    def _refuse_second_start(self) -> None:
        require_posix()
        if self.running:
            raise AlreadyRunningError(self.data_dir, self.pid)

    def _running_child(self) -> GuardedChild:
        if self._child is None:
            raise EmbeddedError(f"{self.name} in {self.data_dir} is not running: call start() first")
        return self._child

    @property
    def running(self) -> bool:
        """False also when the server has ended by itself."""
        return self._child is not None and self._child.returncode is None

    @property
    def pid(self) -> int:
        """The server's process id; PostgreSQL's is the postmaster's."""
        return self._running_child().pid

    @property
    def guard_pid(self) -> int:
        """The process id of the guard between us and the server."""
        return self._running_child().guard_pid

    @property
    def log(self) -> Path:
        """The file that the server logs to; it is kept over restarts."""
        return self.data_dir / self._log_name

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
