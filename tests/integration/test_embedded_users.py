"""The embedded PostgreSQL as root, which it refuses to run as, and as an ordinary user."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import site
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from orderflow.embedded import binaries as binaries_module
from orderflow.embedded import place as place_module
from orderflow.embedded.access import Account, server_account, succeeds_as
from orderflow.embedded.binaries import PostgresBinaries, copy_installation, wheel_binaries
from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.place import stand_in_for
from orderflow.embedded.postgres import EmbeddedPostgres
from tests.servers import make_postgres, scratch_directory

ROOT = Path(__file__).parents[2]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
SOMEBODY = Account.of(pwd.getpwnam("nobody").pw_uid)
NAMELESS = 54321

SCRIPT = """
import asyncio, json, os, sys
from pathlib import Path
import asyncpg
from orderflow.embedded.broker import EmbeddedBroker
from orderflow.embedded.postgres import EmbeddedPostgres

async def main():
    wanted = Path(sys.argv[1])
    async with EmbeddedPostgres(wanted / "pg", port=None) as server, EmbeddedBroker(wanted / "broker") as broker:
        connection = await asyncpg.connect(server.url, timeout=10)
        one = await connection.fetchval("SELECT 1")
        await connection.close()
        print(json.dumps({
            "uid": os.geteuid(), "owner": os.stat(server.data_dir / "pgdata").st_uid, "one": one,
            "data_dir": str(server.data_dir), "bindir": str(server.binaries.bindir), "broker": broker.bootstrap,
        }))

asyncio.run(main())
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


@pytest.fixture
def open_places(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for /var/tmp, so that the tests leave nothing there."""
    place = scratch / "var-tmp"
    place.mkdir()
    place.chmod(0o1777)
    monkeypatch.setattr(place_module, "STAND_IN_BASE", place)
    monkeypatch.setattr(binaries_module, "SHARED_PLACES", (place,))
    return place


@pytest.fixture
def closed(scratch: Path) -> Path:
    """A directory like a home of mode 700: nobody but its owner reaches anything below it."""
    directory = scratch / "closed"
    directory.mkdir(mode=0o700)
    return directory


@asynccontextmanager
async def started(server: EmbeddedPostgres) -> AsyncIterator[asyncpg.Connection]:
    async with server:
        connection = await asyncpg.connect(server.url, timeout=10, command_timeout=10)
        try:
            yield connection
        finally:
            await connection.close()


def closed_copy(closed: Path) -> PostgresBinaries:
    return copy_installation(wheel_binaries(), closed / "site-packages")


@AS_ROOT
async def test_root_runs_it_as_another_user(scratch: Path) -> None:
    account = server_account()
    assert account is not None
    server = make_postgres(scratch / "pg")
    async with started(server) as connection:
        assert await connection.fetchval("SELECT 1") == 1
        assert (server.data_dir / "pgdata").stat().st_uid == account.uid
        if sys.platform == "linux":
            assert Path(f"/proc/{server.pid}").stat().st_uid == account.uid
    assert server.data_dir == scratch / "pg"


@AS_ROOT
async def test_binaries_out_of_reach_are_copied_once(closed: Path, open_places: Path, scratch: Path) -> None:
    unreachable = closed_copy(closed)
    copies = []
    for name in ("a", "b"):
        server = EmbeddedPostgres(scratch / name, port=None, binaries=unreachable, durable=False)
        async with started(server) as connection:
            assert await connection.fetchval("SELECT 1") == 1
            copies.append((server.binaries.bindir, server.binaries.bindir.stat().st_ino))
    assert copies[0] == copies[1]
    assert copies[0][0].is_relative_to(open_places)


@AS_ROOT
async def test_an_interrupted_copy_is_repaired_and_a_foreign_one_refused(
    closed: Path, open_places: Path, scratch: Path
) -> None:
    unreachable = closed_copy(closed)
    home = open_places / f"orderflow-postgresql-18-{unreachable.version}-0"
    (home / "partial" / "bin").mkdir(parents=True)
    (home / "partial" / "bin" / "postgres").touch()
    server = EmbeddedPostgres(scratch / "a", port=None, binaries=unreachable, durable=False)
    async with started(server) as connection:
        assert await connection.fetchval("SELECT 1") == 1
    os.chown(home, SOMEBODY.uid, SOMEBODY.gid)
    server = EmbeddedPostgres(scratch / "b", port=None, binaries=unreachable, durable=False)
    with pytest.raises(EmbeddedError, match="not a directory that belongs to us alone"):
        await server.start()


@AS_ROOT
async def test_data_out_of_reach_lie_in_a_stand_in_and_are_found_again(closed: Path, open_places: Path) -> None:
    server = make_postgres(closed / "pg")
    async with started(server) as connection:
        await connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
    assert server.data_dir == stand_in_for(closed / "pg")
    assert server.data_dir.is_relative_to(open_places)
    # The wanted place becomes reachable: an empty database there must not hide the one that exists.
    closed.chmod(0o755)
    again = make_postgres(closed / "pg")
    async with started(again) as connection:
        assert await connection.fetchval("SELECT one FROM kept") == 1
    other = make_postgres(closed / "other")
    async with started(other):
        assert other.data_dir == closed / "other"


@AS_ROOT
async def test_a_stand_in_that_somebody_else_made_is_refused(closed: Path, open_places: Path) -> None:
    base = stand_in_for(closed / "pg").parent
    base.mkdir()
    os.chown(base, SOMEBODY.uid, SOMEBODY.gid)
    with pytest.raises(EmbeddedError, match="not a directory that belongs to us alone"):
        await make_postgres(closed / "pg").start()


@AS_ROOT
async def test_a_cluster_that_was_closed_off_is_not_replaced_by_an_empty_one(closed: Path) -> None:
    closed.chmod(0o755)
    async with started(make_postgres(closed / "pg")):
        pass
    closed.chmod(0o700)
    with pytest.raises(EmbeddedError, match=r"cannot reach .*: open the directories above it"):
        await make_postgres(closed / "pg").start()


@AS_ROOT
async def test_root_runs_an_ordinary_users_cluster_as_that_user(scratch: Path) -> None:
    async with started(make_postgres(scratch / "pg")):
        pass
    cluster = scratch / "pg" / "pgdata"
    for path in (cluster, *cluster.rglob("*")):
        os.chown(path, SOMEBODY.uid, SOMEBODY.gid, follow_symlinks=False)
    server = make_postgres(scratch / "pg")
    async with started(server) as connection:
        assert await connection.fetchval("SELECT 1") == 1
    os.chown(cluster, 0, 0)
    with pytest.raises(EmbeddedError, match="belongs to root"):
        await make_postgres(scratch / "pg").start()


def interpreter_for(account: Account) -> tuple[str, dict[str, str]] | None:
    """A Python of our version that `account` can run with our packages, and the environment that it needs."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    paths = [str(ROOT), *site.getsitepackages(), *(path for path in sys.path if path.endswith("site-packages"))]
    environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    for python in (sys.executable, shutil.which(version, path=os.defpath)):
        check = 'export PYTHONPATH="$2" && "$1" -c "import orderflow.embedded.postgres, confluent_kafka, asyncpg"'
        if python and succeeds_as(account, check, python, environment["PYTHONPATH"]):
            return python, environment
    return None


@AS_ROOT
def test_an_ordinary_user_just_runs_it(scratch: Path) -> None:
    found = interpreter_for(SOMEBODY)
    if found is None:
        pytest.skip("no Python and packages on this machine that another user can reach")
    python, environment = found
    home = scratch / "home"
    home.mkdir()
    os.chown(home, SOMEBODY.uid, SOMEBODY.gid)
    for _ in range(2):  # the second start finds the first one's data
        done = subprocess.run(
            [python, "-c", SCRIPT, str(home / "data")],
            user=SOMEBODY.uid, group=SOMEBODY.gid, extra_groups=[], cwd=home, timeout=60,
            env={**environment, "HOME": str(home)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["uid"] == said["owner"] == SOMEBODY.uid
        assert said["one"] == 1
        assert said["data_dir"] == str(home / "data" / "pg")
    assert (home / "data" / "pg").stat().st_mode & 0o077 == 0


async def test_a_user_without_a_name_is_told_so(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NAMELESS)
    with pytest.raises(EmbeddedError, match=f"user id {NAMELESS} has no entry"):
        await make_postgres(scratch / "pg").start()


@pytest.mark.skipif(os.geteuid() == 0, reason="this one is about ordinary users")
async def test_another_users_cluster_is_refused(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(make_postgres(scratch / "pg")):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(EmbeddedError, match=r"was made by user .*: run as that user"):
        await make_postgres(scratch / "pg").start()
