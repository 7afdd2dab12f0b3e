"""Who runs a server and what that user can reach: PostgreSQL refuses root, and homes may be closed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orderflow.embedded.errors import EmbeddedError

if sys.platform != "win32":
    import pwd

# PostgreSQL's own account on Debian and Red Hat, on macOS and BSD; then the one that owns nothing.
ACCOUNT_NAMES = ("postgres", "_postgres", "nobody")
PROBE_TIMEOUT = 20.0


@dataclass(frozen=True)
class Account:
    """A user to run a server as instead of our own."""

    name: str
    uid: int
    gid: int

    @classmethod
    def of(cls, uid: int) -> Account:
        """The account with that id; without an entry in the user database its number is name and group."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            return cls(str(uid), uid, uid)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid)


def server_account() -> Account | None:
    """The account for a server that refuses root; None when we are an ordinary user ourselves.

    Raises EmbeddedError when root finds no such account.
    """
    if os.geteuid() != 0:
        return None
    for name in ACCOUNT_NAMES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        "PostgreSQL does not run as root, and there is no user "
        f"{' or '.join(ACCOUNT_NAMES)} to run it as: add one (useradd --system postgres), "
        "or run as an ordinary user"
    )


def succeeds_as(account: Account | None, script: str, *arguments: str | Path) -> bool:
    """Whether a shell script ends with 0 when `account` runs it: ask the kernel, guess nothing from modes."""
    identity: dict[str, int | list[int]] = {}
    if account is not None:
        identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        done = subprocess.run(  # type: ignore[call-overload]
            ["/bin/sh", "-c", script, "sh", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            timeout=PROBE_TIMEOUT,
            env=clean_environment(),
            **identity,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return False
    return bool(done.returncode == 0)


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment without what would steer PostgreSQL or Kafka (PG*, KAFKA_*), messages in English."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "KAFKA_", "LC_"))}
    kept.pop("LANGUAGE", None)
    return {**kept, "LANG": "C", "LC_ALL": "C", **(more or {})}


def owned_directory(path: Path, mode: int = 0o711) -> Path:
    """Make or check a directory below a place that anyone may write to (/var/tmp).

    Raises EmbeddedError when it is not ours alone: somebody else could have laid it there beforehand.
    """
    try:
        path.mkdir(mode=mode)
        path.chmod(mode)  # mkdir's mode went through the umask
    except FileExistsError:
        pass
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise EmbeddedError(f"{path} is not a directory that belongs to us alone: remove it and try again")
    return path
