"""A real Apache Kafka on this machine, without Docker: one KRaft node as a guarded child process.

    python -m orderflow.embedded.kafka [--port 9092] [--data DIR]

runs one in the foreground until Ctrl-C. Needs Java 17 or later, and Maven for the first time (see
`kafka_install`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orderflow.embedded import ports
from orderflow.embedded.errors import EmbeddedError, ServerDiedError
from orderflow.embedded.kafka_install import (
    FORMATTED,
    VERSION,
    KafkaInstall,
    available,
    default_cache_dir,
    install,
    java_environment,
)
from orderflow.embedded.lock import InstanceLock
from orderflow.embedded.process import GuardedChild
from orderflow.embedded.server import EmbeddedServer

__all__ = ["VERSION", "ApacheKafka", "available", "default_cache_dir", "install"]

DEFAULT_PORT = 9092
REQUEST_TIMEOUT_MS = 5_000
PORT_ATTEMPTS = 5


class ApacheKafka(EmbeddedServer):
    """One Apache Kafka node, broker and controller in one process, on 127.0.0.1 only.

    `data_dir` is the directory of the instance: it holds `data`, `server.properties`, `kafka.log` and `lock`.
    Topics and messages survive `stop`, `kill` and `restart`; `wipe` is the cluster that lost all its data.
    """

    name = f"Apache Kafka {VERSION}"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        detour: int | None = None,
        heap: str = "512m",
        properties: Mapping[str, str | int] | None = None,
        java_options: Sequence[str] = (),
        cache_dir: Path | None = None,
        start_timeout: float = 60.0,
        stop_timeout: float = 15.0,
    ) -> None:
        """`port` is taken when it is free, else (and with None) any free one. `heap` is Java's -Xmx.

        `detour` is a port of 127.0.0.1: whoever comes in at `detoured_port` is sent there for every further connection.
        `properties` are server properties by name, `java_options` more words for `java`. Times are seconds;
        `stop_timeout` is when a stop becomes SIGKILL.
        """
        super().__init__(data_dir, "kafka.log")
        self._preferred = port
        self._detour = detour
        self._heap = heap
        self._properties = dict(properties or {})
        self._java_options = tuple(java_options)
        self._cache_dir = cache_dir
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._ports: tuple[int, int, int] | None = None

    async def start(self) -> None:
        """Install Kafka if need be, format the storage if it is new, start, wait until a client is served.

        Raises AlreadyRunningError, ServerDiedError (with the end of the log) or EmbeddedError.
        """
        self._refuse_second_start()
        installed = await install(self._cache_dir)
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddedError(f"{self.data_dir} cannot be created: {error.strerror}: choose another directory") from None
        async with await InstanceLock.acquire(self.data_dir) as lock:
            await asyncio.to_thread(self._format, installed)
            self._child = await self._start_on_free_ports(installed, lock)

    def _format(self, installed: KafkaInstall) -> None:
        data, partial = self.data_dir / "data", self.data_dir / "data.partial"
        if (data / "meta.properties").exists():
            return
        for leftover in (data, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.copytree(installed.directory / FORMATTED, partial)
        # A cluster of its own: clients tell clusters apart by this id.
        (partial / "meta.properties").write_text(
            f"version=1\nnode.id=1\ncluster.id={_random_id()}\ndirectory.id={_random_id()}\n"
        )
        partial.rename(data)

    async def _start_on_free_ports(self, installed: KafkaInstall, lock: InstanceLock) -> GuardedChild:
        again = self._ports is not None  # after a restart clients look for it where it was
        for _ in range(PORT_ATTEMPTS):
            if self._ports is None or not again:
                client = ports.choose(self._preferred)
                self._ports = (client, ports.free_port(), ports.free_port())
            child = await self._spawn(installed, lock, *self._ports)
            lock.record(child.pid)
            try:
                await child.until_ready(self._serves, self._start_timeout)
            except ServerDiedError as error:
                if again or "BindException" not in error.log_tail:
                    raise
                continue  # somebody took a port after we had looked
            except BaseException:
                await child.kill()
                raise
            return child
        raise EmbeddedError(f"no free port was found for Apache Kafka in {PORT_ATTEMPTS} attempts")

    async def _spawn(
        self, installed: KafkaInstall, lock: InstanceLock, client: int, controller: int, detoured: int
    ) -> GuardedChild:
        here, quorum = f"PLAINTEXT://{ports.HOST}:{client}", f"{ports.HOST}:{controller}"
        properties: dict[str, str | int] = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{quorum}",
            "listeners": f"{here},CONTROLLER://{quorum}",
            "advertised.listeners": here,
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(self.data_dir / "data"),
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            # After a kill the controller lets the broker in again only when its old session has run out
            # (default 9 s).
            "broker.session.timeout.ms": 3000,
            "broker.heartbeat.interval.ms": 500,
            **self._properties,
        }
        if self._detour is not None:
            properties["listeners"] = f"{properties['listeners']},DETOUR://{ports.HOST}:{detoured}"
            properties["advertised.listeners"] = f"{properties['advertised.listeners']},DETOUR://{ports.HOST}:{self._detour}"
            properties["listener.security.protocol.map"] = f"{properties['listener.security.protocol.map']},DETOUR:PLAINTEXT"
        written = self.data_dir / "server.properties"
        written.write_text("".join(f"{name}={_escaped(value)}\n" for name, value in properties.items()))
        options = (f"-Xmx{self._heap}", "-XX:+UseSerialGC", *self._java_options)
        return await GuardedChild.spawn(
            installed.command("kafka.Kafka", written, options=options),
            name=self.name,
            log=self.log,
            stop_signal=signal.SIGTERM,
            stop_timeout=self._stop_timeout,
            cwd=self.data_dir,
            env=java_environment(),
            keep_fds=[lock.fd],
        )

    async def _serves(self) -> bool:
        assert self._ports is not None
        # The plain connection first: aiokafka would log an error for each attempt before the port is open.
        _, writer = await asyncio.open_connection(ports.HOST, self._ports[0])
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        from aiokafka.admin import AIOKafkaAdminClient
        from aiokafka.errors import KafkaError

        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap, request_timeout_ms=REQUEST_TIMEOUT_MS)
        try:
            await admin.start()
            described = await admin.describe_cluster()
        except KafkaError:
            return False
        finally:
            await admin.close()
        # A broker that the controller has not let in yet answers, but is not in the list.
        return bool(described["brokers"])

    async def restart(self) -> None:
        """Stop and start on the same port with the same data."""
        await self.stop()
        await self.start()

    async def wipe(self) -> None:
        """Kill the server and remove all its data; the next start gives an empty cluster on the same port."""
        await self.kill()
        for name in ("data", "data.partial"):
            await asyncio.to_thread(shutil.rmtree, self.data_dir / name, ignore_errors=True)

    @property
    def port(self) -> int:
        if self._ports is None:
            raise EmbeddedError("the port is known after start()")
        return self._ports[0]

    @property
    def detoured_port(self) -> int:
        """Where the detour leads to; the same after a restart."""
        if self._ports is None:
            raise EmbeddedError("the port is known after start()")
        return self._ports[2]

    @property
    def bootstrap(self) -> str:
        """host:port, for `bootstrap_servers`; the same after a restart."""
        return f"{ports.HOST}:{self.port}"


def _random_id() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def _escaped(value: str | int) -> str:
    # A properties file: a backslash escapes, and what is not ASCII is written as \uXXXX.
    text = str(value).replace("\\", "\\\\")
    return "".join(c if c.isascii() else f"\\u{ord(c):04x}" for c in _utf16_units(text))


def _utf16_units(text: str) -> Iterator[str]:
    encoded = text.encode("utf-16-be", "surrogatepass")
    return (chr(int.from_bytes(encoded[at : at + 2])) for at in range(0, len(encoded), 2))


async def _run_in_foreground(port: int, data_dir: Path) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    kafka = ApacheKafka(data_dir, port=port)
    print(f"starting Apache Kafka {VERSION} in {data_dir} ...", file=sys.stderr)
    async with kafka:
        print(f"Apache Kafka {VERSION} on {kafka.bootstrap}, Ctrl-C ends it", flush=True)
        ended = asyncio.ensure_future(kafka.wait())
        asked = asyncio.ensure_future(stop.wait())
        await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        died = ended.done()
        for waiting in (ended, asked):
            waiting.cancel()
    if died:
        print(f"Apache Kafka ended by itself: see {kafka.log}", file=sys.stderr)
    return 1 if died else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m orderflow.embedded.kafka`; exit code 1 when Kafka cannot be run or ends by itself."""
    parser = argparse.ArgumentParser(prog="python -m orderflow.embedded.kafka", description="Run one Apache Kafka.")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="taken when free, else another (default 9092)")
    parser.add_argument("--data", type=Path, default=Path(".orderflow/kafka"), help="default .orderflow/kafka")
    options = parser.parse_args(arguments)
    try:
        return asyncio.run(_run_in_foreground(options.port, options.data.resolve()))
    except EmbeddedError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
