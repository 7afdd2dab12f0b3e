"""`make run` as a person would do it: start it, place an order, see it PAID, press Ctrl-C, find nothing left behind.

Usage: python3 .ci/smoke.py      (standard library only; its data goes to a directory that is removed afterwards)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")

ADDRESS = re.compile(r"http://(?:localhost|127\.0\.0\.1):\d+")
START_SECONDS = 600.0  # the set-up included
PAID_SECONDS = 30.0
END_SECONDS = 30.0


class SmokeFailed(Exception):
    """What went wrong, in one line."""


class Run:
    """`make run` in a session of its own, like a terminal's foreground job; `output` is all it has said."""

    def __init__(self, data: Path) -> None:
        # Every charge succeeds: what is shown here is the way, not the chance of 70 %.
        settings = {"ORDERFLOW_DATA_DIR": str(data), "ORDERFLOW_GATEWAY_SUCCESS_RATE": "1"}
        self.process = subprocess.Popen(
            ("make", "--no-print-directory", "run"),
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            print(f"    {line}", end="", flush=True)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def alive(self) -> None:
        """Raises SmokeFailed when the program has ended already."""
        if self.process.poll() is not None:
            raise SmokeFailed(f"make run ended with {self.process.returncode}")


def processes() -> dict[tuple[int, str], int]:
    """Every process of this machine: (id, time of its start) -> id of its parent; zombies left out."""
    rows = subprocess.run(
        ("ps", "-A", "-o", "pid=,ppid=,stat=,lstart="), capture_output=True, text=True, check=True, timeout=30
    )
    found: dict[tuple[int, str], int] = {}
    for row in rows.stdout.splitlines():
        pid, parent, state, started = row.split(None, 3)
        if not state.startswith("Z"):
            found[int(pid), started] = int(parent)
    return found


def below(root: int) -> set[tuple[int, str]]:
    """The process `root` and all that stem from it, whichever session or group they have moved to."""
    everything = processes()
    found = {key for key in everything if key[0] == root}
    while True:
        ids = {pid for pid, _ in found}
        more = {key for key, parent in everything.items() if parent in ids} - found
        if not more:
            return found
        found |= more


def until(what: str, seconds: float, attempt: Callable[[], T | None], run: Run | None = None) -> T:
    """The first result of `attempt` that is not None. Raises SmokeFailed when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        if run:
            run.alive()
        result = attempt()
        if result is not None:
            return result
        if time.monotonic() > deadline:
            raise SmokeFailed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


def call(address: str, path: str, body: object = None) -> Any:
    """One request to the API; None when it is not there yet or answers with an error."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.loads(answer.read())
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None


def order_is_paid(run: Run) -> None:
    """Places one order and waits until it is PAID."""

    def address() -> str | None:
        found = ADDRESS.search(run.output)
        return found.group() if found else None

    def state() -> str | None:
        answer = call(api, f"/orders/{order['orderId']}")
        return answer["state"] if answer and answer["state"] in ("PAID", "FAILED") else None

    api = until("an address in the welcome", START_SECONDS, address, run)
    until(f"{api}/readyz", START_SECONDS, lambda: call(api, "/readyz"), run)
    order = call(api, "/orders", {"userId": str(uuid.uuid4()), "amount": "299.99"})
    if order is None:
        raise SmokeFailed("POST /orders was refused")
    ended = until("the order's end", PAID_SECONDS, state, run)
    if ended != "PAID":
        raise SmokeFailed(f"the order became {ended}")
    print(f"smoke: {api}/orders/{order['orderId']} is PAID", flush=True)


def nothing_is_left(run: Run, started: set[tuple[int, str]]) -> None:
    """Presses Ctrl-C, and waits until every process of the run has ended."""
    os.killpg(run.process.pid, signal.SIGINT)
    try:
        run.process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        raise SmokeFailed(f"still running {END_SECONDS:.0f} s after Ctrl-C") from None
    until("the end of every child", 10, lambda: None if started & processes().keys() else True)
    run.reader.join(10)
    if "Traceback" in run.output:
        raise SmokeFailed("there is a traceback in the output")
    print(f"smoke: ended after Ctrl-C, none of its {len(started)} processes is left", flush=True)


def main() -> None:
    """Exit code 0 when all of it was so."""
    data = Path(tempfile.mkdtemp(prefix="orderflow-smoke-"))
    data.chmod(0o711)  # as root, the embedded PostgreSQL runs as another user
    run = Run(data / "data")
    started: set[tuple[int, str]] = set()
    try:
        order_is_paid(run)
        started = below(run.process.pid)
        nothing_is_left(run, started)
    except SmokeFailed as failure:
        sys.exit(f"smoke: FAILED: {failure}")
    finally:
        for pid, when in started | (below(run.process.pid) if run.process.poll() is None else set()):
            if (pid, when) in processes():
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(data, ignore_errors=True)


if __name__ == "__main__":
    main()
