"""What this process can reach: asked now and then for /readyz, by opening a connection and nothing more."""

from __future__ import annotations

import asyncio
import contextlib
from urllib.parse import urlsplit

from orderflow.health import POSTGRES, Health

INTERVAL_SECONDS = 5.0
TIMEOUT_SECONDS = 2.0


class Probes:
    """Keeps Health up to date about Kafka, and about PostgreSQL in a process whose API does not do so itself."""

    name = "probes"

    def __init__(self, health: Health, bootstrap: str, database_url: str | None) -> None:
        self._health = health
        self._kafka = [_address(server) for server in bootstrap.split(",")]
        self._postgres = urlsplit(database_url) if database_url else None

    async def run(self, stopping: asyncio.Event) -> None:
        """Look every few seconds until `stopping` is set."""
        while not stopping.is_set():
            await self.run_once()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_SECONDS):
                    await stopping.wait()

    async def run_once(self) -> None:
        """One look at each dependency."""
        errors = [await _reach(host, port) for host, port in self._kafka]
        # One broker that answers is enough: the others are found through it.
        self._health.set("kafka", None in errors, "" if None in errors else str(errors[0]))
        if self._postgres is not None:
            error = await _reach(self._postgres.hostname or "localhost", self._postgres.port or 5432)
            self._health.set(POSTGRES, error is None, error or "")


def _address(server: str) -> tuple[str, int]:
    host, _, port = server.strip().rpartition(":")
    return host, int(port)


async def _reach(host: str, port: int) -> str | None:
    """None when something accepts connections there, else why not: anyone may read that, so no address."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return "does not answer"
    except ConnectionRefusedError:
        return "refuses connections"
    except OSError as error:
        return f"cannot be reached: {type(error).__name__}"
    writer.close()
    return None
