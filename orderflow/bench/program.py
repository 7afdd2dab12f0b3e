"""The program under measurement, as anyone starts it: `orderflow run ...` in processes of its own, its JSON log in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from orderflow.bench.exchange import Address, ask, get
from orderflow.embedded import ports
from orderflow.embedded.access import clean_environment
from orderflow.embedded.process import GuardedChild

PACKAGE_PARENT = Path(__file__).resolve().parent.parent.parent
READY_TIMEOUT = 60.0
# The program's own grace period, and its parent's margin, come first.
STOP_TIMEOUT = 20.0
PROBE_TIMEOUT = 2.0


class ProgramFailed(Exception):
    """The program, or the load generator, ended otherwise than it should; the text is for people."""


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """Our environment with these settings, in which `python -m orderflow` is this very program wherever it is started."""
    ours = clean_environment()
    paths = [str(PACKAGE_PARENT), *filter(None, [ours.get("PYTHONPATH")])]
    return {**ours, "PYTHONPATH": ":".join(paths), **settings}


class Program:
    """One `orderflow run`, ended with us however we end (see embedded.guard)."""

    def __init__(
        self, arguments: Sequence[str], settings: Mapping[str, str], directory: Path, *, name: str = "orderflow"
    ) -> None:
        self.address = Address(ports.HOST, ports.free_port())
        self.log = directory / f"{name}.log"
        self._arguments = arguments
        port = str(self.address.port)
        # A process without the API says on the port for metrics that it is ready.
        probed = {"ORDERFLOW_METRICS_PORT": port} if "--role" in arguments and "api" not in arguments else {}
        self._environment = environment_of(
            {"ORDERFLOW_LOG_FORMAT": "json", **probed, **settings, "HTTP_PORT": port, "ORDERFLOW_HTTP_HOST": ports.HOST}
        )
        self._directory = directory
        self._child: GuardedChild | None = None

    async def start(self, *, timeout: float = READY_TIMEOUT) -> float:
        """Start it; returns the seconds until /readyz answered 200.

        Raises EmbeddedError with the end of its log when that does not come.
        """
        begun = time.monotonic()
        self._child = await GuardedChild.spawn(
            [sys.executable, "-m", "orderflow", "run", *self._arguments],
            name="orderflow", log=self.log, stop_timeout=STOP_TIMEOUT, cwd=self._directory, env=self._environment,
        )  # fmt: skip
        try:
            await self._child.until_ready(self._is_ready, timeout)
        except BaseException:
            await self._child.stop()
            raise
        return time.monotonic() - begun

    async def _is_ready(self) -> bool:
        try:
            return (await ask(self.address, get(self.address, "/readyz"), timeout=PROBE_TIMEOUT)).status == 200
        except TimeoutError:
            return False

    @property
    def pid(self) -> int:
        """Of the process that was started; with `--api N` that is the parent of the others."""
        assert self._child is not None
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return None if self._child is None else self._child.returncode

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL to all its processes when it takes too long; returns the exit code."""
        if self._child is None:
            return 0
        return await self._child.stop()

    def log_tail(self) -> str:
        """The last lines of its log."""
        return "" if self._child is None else self._child.log_tail()
