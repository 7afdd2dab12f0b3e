"""A PostgreSQL cluster on disk: made in one step that survives interruption, checked before each start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from orderflow.embedded.access import clean_environment
from orderflow.embedded.binaries import PostgresBinaries
from orderflow.embedded.errors import AlreadyRunningError, EmbeddedError
from orderflow.embedded.lock import InstanceLock, alive
from orderflow.embedded.place import CLUSTER, Place
from orderflow.embedded.process import GuardedChild

SUPERUSER = "postgres"
LINUX = sys.platform.startswith("linux")
PASSWORD_FILE = "orderflow.superuser"
PARTIAL = f"{CLUSTER}.partial"
NEW_PASSWORD = "superuser.new"
INITDB_LOG = "initdb.log"
INITDB_TIMEOUT = 120.0


async def prepare(place: Place, binaries: PostgresBinaries, lock: InstanceLock, *, durable: bool) -> None:
    """Make the cluster where there is none; check the one that is there. The caller holds the lock.

    Raises EmbeddedError when it is of another major version, and when initdb fails.
    """
    _refuse_foreign_cluster(place.directory)
    if place.cluster.is_dir():
        check_version(place.cluster, binaries)
        remove_stale_pid_file(place.cluster)
    else:
        await _initialise(place, binaries, lock, durable=durable)


def remove(directory: Path) -> None:
    """Remove the cluster and what we laid beside it, and the directory when that empties it."""
    for name in (CLUSTER, PARTIAL):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("postgres.log", "postgres.log.1", INITDB_LOG, NEW_PASSWORD, "lock"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else lies there, or it is gone already
        directory.rmdir()


def superuser_password(cluster: Path) -> str:
    """Raises EmbeddedError when the file is gone."""
    try:
        return (cluster / PASSWORD_FILE).read_text().strip()
    except OSError as error:
        raise EmbeddedError(
            f"{cluster / PASSWORD_FILE} cannot be read ({error.strerror}): restore it, "
            f"or remove {cluster.parent} and with it the data"
        ) from None


def _refuse_foreign_cluster(directory: Path) -> None:
    # Somebody pointed us at a cluster that another tool made: its roles and its access rules are not ours to
    # change.
    if (directory / "PG_VERSION").exists():
        raise EmbeddedError(
            f"{directory} is itself a PostgreSQL {_version(directory)} directory, not made by orderflow: "
            "choose another one, or run that server and set DATABASE_URL"
        )


def _version(cluster: Path) -> str:
    try:
        return (cluster / "PG_VERSION").read_text(errors="replace").strip() or "(unknown)"
    except OSError:
        return "(unknown)"


def check_version(cluster: Path, binaries: PostgresBinaries) -> None:
    """Raises EmbeddedError, naming both versions, when another PostgreSQL major made the cluster."""
    found = _version(cluster)
    if found != str(binaries.major):
        raise EmbeddedError(
            f"the data in {cluster} was made by PostgreSQL {found}, and this is PostgreSQL {binaries.major}: "
            f"start it with PostgreSQL {found} and move it with pg_dump, choose another data directory, "
            f"or remove {cluster.parent} to begin anew"
        )


def remove_stale_pid_file(cluster: Path) -> None:
    """Remove the pid file that a killed server left behind.

    PostgreSQL does so itself unless another program of the same user now has that pid: then it refuses.
    Raises AlreadyRunningError when a server that was started by other means does run on the cluster.
    """
    pid_file = cluster / "postmaster.pid"
    try:
        first = pid_file.read_text(errors="replace").partition("\n")[0].strip()
    except FileNotFoundError:
        return
    pid = abs(int(first)) if first.lstrip("-").isdigit() else 0  # a lone backend writes its pid negated
    if pid and alive(pid) and _is_postgres_of(pid, cluster):
        raise AlreadyRunningError(cluster, pid)
    pid_file.unlink(missing_ok=True)


def _is_postgres_of(pid: int, cluster: Path) -> bool:
    if LINUX:
        try:
            return Path(f"/proc/{pid}/cwd").resolve(strict=True) == cluster.resolve()
        except OSError:
            # Another user's process: a server of ours, or one that may write here, we could have read.
            return False
    listed = subprocess.run(["ps", "-wwo", "command=", "-p", str(pid)], capture_output=True, text=True, timeout=10)
    return "postgres" in listed.stdout and str(cluster) in listed.stdout


async def _initialise(place: Place, binaries: PostgresBinaries, lock: InstanceLock, *, durable: bool) -> None:
    # Made under another name and renamed: what was interrupted half-way is never taken for a cluster.
    partial = place.directory / PARTIAL
    password_file = place.directory / NEW_PASSWORD
    await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
    password_file.unlink(missing_ok=True)
    partial.mkdir(mode=0o700)
    descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_urlsafe(24) + "\n")
    if place.account is not None:
        for path in (partial, password_file):
            os.chown(path, place.account.uid, place.account.gid)
    await _run_initdb(place, binaries, lock, partial, password_file, durable=durable)
    password_file.rename(partial / PASSWORD_FILE)
    partial.rename(place.cluster)
    if durable:
        _sync_directory(place.directory)


async def _run_initdb(
    place: Place,
    binaries: PostgresBinaries,
    lock: InstanceLock,
    partial: Path,
    password_file: Path,
    *,
    durable: bool,
) -> None:
    log = place.directory / INITDB_LOG
    command: list[str | Path] = [binaries.program("initdb"), "--pgdata", partial, "--username", SUPERUSER]
    command += [
        "--pwfile",
        password_file,
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        "--data-checksums",
    ]
    command += ["--no-instructions"] + ([] if durable else ["--no-sync"])
    child = await GuardedChild.spawn(
        command,
        name="initdb",
        log=log,
        stop_signal=signal.SIGTERM,
        account=place.account,
        cwd=partial,
        env=clean_environment(),
        keep_fds=[lock.fd],
    )
    if not await child.ended_within(INITDB_TIMEOUT):
        await child.kill()
        raise EmbeddedError(f"initdb did not end within {INITDB_TIMEOUT:.0f} s: see {log}")
    if child.returncode != 0:
        raise EmbeddedError(f"initdb failed. The end of {log}:\n{child.log_tail()}")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
