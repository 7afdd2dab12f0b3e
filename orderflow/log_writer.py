"""Lines to a descriptor from a thread of its own: who logs never waits for who reads.

Lines are collected for some milliseconds and written together, in chunks that end at a line's end, so that processes
that share the descriptor do not mix their lines.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from threading import Event, RLock, Thread
from typing import Final

LIMIT_BYTES: Final = 32 * 2**20
LATENCY_SECONDS: Final = 0.02
FILE_CHUNK: Final = 64 * 1024


class LineWriter:
    """Writes lines to `descriptor`, at the latest some `latency` seconds after `write`.

    When more than `limit` bytes wait, lines are dropped; `on_dropped` is told how many once there is room again.
    When nobody reads any more (EPIPE), `on_closed` is called once and every later line is let go.
    Both are called in the writer's thread.
    """

    def __init__(
        self, descriptor: int, *, limit: int = LIMIT_BYTES, latency: float = LATENCY_SECONDS,
        on_dropped: Callable[[int], None], on_closed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._descriptor = descriptor
        self._limit = limit
        self._latency = latency
        self._on_dropped = on_dropped
        self._on_closed = on_closed
        self._chunk = _chunk_size(descriptor)
        # Reentrant: the garbage collector may run a finalizer that logs while this thread holds the lock.
        self._lock = RLock()
        self._lines: list[bytes] = []
        self._waiting = 0
        self._dropped = 0
        self._closed = False
        self._failing = False
        self._awake = False
        self._wake = Event()
        self._hurry = Event()
        self._idle = Event()
        self._idle.set()
        self._ending = False
        self._thread = Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, lines: Sequence[bytes]) -> None:
        """Take some lines, each with its newline; never blocks, never raises."""
        with self._lock:
            if self._waiting > self._limit:
                self._dropped += len(lines)
                return
            if self._closed:
                return
            self._lines.extend(lines)
            self._waiting += sum(map(len, lines))
            if self._awake:
                return
            self._awake = True
            self._idle.clear()
        self._wake.set()

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait until all that was taken is written; False after `timeout` seconds."""
        self._hurry.set()
        self._wake.set()
        return self._idle.wait(timeout)

    def close(self, timeout: float = 1.0) -> bool:
        """Write what is there and end the thread; False when nobody has read it within `timeout` seconds."""
        self._ending = True
        self._hurry.set()
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            if not self._ending:
                self._hurry.wait(self._latency)
                self._hurry.clear()
            with self._lock:
                lines, self._lines = self._lines, []
            self._write_all(lines)
            self._report_dropped()
            with self._lock:
                if self._lines:
                    continue
                self._awake = False
                self._wake.clear()
                self._idle.set()
            # Asked after the clearing: a close() that came before it would be slept through.
            if self._ending:
                return

    def _write_all(self, lines: Sequence[bytes]) -> None:
        for chunk in _chunks(lines, self._chunk):
            if not self._closed:
                try:
                    _write(self._descriptor, chunk)
                    self._failing = False
                except (BrokenPipeError, ConnectionResetError):
                    self._reader_is_gone()
                except OSError:
                    # A full disk, say: what cannot be written is lost, and the program goes on.
                    self._failing = True
                    with self._lock:
                        self._dropped += chunk.count(b"\n")
            with self._lock:
                self._waiting -= len(chunk)

    def _reader_is_gone(self) -> None:
        self._closed = True
        # The interpreter flushes sys.stdout at its end, and would complain on stderr of the same closed pipe.
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
        self._on_closed()

    def _report_dropped(self) -> None:
        with self._lock:
            # A report while writes fail would be dropped, and reported.
            there_is_room = self._waiting <= self._limit // 2 and not self._failing and not self._closed
            dropped = self._dropped if there_is_room else 0
            self._dropped -= dropped
        if dropped:
            self._on_dropped(dropped)


def _chunk_size(descriptor: int) -> int:
    """What one write may carry without being torn: POSIX promises PIPE_BUF bytes for a pipe."""
    try:
        return FILE_CHUNK if stat.S_ISREG(os.fstat(descriptor).st_mode) else select.PIPE_BUF
    except OSError:
        return select.PIPE_BUF


def _chunks(lines: Sequence[bytes], size: int) -> Iterator[bytes]:
    """The lines in pieces of at most `size` bytes that break none of them; a longer line goes alone."""
    start, length = 0, 0
    for at, line in enumerate(lines):
        if length and length + len(line) > size:
            yield b"".join(lines[start:at])
            start, length = at, 0
        length += len(line)
    if length:
        yield b"".join(lines[start:])


def _write(descriptor: int, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            # Whoever gave us the descriptor shares it with a program that has made it non-blocking.
            if not select.select((), (descriptor,), (), 1.0)[1]:
                time.sleep(LATENCY_SECONDS)
