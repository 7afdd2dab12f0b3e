"""Where an instance's data lies and which user works on it: the wanted directory, or a stand-in."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from orderflow.embedded.access import Account, owned_directory, server_account, succeeds_as
from orderflow.embedded.errors import EmbeddedError

if sys.platform != "win32":
    import pwd

STAND_IN_BASE = Path("/var/tmp")
CLUSTER = "pgdata"  # PostgreSQL's own directory inside the instance's


@dataclass(frozen=True)
class Place:
    """`directory` is the instance's, `account` runs the server (None: we do)."""

    directory: Path
    account: Account | None

    @property
    def cluster(self) -> Path:
        return self.directory / CLUSTER


def find_place(wanted: Path) -> Place:
    """Decide and create the directory for the instance that should lie in `wanted`.

    A cluster that exists decides: its owner runs the server, and it is never passed over for an empty one.
    Raises EmbeddedError.
    """
    wanted = Path(os.path.realpath(wanted))
    stand_in = stand_in_for(wanted)
    for directory in (wanted, stand_in):
        if os.path.lexists(directory / CLUSTER):
            return _existing(directory)
    account = server_account()
    if account is None:
        _require_name()
    try:
        _make(wanted, account)
    except OSError as error:
        raise EmbeddedError(f"{wanted} cannot be created: {error.strerror}: choose another data directory") from None
    if _keeps_private_files(wanted, account):
        return Place(wanted, account)
    owned_directory(stand_in.parent)
    _make(stand_in, account)
    if _keeps_private_files(stand_in, account):
        return Place(stand_in, account)
    who = account.name if account else "this user"
    raise EmbeddedError(f"neither {wanted} nor {stand_in} can hold a database of {who}: choose another data directory")


def _require_name() -> None:
    # initdb gives up on a user id without an entry, as containers with an arbitrary --user have it.
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise EmbeddedError(
            f"user id {os.geteuid()} has no entry in /etc/passwd, which PostgreSQL needs: add one, run as another "
            "user, or set DATABASE_URL to a server of your own"
        ) from None


def stand_in_for(wanted: Path) -> Path:
    """What is used when the server's user cannot reach `wanted`, or its file system keeps no modes."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(wanted))).hexdigest()[:16]
    return STAND_IN_BASE / f"orderflow-data-{os.geteuid()}" / name


def _make(directory: Path, account: Account | None) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True)
        directory.chmod(0o700 if account is None else 0o711)


def _existing(directory: Path) -> Place:
    if directory.parent.parent == STAND_IN_BASE:
        owned_directory(directory.parent)
    cluster = directory / CLUSTER
    try:
        owner = cluster.stat().st_uid
    except OSError as error:
        raise EmbeddedError(f"{cluster} cannot be read: {error.strerror}") from None
    us = os.geteuid()
    if owner == 0 and us == 0:
        raise EmbeddedError(f"{cluster} belongs to root, and PostgreSQL does not run as root: chown -R postgres {cluster}")
    if us not in (0, owner):
        raise EmbeddedError(
            f"{cluster} was made by user {Account.of(owner).name}: run as that user (as root, if root "
            "started it), or choose another data directory"
        )
    account = Account.of(owner) if us == 0 else None
    if not succeeds_as(account, 'cd "$1" && test -r PG_VERSION && test -w .', cluster):
        who = account.name if account else "this user"
        raise EmbeddedError(f"user {who} cannot reach {cluster}: open the directories above it (chmod o+x), or move it")
    return Place(directory, account)


def _keeps_private_files(directory: Path, account: Account | None) -> bool:
    """Whether `account` may own a directory of mode 700 here: not below a closed home, say."""
    try:
        probe = Path(tempfile.mkdtemp(prefix="probe.", dir=directory))
    except OSError:
        return False
    try:
        if account is not None:
            os.chown(probe, account.uid, account.gid)
        if stat.S_IMODE(probe.stat().st_mode) != 0o700:
            return False
        return succeeds_as(account, 'cd "$1" && : >file && rm file', probe)
    except OSError:
        return False
    finally:
        probe.rmdir()
