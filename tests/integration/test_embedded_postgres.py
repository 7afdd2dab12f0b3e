"""The embedded PostgreSQL: every way to start, to crash and to come back; the way it is run as root is elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg
import pytest

from orderflow.embedded import ports
from orderflow.embedded.access import server_account
from orderflow.embedded.binaries import system_binaries
from orderflow.embedded.cluster import INITDB_LOG, PARTIAL
from orderflow.embedded.errors import AlreadyRunningError, EmbeddedError, ServerDiedError
from orderflow.embedded.lock import InstanceLock
from orderflow.embedded.postgres import EmbeddedPostgres
from tests.servers import binaries_of, make_postgres, postgres_major, scratch_directory, under_ci
from tests.waiting import eventually

OTHER_MAJOR = {18: 16, 16: 18, 15: 18}


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


@asynccontextmanager
async def started(directory: Path, **options: object) -> AsyncIterator[EmbeddedPostgres]:
    server = make_postgres(directory, **options)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()


@contextmanager
def a_program_of_the_servers_user(cwd: Path = Path("/")) -> Iterator[int]:
    """A process that only sleeps, run by the user that runs the server; gives its pid."""
    account = server_account()
    identity = {} if account is None else {"user": account.uid, "group": account.gid, "extra_groups": []}
    process = subprocess.Popen(["/bin/sleep", "600"], cwd=cwd, **identity)  # type: ignore[call-overload]
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


async def value(url: str, query: str) -> object:
    connection = await asyncpg.connect(url, timeout=10, command_timeout=10)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


async def run(url: str, statement: str) -> None:
    await value(url, statement)


async def test_it_is_what_the_contract_says(scratch: Path) -> None:
    async with started(scratch / "pg") as server:
        assert server.url == f"postgresql://app_user:app_password@127.0.0.1:{server.port}/app_db"
        assert await value(server.url, "SELECT current_user || ' ' || current_database()") == "app_user app_db"
        version = await value(server.url, "SHOW server_version_num")
        assert int(str(version)) // 10000 == postgres_major()
        assert await value(server.url, "SHOW server_encoding") == "UTF8"
        await run(server.url, "CREATE TABLE kept (id uuid DEFAULT gen_random_uuid(), what text)")
        await run(server.url, "CREATE DATABASE another")
        assert await value(server.url, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
        assert await value(server.admin_url, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is True
        assert server.log.exists()
        assert server.data_dir == scratch / "pg"


async def test_it_listens_on_the_loopback_only_and_asks_for_passwords(scratch: Path) -> None:
    async with started(scratch / "pg") as server:
        assert await value(server.admin_url, "SHOW listen_addresses") == "127.0.0.1"
        assert await value(server.admin_url, "SHOW unix_socket_directories") == ""
        for wrong in (
            server.url.replace("app_password", "guess"),
            server.admin_url.replace("//postgres:", "//postgres:x"),
        ):
            with pytest.raises(asyncpg.InvalidPasswordError):
                await value(wrong, "SELECT 1")


@pytest.mark.parametrize("major", [15, 16, 18])
async def test_each_supported_version_starts(scratch: Path, major: int) -> None:
    if major == 15 and system_binaries(15) is None and not under_ci():
        pytest.skip("PostgreSQL 15 is not installed on this machine")
    async with started(scratch / "pg", major=major) as server:
        version = await value(server.url, "SHOW server_version_num")
        assert int(str(version)) // 10000 == major == server.binaries.major
        assert server.binaries.program("psql").exists()


async def test_data_and_port_survive_every_kind_of_end(scratch: Path) -> None:
    async with started(scratch / "pg") as server:
        url = server.url
        await run(url, "CREATE TABLE kept AS SELECT 1 AS one")

        async def still_there() -> None:
            assert server.url == url
            assert await value(url, "SELECT one FROM kept") == 1

        await server.restart()
        await still_there()
        await server.restart("immediate")
        await still_there()
        await server.kill()
        assert not server.running
        await server.start()
        await still_there()
        os.kill(server.pid, signal.SIGKILL)  # behind our back: its backends may live for a moment
        assert await asyncio.wait_for(server.wait(), 10) == -signal.SIGKILL
        await server.start()
        await still_there()


async def test_a_stop_while_clients_are_at_work_is_quick(scratch: Path) -> None:
    async with started(scratch / "pg", stop_timeout=60.0) as server:
        connection = await asyncpg.connect(server.url, timeout=10)
        sleeping = asyncio.ensure_future(connection.execute("SELECT pg_sleep(600)"))
        await eventually(lambda: value(server.admin_url, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))
        await asyncio.wait_for(server.stop(), 30)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await sleeping
        connection.terminate()
        assert not server.running


async def test_pause_freezes_backends_too(scratch: Path) -> None:
    async with started(scratch / "pg") as server:
        connection = await asyncpg.connect(server.url, timeout=10)
        await server.pause()
        with pytest.raises(TimeoutError):
            await connection.fetchval("SELECT 1", timeout=0.3)
        await server.resume()
        connection.terminate()
        assert await value(server.url, "SELECT 2") == 2


async def test_the_wanted_port_is_a_wish(scratch: Path) -> None:
    wanted = ports.free_port()
    first = EmbeddedPostgres(scratch / "first", port=wanted, binaries=binaries_of(postgres_major()), durable=False)
    second = EmbeddedPostgres(scratch / "second", port=wanted, binaries=binaries_of(postgres_major()), durable=False)
    try:
        await first.start()
        await second.start()
        assert first.port == wanted
        assert second.port != wanted
        assert await value(first.url, "SHOW port") == str(wanted)
        assert await value(second.url, "SHOW port") == str(second.port)
    finally:
        await first.kill()
        await second.kill()


async def test_two_that_start_at_once_for_one_port_both_come_up(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ports.free_port()
    asked: list[int | None] = []

    def both_believe_it_is_free(preferred: int | None) -> int:
        asked.append(preferred)
        return wanted if len(asked) <= 2 else ports.free_port()

    monkeypatch.setattr(ports, "choose", both_believe_it_is_free)
    async with asyncio.TaskGroup() as group:
        servers = [make_postgres(scratch / name) for name in ("a", "b")]
        starts = [group.create_task(server.start()) for server in servers]
    try:
        assert all(start.exception() is None for start in starts)
        assert sum(server.port == wanted for server in servers) == 1
        for server in servers:
            assert await value(server.url, "SHOW port") == str(server.port)
    finally:
        for server in servers:
            await server.kill()


async def test_the_same_directory_twice_is_refused_with_the_pid(scratch: Path) -> None:
    async with started(scratch / "pg") as server:
        with pytest.raises(AlreadyRunningError, match=f"already running here, pid {server.pid}") as refused:
            await make_postgres(scratch / "pg").start()
        assert refused.value.pid == server.pid
        with pytest.raises(AlreadyRunningError):
            await server.start()
        link = scratch / "link"
        link.symlink_to(scratch / "pg")
        with pytest.raises(AlreadyRunningError):
            await make_postgres(link).start()
        assert await value(server.url, "SELECT 1") == 1


async def test_a_pid_file_whose_pid_now_belongs_to_another_program_of_that_user(scratch: Path) -> None:
    async with started(scratch / "pg") as server:
        await run(server.url, "CREATE TABLE kept AS SELECT 1 AS one")
        pid_file = server.data_dir / "pgdata" / "postmaster.pid"
        left_behind = pid_file.read_text().splitlines()
        await server.kill()
        assert pid_file.exists()
        with a_program_of_the_servers_user() as pid:
            pid_file.write_text("\n".join([str(pid), *left_behind[1:]]) + "\n")
            await server.start()
            assert await value(server.url, "SELECT one FROM kept") == 1


@pytest.mark.parametrize("content", ["", "garbage\n", "-17\n", "99999999\n"])
async def test_a_pid_file_that_is_damaged(scratch: Path, content: str) -> None:
    async with started(scratch / "pg") as server:
        await server.stop()
        (server.data_dir / "pgdata" / "postmaster.pid").write_text(content)
        await server.start()
        assert await value(server.url, "SELECT 1") == 1


async def test_a_server_that_was_started_by_other_means_is_not_disturbed(scratch: Path) -> None:
    async with started(scratch / "pg") as server:
        await server.stop()
        cluster = server.data_dir / "pgdata"
        with a_program_of_the_servers_user(cwd=cluster) as pid:
            (cluster / "postmaster.pid").write_text(f"{pid}\n{cluster}\n")
            with pytest.raises(AlreadyRunningError, match=f"pid {pid}"):
                await server.start()
            assert (cluster / "postmaster.pid").exists()


async def test_a_directory_of_another_version_is_refused_and_left_alone(scratch: Path) -> None:
    mine, other = postgres_major(), OTHER_MAJOR[postgres_major()]
    async with started(scratch / "pg", major=other) as server:
        await run(server.url, "CREATE TABLE kept AS SELECT 1 AS one")
    with pytest.raises(EmbeddedError, match=rf"made by PostgreSQL {other}, and this is PostgreSQL {mine}"):
        await make_postgres(scratch / "pg").start()
    async with started(scratch / "pg", major=other) as server:
        assert await value(server.url, "SELECT one FROM kept") == 1


async def test_a_cluster_that_is_not_ours_is_refused(scratch: Path) -> None:
    (scratch / "PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedError, match="is itself a PostgreSQL 17"):
        await make_postgres(scratch).start()


async def test_an_interrupted_first_start_is_repaired(scratch: Path) -> None:
    server = make_postgres(scratch / "pg")
    first = asyncio.ensure_future(server.start())
    await eventually(lambda: (scratch / "pg" / INITDB_LOG).exists() or first.done())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not (scratch / "pg" / "pgdata").exists()
    (scratch / "pg" / PARTIAL).mkdir(exist_ok=True)
    (scratch / "pg" / PARTIAL / "half").touch()
    async with started(scratch / "pg") as again:
        assert await value(again.url, "SELECT 1") == 1
        assert not (scratch / "pg" / PARTIAL).exists()


async def test_a_first_start_that_ended_before_the_database_was_made_is_repaired(scratch: Path) -> None:
    async with started(scratch / "pg") as server:
        await run(server.admin_url, "DROP DATABASE app_db")
        await run(server.admin_url, "DROP ROLE app_user")
        await server.restart()
        assert await value(server.url, "SELECT 1") == 1


async def test_when_it_dies_at_start_the_error_shows_why(scratch: Path) -> None:
    server = make_postgres(scratch / "pg", settings={"shared_buffers": "lots"})
    with pytest.raises(ServerDiedError, match=r'exit code 1(.|\n)*invalid value for parameter "shared_buffers"'):
        await server.start()
    assert not server.running
    (await InstanceLock.acquire(scratch / "pg", patience=5)).close()


async def test_settings_reach_the_server(scratch: Path) -> None:
    async with started(scratch / "pg", settings={"work_mem": "7MB"}, max_connections=37) as server:
        assert await value(server.url, "SHOW work_mem") == "7MB"
        assert await value(server.url, "SHOW max_connections") == "37"
        assert await value(server.url, "SHOW fsync") == "off"


async def test_a_durable_one_syncs(scratch: Path) -> None:
    server = EmbeddedPostgres(scratch / "pg", port=None, binaries=binaries_of(postgres_major()))
    async with server:
        assert await value(server.url, "SHOW fsync") == "on"
        assert await value(server.url, "SHOW synchronous_commit") == "on"
        assert await value(server.url, "SHOW full_page_writes") == "on"


async def test_wipe_removes_what_it_made_and_nothing_else(scratch: Path) -> None:
    async with started(scratch / "a") as server:
        await server.wipe()
    assert not (scratch / "a").exists()
    (scratch / "b").mkdir()
    (scratch / "b" / "mine").touch()
    async with started(scratch / "b") as server:
        await server.wipe()
    assert [path.name for path in (scratch / "b").iterdir()] == ["mine"]


async def test_a_path_with_spaces_quotes_and_umlauts(scratch: Path) -> None:
    async with started(scratch / 'it\'s a "dår" $HOME') as server:
        assert await value(server.url, "SELECT 1") == 1


async def test_a_path_longer_than_a_socket_address(scratch: Path) -> None:
    async with started(scratch / ("long" * 20) / ("longer" * 20)) as server:
        assert await value(server.url, "SELECT 1") == 1


async def test_the_environment_does_not_steer_it(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"PGDATA": "/nowhere", "PGPORT": "1", "PGHOST": "nowhere", "PGUSER": "x", "PGSSLMODE": "require",
                       "PGOPTIONS": "-c nonsense=1", "LC_ALL": "xx_XX.UTF-8"}.items():  # fmt: skip
        monkeypatch.setenv(name, text)
    async with started(scratch / "pg") as server:
        monkeypatch.undo()
        assert await value(server.url, "SELECT 1") == 1
