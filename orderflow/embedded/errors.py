"""What goes wrong with embedded servers, in words for people."""

from __future__ import annotations

from pathlib import Path


class EmbeddedError(Exception):
    """An embedded server cannot do what was asked; the text is for people and says what to do."""


class AlreadyRunningError(EmbeddedError):
    """Another server works on the same directory; `pid` is its process id, or its owner's, where known."""

    def __init__(self, directory: Path, pid: int | None) -> None:
        who = f", pid {pid}" if pid else ""
        super().__init__(f"already running here{who}: {directory}. Stop that one first, or choose another directory")
        self.pid = pid


class ServerDiedError(EmbeddedError):
    """The server ended by itself; `log_tail` holds the last lines it wrote since it was started."""

    def __init__(self, name: str, status: int, log: Path, log_tail: str) -> None:
        how = f"was ended by signal {-status}" if status < 0 else f"ended with exit code {status}"
        super().__init__(f"{name} {how}. The end of {log}:\n{log_tail or '(nothing)'}")
        self.log_tail = log_tail
