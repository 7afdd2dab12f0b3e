"""A file system of a limited size below the tables that grow, so that their disk can be full and nobody else's."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from orderflow.embedded.errors import EmbeddedError
from orderflow.embedded.postgres import EmbeddedPostgres

MOUNT_TIMEOUT = 30.0
TABLES = ("orders", "outbox")


def possible() -> bool:
    """Whether one can be mounted here: by root on Linux."""
    return sys.platform.startswith("linux") and os.geteuid() == 0


@asynccontextmanager
async def limited_disk(postgres: EmbeddedPostgres, database: str, directory: Path, size: int) -> AsyncIterator[Path]:
    """A tablespace of `size` bytes in memory, with the heaps of orders and outbox in it.

    On the way out PostgreSQL must have ended. Raises EmbeddedError where the mount is refused.
    """
    await asyncio.to_thread(directory.mkdir)
    await _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))
    try:
        place = await asyncio.to_thread(_owned_place, directory, postgres)
        connection = await postgres.connect(database)
        try:
            await connection.execute(f"CREATE TABLESPACE limited LOCATION '{place}'")
            for table in TABLES:
                await connection.execute(f"ALTER TABLE {table} SET TABLESPACE limited")
        finally:
            await connection.close(timeout=5)
        yield directory
    finally:
        await postgres.stop()
        await _run("umount", str(directory))


def _owned_place(directory: Path, postgres: EmbeddedPostgres) -> Path:
    place = directory / "tablespace"
    place.mkdir(mode=0o700)
    owner = os.stat(postgres.data_dir / "pgdata")
    os.chown(place, owner.st_uid, owner.st_gid)
    return place


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(MOUNT_TIMEOUT):
        _, told = await process.communicate()
    if process.returncode != 0:
        raise EmbeddedError(f"{' '.join(command)}: {told.decode(errors='replace').strip()}: leave out the full disk")
