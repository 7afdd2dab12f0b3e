"""Start a server as a child and end it when the parent is gone: the process between orderflow and a server.

    python -m orderflow.embedded.guard --stop-signal 2 --stop-timeout 10 -- /path/to/server --its flags

Standard library only, so that it starts within some 30 ms and can be run by path in isolated mode.

Standard input comes from the parent. Its end means that the parent died or wants the server stopped. Until
then it carries one command a line, each answered by one `guard ok` line:
    stop SECONDS   send the stop signal; SIGKILL the whole process tree if it lives longer than that
    signal N       send signal N to the server
    pause, resume  SIGSTOP, SIGCONT to the server's whole process tree
    kill           SIGKILL to the server's whole process tree

Standard output carries `guard pid N` once the server runs, `guard exit STATUS` when it has ended (negative:
by that signal), or `guard error TEXT` when it could not be started. The server writes to the guard's standard
error (a log file), with --capture its standard output goes to the parent as well.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

LINUX = sys.platform.startswith("linux")
PR_SET_PDEATHSIG = 1
PARENT_CHECK_SECONDS = 1.0


def descendants(root: int) -> list[int]:
    """Process ids of every child, grandchild, ... of `root`, without itself.

    By parent id and not by process group: each PostgreSQL backend leads a session of its own.
    """
    children: dict[int, list[int]] = {}
    for pid, parent in _process_table():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found.extend(below)
        queue.extend(below)
    return found


def _process_table() -> list[tuple[int, int]]:
    if not LINUX:
        listing = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, timeout=10, check=True)
        rows = [line.split() for line in listing.stdout.splitlines()]
        return [(int(pid), int(parent)) for pid, parent in rows]
    table: list[tuple[int, int]] = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            # A process may end between the listing and the read.
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                # The command's name stands in parentheses and may itself hold spaces and parentheses.
                table.append((int(name), int(stat.read().rpartition(b")")[2].split()[1])))
    return table


def signal_tree(root: int, number: int) -> None:
    """Send a signal to `root` and everything below it."""
    if number != signal.SIGCONT:
        _send(root, signal.SIGSTOP)  # it might fork a child that the listing does not hold yet
    for pid in descendants(root):
        _send(pid, number)
    _send(root, number)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _dying_with_the_guard(number: int) -> Callable[[], None] | None:
    """What the child runs between fork and exec, so that not even a SIGKILL of the guard leaves an orphan."""
    if not number or not LINUX:
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    guard = os.getpid()

    def arm() -> None:
        prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != guard:  # the guard died before the line above: nobody will send the signal any more
            os._exit(1)

    return arm


def _report(*words: object) -> None:
    # A parent that died reads nothing; the server must still be ended.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, (" ".join(["guard", *map(str, words)]) + "\n").encode())


class Guard:
    """One server under guard; `run()` returns when the server has ended."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._stop_signal: int = options.stop_signal
        self._stop_timeout: float = options.stop_timeout
        self._deadline: float | None = None
        self._unread = b""
        self._inputs: list[int] = [0]
        self._parent = os.getppid()
        self._wakes, wake = os.pipe()
        for end in (self._wakes, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self.server = subprocess.Popen(
            options.command,
            stdin=subprocess.DEVNULL,
            stdout=1 if options.capture else 2,
            stderr=2,
            user=options.user,
            group=options.group,
            extra_groups=[] if options.user is not None else None,
            pass_fds=options.keep_fd,
            preexec_fn=_dying_with_the_guard(options.death_signal),
        )
        _report("pid", self.server.pid)

    def run(self) -> int:
        while self.server.poll() is None:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                signal_tree(self.server.pid, signal.SIGKILL)
                return self.server.wait()
            self._wait_for_something()
            if os.getppid() != self._parent:  # its end of our stdin may live on in a fork of it
                self._begin_stop(self._stop_timeout)
        return self.server.returncode

    def _wait_for_something(self) -> None:
        patience = PARENT_CHECK_SECONDS
        if self._deadline is not None:
            patience = max(0.0, min(patience, self._deadline - time.monotonic()))
        ready, _, _ = select.select([*self._inputs, self._wakes], [], [], patience)
        if self._wakes in ready and set(os.read(self._wakes, 512)) - {int(signal.SIGCHLD)}:
            self._begin_stop(self._stop_timeout)
        if 0 in ready:
            received = os.read(0, 4096)
            if not received:
                self._inputs.clear()
                self._begin_stop(self._stop_timeout)
            *lines, self._unread = (self._unread + received).split(b"\n")
            for line in lines:
                self._obey(line.decode().split())

    def _obey(self, command: list[str]) -> None:
        match command:
            case ["stop", seconds]:
                self._begin_stop(float(seconds))
            case ["signal", number]:
                self.server.send_signal(int(number))
            case ["pause"]:
                signal_tree(self.server.pid, signal.SIGSTOP)
            case ["resume"]:
                signal_tree(self.server.pid, signal.SIGCONT)
            case ["kill"]:
                signal_tree(self.server.pid, signal.SIGKILL)
        _report("ok")

    def _begin_stop(self, timeout: float) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout
            signal_tree(self.server.pid, signal.SIGCONT)  # a paused server could not act on the stop signal
            self.server.send_signal(self._stop_signal)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orderflow.embedded.guard", description="Guard one server.")
    parser.add_argument("--stop-signal", type=int, default=int(signal.SIGTERM), help="the server's stop signal")
    parser.add_argument("--stop-timeout", type=float, default=10.0, help="seconds from the stop signal to SIGKILL")
    parser.add_argument("--death-signal", type=int, default=0, help="sent when the guard is killed; Linux only; 0: none")
    parser.add_argument("--user", type=int, default=None, help="numeric user id to run the server as")
    parser.add_argument("--group", type=int, default=None, help="numeric group id to run the server as")
    parser.add_argument("--keep-fd", type=int, action="append", default=[], help="a descriptor the server inherits")
    parser.add_argument("--capture", action="store_true", help="the server's standard output goes to the parent")
    parser.add_argument("command", nargs="+", help="the server and its arguments, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        guard = Guard(options)
    except (OSError, subprocess.SubprocessError) as error:
        _report("error", str(error).replace("\n", " "))
        return 1
    _report("exit", guard.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
