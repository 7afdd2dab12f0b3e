"""One server a directory: a kernel lock that the server itself holds, so that no crash can leave it behind.

The starter takes the lock, hands the open file to the server (which all its children inherit) and closes its
own. The lock is free again exactly when the last process of that server has ended, whatever pid files say.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
from pathlib import Path
from types import TracebackType

from orderflow.embedded.errors import AlreadyRunningError, EmbeddedError

if sys.platform != "win32":
    import fcntl

POLL_INTERVAL = 0.02
ENDING_TIMEOUT = 20.0


def alive(pid: int) -> bool:
    """Whether a process with this id exists, whoever owns it, and has not ended without being reaped yet."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except FileNotFoundError:  # macOS has no /proc; on Linux it has just ended
        return sys.platform != "linux"
    except OSError:
        return True


class InstanceLock:
    """The lock of one instance directory while it is ours; its `fd` goes to the server."""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    async def acquire(cls, directory: Path, patience: float = ENDING_TIMEOUT) -> InstanceLock:
        """Take the lock, waiting at most `patience` seconds for a server that is already ending.

        Raises AlreadyRunningError when one runs there, and EmbeddedError when the directory cannot be locked.
        """
        path = directory / "lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise EmbeddedError(f"{path} cannot be opened: {error.strerror}. Was it made by another user?") from None
        lock = cls(fd, path)
        try:
            async with asyncio.timeout(patience):
                while not lock._try():
                    owner, server = lock._holder()
                    if server and alive(owner) and alive(server):
                        raise AlreadyRunningError(directory, server)
                    await asyncio.sleep(POLL_INTERVAL)
        except TimeoutError:
            lock.close()
            raise AlreadyRunningError(directory, lock_holder_pid(directory)) from None
        except BaseException:
            lock.close()
            raise
        lock.record(0)
        return lock

    def _try(self) -> bool:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise EmbeddedError(f"{self.path} cannot be locked: {error.strerror}. Choose a local directory") from None
        return True

    def record(self, server: int) -> None:
        """Write down who holds the lock, for whoever comes next: our process id and the server's."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{os.getpid()} {server}\n".encode(), 0)

    def _holder(self) -> tuple[int, int]:
        words = os.pread(self.fd, 64, 0).split()
        if len(words) != 2:
            return 0, 0
        return int(words[0]), int(words[1])

    def close(self) -> None:
        """Close our copy; the server's keeps the lock for as long as the server lives."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    async def __aenter__(self) -> InstanceLock:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock_holder_pid(directory: Path) -> int | None:
    """The process id of the server that the lock file names, or None."""
    with contextlib.suppress(OSError, ValueError):
        words = (directory / "lock").read_text().split()
        if len(words) == 2:
            return int(words[1]) or int(words[0])
    return None


async def until_free(directory: Path, patience: float = ENDING_TIMEOUT) -> None:
    """Wait until no process of a server that we have just ended is left. Raises AlreadyRunningError."""
    (await InstanceLock.acquire(directory, patience)).close()
