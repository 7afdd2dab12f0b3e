"""The program as processes, read by their log lines, and a client that keeps its own record of what was accepted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import UUID

import aiohttp

from orderflow.embedded.kafka import ApacheKafka
from orderflow.engine import telemetry
from tests.pipeline import PATIENCE, Facts
from tests.servers import Broker

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Process:
    """`orderflow` as a process of its own; its JSON log lines are `facts`, other lines are `said`, and stderr is `errors`."""

    process: asyncio.subprocess.Process
    facts: Facts
    said: list[str]
    errors: list[str]
    readers: list[asyncio.Task[None]]

    @classmethod
    async def start(cls, *arguments: str, environment: Mapping[str, str]) -> Self:
        """Start it with these arguments and settings, and nothing of what is set outside."""
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("ORDERFLOW_")}
        return await cls.spawn(sys.executable, "-m", "orderflow", *arguments, environment={**inherited, **environment})

    @classmethod
    async def spawn(cls, *command: str, environment: Mapping[str, str], directory: Path = ROOT) -> Self:
        """Start this command line with this environment and nothing else in it."""
        process = await asyncio.create_subprocess_exec(
            *command, cwd=directory, env=environment, limit=2**20,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self = cls(process, Facts(), [], [], [])
        self.readers = [asyncio.create_task(self._read()), asyncio.create_task(self._read_errors())]
        return self

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            try:
                document = json.loads(line)
            except ValueError:
                document = None
            # What is meant for people may be JSON as well, printed over several lines.
            if not isinstance(document, dict) or "service" not in document:
                self.said.append(line.decode().rstrip())
                continue
            self.facts.take(document.pop("service"), document.pop("type"), (document,))
        self.facts.end()

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.errors.append(line.decode().rstrip())

    def kill(self) -> None:
        """SIGKILL: no last words."""
        self.process.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: drain."""
        self.process.send_signal(signal.SIGTERM)

    async def end(self, timeout: float = PATIENCE) -> int:
        """Wait for its end; returns the exit code."""
        async with asyncio.timeout(timeout):
            code = await self.process.wait()
            await asyncio.gather(*self.readers)
        return code

    async def close(self) -> None:
        """Leave nothing of it behind."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.end()


class Fleet:
    """Processes of one test, all against the same servers; ended with the test."""

    def __init__(self, url: str, broker: Broker | None, topic: str, **environment: str) -> None:
        if broker is not None:
            embedded = not isinstance(broker, ApacheKafka)
            environment = {
                "KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap, "ORDERFLOW_KAFKA_EMBEDDED": str(embedded), **environment,
            }  # fmt: skip
        self.environment = {
            "DATABASE_URL": url, "HTTP_PORT": "0", "ORDERFLOW_TOPIC": topic,
            "ORDERFLOW_CONSUMER_GROUP": topic, "ORDERFLOW_LOG_FORMAT": "json", "ORDERFLOW_GATEWAY_DELAY_MS": "20",
            "ORDERFLOW_BACKOFF_BASE_MS": "20", "ORDERFLOW_TOPIC_PARTITIONS": "4", "ORDERFLOW_RECONCILE_SECONDS": "5",
            **environment,
        }  # fmt: skip
        self.processes: list[Process] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(process.close() for process in self.processes))

    async def run(self, *arguments: str, **environment: str) -> Process:
        """`orderflow run` with these arguments."""
        return await self.start("run", *arguments, **environment)

    async def start(self, *arguments: str, **environment: str) -> Process:
        """`orderflow` with these arguments."""
        process = await Process.start(*arguments, environment={**self.environment, **environment})
        self.processes.append(process)
        return process


async def api_of(process: Process) -> str:
    """The address of the API in that process, as soon as it listens."""
    startup = await process.facts.until("STARTUP", service=telemetry.API)
    return str(startup["message"]).rpartition(" ")[2]


class Client:
    """Places orders over HTTP and keeps its own record of those for which it holds a 201."""

    def __init__(self) -> None:
        self.accepted: list[UUID] = []
        self.news = asyncio.Event()

    async def place(self, address: str, session: aiohttp.ClientSession, amount: str = "10.50") -> bool:
        """Place one order; False where there was no answer, or none that accepts it."""
        body = {"userId": str(uuid.uuid4()), "amount": amount}
        try:
            async with session.post(f"{address}/orders", json=body, timeout=aiohttp.ClientTimeout(total=10)) as response:
                answer = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return False
        if response.status != 201:
            return False
        self.accepted.append(UUID(answer["orderId"]))
        self.news.set()
        return True

    async def place_many(self, address: str, count: int) -> None:
        """Place that many; every one must be accepted."""
        async with aiohttp.ClientSession() as session:
            assert all(await asyncio.gather(*(self.place(address, session) for _ in range(count))))

    async def keep_placing(self, address: str, pause: float = 0.02) -> None:
        """Place one after the other, whatever comes back, until cancelled."""
        async with aiohttp.ClientSession() as session:
            while True:
                await self.place(address, session)
                # The pace of the load, not a wait for anything.
                await asyncio.sleep(pause)

    async def has_placed(self, more: int, timeout: float = PATIENCE) -> None:
        """Wait until that many more orders have been accepted."""
        wanted = len(self.accepted) + more
        async with asyncio.timeout(timeout):
            while len(self.accepted) < wanted:
                self.news.clear()
                await self.news.wait()
