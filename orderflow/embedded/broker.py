"""A broker that speaks the Kafka protocol, without Java: librdkafka's mock cluster in a child process.

What it is not: it keeps everything in memory (a restart forgets topics, messages and committed offsets) and
only the last 5 MB or 100,000 message sets of each partition, so it never carries a durability claim. It has
no CreateTopics: a topic appears on first use, always with 4 partitions. It chooses its port itself
(librdkafka has no setting for it, nor for the number of partitions), so the address changes at each start. It
does not wake a waiting fetch when data arrive: a consumer's `fetch_max_wait_ms` is its latency, 5 is a good
value here. A group that is not new takes the session timeout less one second to rebalance: 1500 ms is a good
`session_timeout_ms` here.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.process import GuardedChild
from orderflow.embedded.server import EmbeddedServer

PARTITIONS = 4
MAIN = Path(__file__).with_name("broker_main.py")


class EmbeddedBroker(EmbeddedServer):
    """One mock broker; its log lies in `data_dir`, its data nowhere."""

    name = "the embedded broker"

    def __init__(self, data_dir: Path, *, start_timeout: float = 20.0, stop_timeout: float = 5.0) -> None:
        super().__init__(data_dir, "broker.log")
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._bootstrap: str | None = None

    async def start(self) -> None:
        """Start it and wait for its address. Raises EmbeddedError, ServerDiedError."""
        self._refuse_second_start()
        if importlib.util.find_spec("confluent_kafka") is None:
            raise EmbeddedError("the embedded broker is missing: `pip install confluent-kafka`, or `make run` in a checkout")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        # -P: the directory of the script, which holds a kafka.py, stays out of the import path.
        child = self._child = await GuardedChild.spawn(
            [sys.executable, "-P", MAIN],
            name=self.name,
            log=self.log,
            stop_signal=signal.SIGTERM,
            stop_timeout=self._stop_timeout,
            capture=True,
        )
        try:
            await child.until_ready(self._has_said_its_address, self._start_timeout)
        except BaseException:
            await self.kill()
            raise

    async def _ended(self) -> None:
        self._child = None  # nothing of it is left that a successor could meet

    async def _has_said_its_address(self) -> bool:
        try:
            self._bootstrap = await self._running_child().said(self._start_timeout) or None
        except TimeoutError:
            return False
        return self._bootstrap is not None

    @property
    def bootstrap(self) -> str:
        """host:port, for `bootstrap_servers`; another one after each start."""
        if self._bootstrap is None:
            raise EmbeddedError("the address is known after start()")
        return self._bootstrap
