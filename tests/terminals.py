"""A terminal for a program that asks whether it has one."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from threading import Thread
from types import TracebackType
from typing import Self, TextIO


class Terminal:
    """A pseudo terminal; a context manager. `descriptor` is for the program, `text` is all that was written, at the end."""

    def __init__(self, columns: int = 80) -> None:
        self._master, self.descriptor = pty.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._read: list[bytes] = []
        self._reader = Thread(target=self._take, daemon=True)
        self.stream: TextIO = os.fdopen(os.dup(self.descriptor), "w", encoding="utf-8")

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stream.close()
        # Its last holder: the reader meets the end.
        os.close(self.descriptor)
        self._reader.join(20)
        os.close(self._master)

    def _take(self) -> None:
        while True:
            try:
                some = os.read(self._master, 65536)
            except OSError:  # how Linux tells that nobody has the other end any more
                return
            if not some:
                return
            self._read.append(some)

    @property
    def text(self) -> str:
        """What was written, escapes and all."""
        return b"".join(self._read).decode()

    @property
    def lines(self) -> list[str]:
        """Each state of a line that is written over, without escapes and the blanks at its end."""
        shown = self.text.replace("\x1b[?25l", "").replace("\x1b[?25h", "").replace("\x1b[K", "")
        return [line.rstrip() for line in shown.replace("\n", "\r").split("\r") if line.strip()]
