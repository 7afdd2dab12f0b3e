"""A real PostgreSQL on this machine: made, started, stopped, killed and restarted as a guarded child."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import asyncpg

from orderflow.embedded import cluster, ports
from orderflow.embedded.access import clean_environment
from orderflow.embedded.binaries import PostgresBinaries, runnable_by, system_binaries, wheel_binaries
from orderflow.embedded.errors import AlreadyRunningError, EmbeddedError, ServerDiedError
from orderflow.embedded.lock import InstanceLock
from orderflow.embedded.place import Place, find_place
from orderflow.embedded.process import GuardedChild
from orderflow.embedded.server import EmbeddedServer

__all__ = [
    "AlreadyRunningError",
    "EmbeddedError",
    "EmbeddedPostgres",
    "PostgresBinaries",
    "ServerDiedError",
    "system_binaries",
    "wheel_binaries",
]

APP_USER = "app_user"
APP_PASSWORD = "app_password"
APP_DATABASE = "app_db"
DEFAULT_PORT = 5432
CONNECT_TIMEOUT = 10.0
PORT_ATTEMPTS = 5
# A process that is killed loses nothing without these: only a machine that loses power does.
NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


class EmbeddedPostgres(EmbeddedServer):
    """One PostgreSQL server with the contract's role `app_user` and its database `app_db`, on 127.0.0.1 only.

    `data_dir` is the directory of the instance: it holds `pgdata`, `postgres.log` and `lock`. After `start()`
    the attribute of that name says where the data really lies (see `place.find_place`: as root it may be
    elsewhere).
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = DEFAULT_PORT,
        binaries: PostgresBinaries | None = None,
        settings: Mapping[str, str | int] | None = None,
        durable: bool = True,
        max_connections: int = 200,
        start_timeout: float = 60.0,
        stop_timeout: float = 10.0,
    ) -> None:
        """`port` is taken when it is free, else (and with None) any free one. `settings` are server settings
        by name.

        `durable=False` turns fsync off: faster, and safe against everything but a crash of the machine. Times
        are seconds; `start_timeout` includes crash recovery, `stop_timeout` is when a fast shutdown becomes
        SIGKILL.
        """
        super().__init__(data_dir, "postgres.log")
        self._preferred = port
        self._binaries = binaries
        self._settings: dict[str, str | int] = {
            "listen_addresses": ports.HOST,
            "unix_socket_directories": "",
            "max_connections": max_connections,
            "log_destination": "stderr",
            "logging_collector": "off",
            "lc_messages": "C",
            **({} if durable else NOT_DURABLE),
            **(settings or {}),
        }
        self._durable = durable
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._port: int | None = None
        self._password = ""

    async def start(self) -> None:
        """Make the cluster if there is none, start the server, wait until it answers, make role and database.

        Raises AlreadyRunningError, ServerDiedError (with the end of the log) or EmbeddedError.
        """
        self._refuse_second_start()
        binaries = self._binaries or wheel_binaries()
        place = await asyncio.to_thread(find_place, self.data_dir)
        self.data_dir = place.directory
        async with await InstanceLock.acquire(place.directory) as lock:
            binaries = self._binaries = await runnable_by(place.account, binaries)
            await cluster.prepare(place, binaries, lock, durable=self._durable)
            self._password = cluster.superuser_password(place.cluster)
            self._child = await self._start_on_a_free_port(place, binaries, lock)
        try:
            await self._ensure_database()
        except BaseException:
            await self.stop()
            raise

    async def _start_on_a_free_port(self, place: Place, binaries: PostgresBinaries, lock: InstanceLock) -> GuardedChild:
        again = self._port is not None  # after a restart clients look for it where it was
        for _ in range(PORT_ATTEMPTS):
            port = self._port if again and self._port is not None else ports.choose(self._preferred)
            child = await self._spawn(place, binaries, lock, port)
            lock.record(child.pid)
            self._port = port
            try:
                await child.until_ready(self._answers, self._start_timeout)
            except ServerDiedError as error:
                if again or "could not bind" not in error.log_tail:
                    raise
                continue  # somebody took the port after we had looked
            except BaseException:
                await child.kill()
                raise
            return child
        raise EmbeddedError(f"no free port was found for PostgreSQL in {PORT_ATTEMPTS} attempts")

    async def _spawn(self, place: Place, binaries: PostgresBinaries, lock: InstanceLock, port: int) -> GuardedChild:
        command: list[str | Path] = [binaries.program("postgres"), "-D", place.cluster]
        for name, value in {**self._settings, "port": port}.items():
            command += ["-c", f"{name}={value}"]
        return await GuardedChild.spawn(
            command,
            name=f"PostgreSQL {binaries.major}",
            log=self.log,
            stop_signal=signal.SIGINT,  # fast shutdown: SIGTERM would wait for every client
            stop_timeout=self._stop_timeout,
            death_signal=signal.SIGINT,
            account=place.account,
            cwd=place.cluster,
            env=clean_environment(),
            keep_fds=[lock.fd],
        )

    async def _answers(self) -> bool:
        try:
            connection = await self.connect()
        except asyncpg.CannotConnectNowError:
            return False  # still starting, or recovering from a crash
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            # Perhaps not even our server: another one took the port, and ours is about to say so and end.
            raise ConnectionError(str(error)) from error
        await connection.close(timeout=CONNECT_TIMEOUT)
        return True

    async def connect(self, database: str = "postgres") -> asyncpg.Connection:
        """A superuser's connection."""
        return await asyncpg.connect(
            host=ports.HOST,
            port=self.port,
            user=cluster.SUPERUSER,
            password=self._password,
            database=database,
            timeout=CONNECT_TIMEOUT,
            command_timeout=CONNECT_TIMEOUT * 6,
            ssl=False,
        )

    async def _ensure_database(self) -> None:
        # At every start, not only at the first: an interruption between initdb and here must be repaired.
        connection = await self.connect()
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", APP_USER):
                await connection.execute(f"CREATE ROLE {APP_USER} LOGIN CREATEDB PASSWORD '{APP_PASSWORD}'")
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", APP_DATABASE):
                await connection.execute(f"CREATE DATABASE {APP_DATABASE} OWNER {APP_USER}")
        finally:
            await connection.close(timeout=CONNECT_TIMEOUT)

    async def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop (immediate: no checkpoint, so the start recovers from the log) and start on the same port."""
        if mode == "immediate" and self._child is not None:
            await self._child.signal(signal.SIGQUIT)
            await self._child.ended_within(self._stop_timeout)
        await self.stop()
        await self.start()

    async def wipe(self) -> None:
        """Stop the server and remove its data, its log, and its directory if nothing else is there."""
        await self.stop()
        await asyncio.to_thread(cluster.remove, self.data_dir)

    @property
    def port(self) -> int:
        if self._port is None:
            raise EmbeddedError("the port is known after start()")
        return self._port

    @property
    def url(self) -> str:
        """What the application connects to: role app_user, database app_db."""
        return self.url_of(APP_DATABASE)

    def url_of(self, database: str) -> str:
        """The same role's address of another database."""
        return f"postgresql://{APP_USER}:{APP_PASSWORD}@{ports.HOST}:{self.port}/{database}"

    @property
    def admin_url(self) -> str:
        """The superuser's address of the database `postgres`."""
        return f"postgresql://{cluster.SUPERUSER}:{self._password}@{ports.HOST}:{self.port}/postgres"

    @property
    def binaries(self) -> PostgresBinaries:
        return self._binaries or wheel_binaries()
